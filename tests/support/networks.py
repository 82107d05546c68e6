"""Tiny seeded networks, one per wiring that surgery must survive; each reads `(n, 3, 16, 16)` and is in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from methods.base import Budget


def fits(budget: Budget, macs: int, params: int) -> bool:
    """Whether a network without gates meets every limit of a budget."""
    costs = {"macs": macs, "params": params}
    return all(costs[cost] <= limit for cost, limit in budget.limits().items())


def plain() -> nn.Module:
    """Three convolutions in a row and a classifier."""
    return _seeded(
        lambda: nn.Sequential(
            *_conv(3, 16, stride=2),
            *_conv(16, 24),
            *_conv(24, 32, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
    )


def residual() -> nn.Module:
    """A stem and two basic blocks, the second with a projection: two trunks, two inner widths."""
    return _seeded(lambda: _Headed(nn.Sequential(*_conv(3, 16), _Basic(16, 16), _Basic(16, 24, stride=2)), 24))


def bottleneck() -> nn.Module:
    """A stem and two bottleneck blocks of 1x1, 3x3, 1x1 on one trunk, the first with a projection."""
    return _seeded(lambda: _Headed(nn.Sequential(*_conv(3, 8), _Bottleneck(8, 8, 32), _Bottleneck(32, 8, 32)), 32))


def depthwise() -> nn.Module:
    """An inverted residual as in MobileNetV2: expand, depthwise, project, add."""
    return _seeded(lambda: _Headed(nn.Sequential(*_conv(3, 16, stride=2), _Inverted(16, 32)), 16))


def grouped() -> nn.Module:
    """A bottleneck whose 3x3 convolution has four groups, as in ResNeXt."""
    return _seeded(lambda: _Headed(nn.Sequential(*_conv(3, 16), _Bottleneck(16, 32, 32, groups=4)), 32))


def concat() -> nn.Module:
    """Two branches side by side, concatenated before the last convolution, as in Inception."""
    return _seeded(lambda: _Headed(nn.Sequential(*_conv(3, 8), _Branches(8, 12, 20), *_conv(32, 16)), 16))


def flatten() -> nn.Module:
    """A map of 4 x 4 flattened into a hidden linear layer, as in VGG."""
    return _seeded(
        lambda: nn.Sequential(
            *_conv(3, 8, stride=2),
            *_conv(8, 16, stride=2),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    )


def squeeze() -> nn.Module:
    """An inverted residual with a squeeze-excite gate, as in MobileNetV3."""
    return _seeded(lambda: _Headed(nn.Sequential(*_conv(3, 16, stride=2), _Inverted(16, 32, is_gated=True)), 16))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build for build in (plain, residual, bottleneck, depthwise, grouped, concat, flatten, squeeze)
}


class _Headed(nn.Module):
    """A body, global average pooling and a classifier of 10 classes."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(x).mean((2, 3))))


class _Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_conv(inputs, outputs, stride=stride))
        self.outer = nn.Sequential(*_conv(outputs, outputs)[:2])
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.outer(self.inner(x)) + self.shortcut(x))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, inner: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.narrow = nn.Sequential(*_conv(inputs, inner, size=1))
        self.spread = nn.Sequential(*_conv(inner, inner, groups=groups))
        self.widen = nn.Sequential(*_conv(inner, outputs, size=1)[:2])
        self.shortcut = _shortcut(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.widen(self.spread(self.narrow(x))) + self.shortcut(x))


class _Inverted(nn.Module):
    def __init__(self, outer: int, inner: int, is_gated: bool = False) -> None:
        super().__init__()
        self.expand = nn.Sequential(*_conv(outer, inner, size=1))
        self.depth = nn.Sequential(*_conv(inner, inner, groups=inner))
        self.gate = _Gate(inner) if is_gated else nn.Identity()
        self.project = nn.Sequential(*_conv(inner, outer, size=1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.project(self.gate(self.depth(self.expand(x)))))


class _Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 4, 1)
        self.excite = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.excite(squeezed))


class _Branches(nn.Module):
    def __init__(self, inputs: int, left: int, right: int) -> None:
        super().__init__()
        self.left = nn.Sequential(*_conv(inputs, left, size=1))
        self.right = nn.Sequential(*_conv(inputs, right))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _shortcut(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(*_conv(inputs, outputs, size=1, stride=stride)[:2])


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with random weights and random, lifelike norm statistics; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build()
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, std=0.3)
                nn.init.normal_(cast(Tensor, norm.running_mean), std=0.3)
                nn.init.uniform_(cast(Tensor, norm.running_var), 0.5, 1.5)
    return network.eval()

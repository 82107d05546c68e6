"""CIFAR-style classifiers for small images: the teachers that need no download.

The residual nets follow He et al. 2015 (arXiv 1512.03385), section 4.2, with a 1x1 convolution instead of zero padding
if a stage widens; `vgg16-cifar` is the batch-norm VGG-16 with one linear layer; `mobilenet-cifar` is a MobileNetV1
(arXiv 1704.04861) of half its width and fewer strides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from search.base import WorkloadError


def build(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """A freshly initialised zoo network for `(n, channels, h, w)` inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZOO[name](channels, classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        z: Tensor = self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))
        return z


def _resnet(blocks: int) -> Callable[[int, int], nn.Module]:
    """A ResNet of three stages of `blocks` blocks (depth 6 x blocks + 2), widths 16, 32 and 64."""

    def network(channels: int, classes: int) -> nn.Module:
        stages: list[nn.Module] = []
        inputs = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            stage = [BasicBlock(inputs, width, stride)] + [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            inputs = width
        return nn.Sequential(*_conv(channels, 16), *stages, *_head(64, classes))

    return network


def _vgg16(channels: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = channels
    for stage, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if stage:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        for _ in range(depth):
            layers += _conv(inputs, width)
            inputs = width
    return nn.Sequential(*layers, *_head(inputs, classes))


def _mobilenet(channels: int, classes: int) -> nn.Module:
    layers = _conv(channels, 16)
    inputs = 16
    for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1)):
        layers += _conv(inputs, inputs, stride, groups=inputs) + _conv(inputs, width, kernel=1)
        inputs = width
    return nn.Sequential(*layers, *_head(inputs, classes))


def _conv(inputs: int, outputs: int, stride: int = 1, *, kernel: int = 3, groups: int = 1) -> list[nn.Module]:
    """Convolution, norm and activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(inputs: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]


ZOO: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": _resnet(1),
    "resnet14": _resnet(2),
    "resnet20": _resnet(3),
    "resnet56": _resnet(9),
    "vgg16-cifar": _vgg16,
    "mobilenet-cifar": _mobilenet,
}


def imported_timm() -> Any:
    """Import timm, which is an extra.

    Raises:
        WorkloadError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise WorkloadError(
            f"timm cannot be imported: {error}; expected the extra that has it; run pip install '.[timm]'"
        ) from error

"""Tiny networks whose forward does what surgery does not expect; each reads `(n, 3, 16, 16)` and is in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Straight(nn.Module):
    """Three convolutions and a classifier, read by the subclasses in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 32, 3)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classified(F.relu(self.outer(F.relu(self.inner(F.relu(self.stem(x)))))))

    def classified(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(x.mean((2, 3))))


class ByKeyword(Straight):
    """Calls layers by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inner(input=F.relu(self.stem(input=x))))
        return cast(Tensor, self.head(input=F.relu(self.outer(x)).mean((2, 3))))


class Flipped(Straight):
    """Averages over an image and its mirror image, which run as one batch."""

    def forward(self, x: Tensor) -> Tensor:
        both = super().forward(torch.cat([x, x.flip(-1)]))
        return both.view(2, x.shape[0], 10).mean(0)


class Attentive(nn.Module):
    """One head of attention without a projection: its products shrink with the layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 10)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return cast(Tensor, self.head(mixed.mean(1)))


class Halving(nn.Module):
    """A branch whose code takes its own width for half of its input's."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.widen = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
        return x + cast(Tensor, self.widen(F.relu(self.narrow(x)).reshape(images, channels // 2, height, width)))


class Coupled(nn.Module):
    """Two widths tied by code alone, beside one that is free."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Halving(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(x).mean((2, 3))))


class Tied(Straight):
    """Reads a layer's weight past the layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.outer(F.relu(self.inner(F.relu(self.stem(x))))))
        return self.classified(self.outer(F.conv_transpose2d(x, self.outer.weight)))


class Optional(Straight):
    """Returns a loss where labels are given, as networks of some libraries do."""

    def forward(self, x: Tensor, targets: Tensor | None = None, scale: float = 1.0) -> Tensor:
        logits = scale * super().forward(x)
        return logits if targets is None else F.cross_entropy(logits, targets)


class InPlace(Straight):
    """Prepares its images in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(0.25))


class HalfInside(Straight):
    """Computes its maps in bfloat16 between float32 inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.stem, self.inner, self.outer):
            layer.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.classified(F.relu(self.outer(F.relu(self.inner(F.relu(self.stem(x.bfloat16())))))).float())


class Bilinear(nn.Module):
    """Multiplies every two of its channels, and classifies their products."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 16, 3), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(F.relu(self.stem(x))).flatten(2)
        return cast(Tensor, self.head(torch.einsum("bcn,bdn->bcd", x, x).flatten(1)))


class Shuffled(Straight):
    """Works on half of its channels and shuffles them, twice, as ShuffleNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in (self.inner, self.outer):
            left, right = x.chunk(2, dim=1)
            both = torch.cat([left, F.relu(layer(right))], dim=1)
            images, height, width = both.shape[0], both.shape[2], both.shape[3]
            x = both.view(images, 2, 8, height, width).transpose(1, 2).contiguous().view(images, 16, height, width)
        return self.classified(F.relu(self.last(x)))


class Squashed(nn.Conv2d):
    """A convolution of normalised filters."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, F.normalize(self.weight, dim=1), self.bias)


class Subclassed(Straight):
    """Has convolutions of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = Squashed(3, 16, 3), Squashed(16, 24, 3), Squashed(24, 32, 3)


class Numbered(Straight):
    """Holds whole numbers as a parameter, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(10).flip(0), requires_grad=False)
        self.inner.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order]


class Asking(Straight):
    """Gives a token that it has learned to a layer, as a head that pools by attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.query = nn.Parameter(torch.randn(1, 32)), nn.Linear(32, 32)

    def classified(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        weights = (self.query(self.token.expand(x.shape[0], -1)).unsqueeze(1) @ tokens).softmax(-1)
        return cast(Tensor, self.head((tokens * weights).sum(-1)))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build the network with weights of a fixed seed; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


ODD: dict[str, Callable[[], nn.Module]] = {
    "keyword": ByKeyword,
    "flipped": Flipped,
    "attentive": Attentive,
    "coupled": Coupled,
    "tied": Tied,
    "optional": Optional,
    "in place": InPlace,
    "half inside": HalfInside,
    "bilinear": Bilinear,
    "shuffled": Shuffled,
    "subclassed": Subclassed,
    "numbered": Numbered,
    "asking": Asking,
}

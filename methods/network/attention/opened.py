"""Networks whose attention holds its weights out of reach, with attention of ours in its place that answers alike."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from methods.network.attention.joint import SelfAttention, is_plain
from methods.network.attention.windows import ShiftedWindowAttention
from methods.network.graph import replace, shares_weights
from methods.network.keeping import is_kept

TOLERANCE = 1e-4
"""The most that outputs may differ, as a share of the largest: the same sums are taken in another order."""

WINDOWS = ("torchvision.models.swin_transformer", "ShiftedWindowAttention")
"""The module and name of torchvision's class, which need not be imported to be known."""


@torch.no_grad()
def opened(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of `model`, in eval mode, whose attention is made of layers; `model` itself if none was replaced.

    torch's `MultiheadAttention` and torchvision's `ShiftedWindowAttention` are replaced, each for itself, where the
    outputs for `example` `(n, c, h, w)` stay as they were. Those that share weights or are kept stay.
    """
    if not any(_substitute(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model).eval()
    expected = model(example.clone())
    for name, module in [*model.named_modules()]:
        ours = _substitute(module)
        if ours is None or shares_weights(model, module, by_name=True):
            continue
        replace(model, name, ours.train(module.training))
        if not _is_alike(model, example, expected):
            replace(model, name, module)
    return model


def _substitute(module: nn.Module) -> nn.Module | None:
    """Build what takes a module's place, with its parameters; None if nothing does."""
    if any(map(is_kept, module.modules())):
        return None
    if is_plain(module):
        assert isinstance(module, nn.MultiheadAttention)
        return SelfAttention(module)
    is_windows = (type(module).__module__, type(module).__name__) == WINDOWS
    return ShiftedWindowAttention(module) if is_windows else None


def _is_alike(model: nn.Module, example: Tensor, expected: Tensor) -> bool:
    try:
        found = model(example.clone())
    except (AttributeError, RuntimeError, TypeError, ValueError):  # what surrounds it reads more of it than this has
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())

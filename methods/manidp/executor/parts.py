"""The parts of an executor that run: gates that choose channels, convolutions cut to them, and compact features.

Compact features hold the channels of a `Choice` alone, `(1, k, h, w)`, whichever these are for the image at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.manidp.executor.buckets import best_rows, round_up
from methods.manidp.gates import Gate, active

ALL, GATHERED = 0, -1
"""Numbers of the set that holds every channel, and of any set that was gathered for one image."""

Piece: TypeAlias = tuple[Tensor, Tensor | None]
"""Weight and bias of a part of a convolution."""


@dataclass(frozen=True, eq=False)
class Subset:
    """Channels of a masked convolution: as `rows` `(k,)` of those it still has, as `channels` `(k,)` of all it had.

    `number` tells buckets apart, see `ALL` and `GATHERED`.
    """

    rows: Tensor
    channels: Tensor
    number: int


@dataclass(frozen=True, eq=False)
class Choice:
    """The channels computed for one image, and `scale` `(k, 1, 1)`: the saliency, 0 for those that are not active."""

    subset: Subset
    scale: Tensor


class Chooser(nn.Module):
    """A gate that answers with a `Choice`: the smallest bucket that holds all active channels, else a gathered set.

    Sets are gathered of up to `limit` channels, in multiples of `multiple`; beyond that, all are computed.
    """

    def __init__(
        self, gate: Gate, threshold: Tensor, left: Tensor, buckets: Sequence[Tensor], *, multiple: int, limit: int
    ) -> None:
        super().__init__()
        self.gate = copy.deepcopy(gate)
        self.gate.expand.weight = nn.Parameter(gate.expand.weight[left].clone())
        self.gate.expand.bias = nn.Parameter(gate.expand.bias[left].clone())
        self.threshold, self.left, self.multiple, self.limit = threshold.clone(), left, multiple, limit
        every = Subset(torch.arange(len(left)), left, ALL)
        self.subsets = [Subset(rows, left[rows], number) for number, rows in enumerate(buckets, 1)] + [every]
        self.outside = torch.ones(len(self.subsets), len(left), dtype=torch.bool)
        for outside, subset in zip(self.outside, self.subsets, strict=True):
            outside[subset.rows] = False

    def forward(self, x: Tensor, source: Choice | None) -> Choice:
        if source is not None:
            x = spread(x.mean((2, 3), keepdim=True), source, self.gate.reduce.in_features)
        saliency = self.gate(x)
        on = active(saliency, self.threshold)
        subset = self._subset(saliency[0], on[0])
        return Choice(subset, (saliency * on)[0, subset.rows, None, None])

    def _subset(self, saliency: Tensor, on: Tensor) -> Subset:
        first = (on & self.outside).any(1).tolist().index(False)
        subset = self.subsets[first]
        if subset.number != ALL:
            return subset
        count = round_up(int(on.sum()), self.multiple)
        if count > self.limit:
            return subset
        rows = best_rows(saliency, on, count)
        return Subset(rows, self.left[rows], GATHERED)


class Cut(nn.Module):
    """A convolution of which only the chosen inputs and outputs are computed.

    `pieces` are weights and biases that lie ready, by the numbers of the sets of inputs and outputs.
    """

    def __init__(self, conv: nn.Conv2d, rows: Tensor, columns: Tensor | None) -> None:
        super().__init__()
        weight = conv.weight.detach()[rows]
        self.weight = weight if columns is None else weight[:, columns]
        self.bias = None if conv.bias is None else conv.bias.detach()[rows]
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.is_depthwise = conv.groups > 1
        self.pieces: dict[tuple[int, int], Piece] = {}

    def forward(self, x: Tensor, source: Choice | None, own: Choice) -> Tensor:
        inputs, outputs = None if source is None else source.subset, own.subset
        ready = self.pieces.get((ALL if inputs is None else inputs.number, outputs.number))
        return self.conv(x, *(ready or self.piece(inputs, outputs)))

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        groups = len(weight) if self.is_depthwise else 1
        if weight.is_mkldnn:
            settings = self.padding, self.stride, self.dilation, groups
            return cast(Tensor, _PACKED(x, weight, bias, *settings, "none", [], ""))
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def piece(self, inputs: Subset | None, outputs: Subset) -> Piece:
        """Weight and bias of these outputs for these inputs (None: all of them)."""
        weight, bias = self.weight, self.bias
        if outputs.number != ALL:
            weight = weight.index_select(0, outputs.rows)
            bias = None if bias is None else bias.index_select(0, outputs.rows)
        if inputs is not None and inputs.number != ALL:
            weight = weight.index_select(1, inputs.rows)
        return weight, bias

    def packed(self, weight: Tensor, x: Tensor) -> Tensor:
        """`weight` in the layout that oneDNN wants for inputs like `x`, which it else arranges anew at every call."""
        if isinstance(self.padding, str) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return weight
        groups = len(weight) if self.is_depthwise else 1
        settings = self.padding, self.stride, self.dilation, groups
        return cast(Tensor, torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(x.shape)))


_PACKED = torch.ops.mkldnn._convolution_pointwise


def scaled(features: Tensor, choice: Choice, rescale: bool = True) -> Tensor:
    """Compact features times their saliency; without `rescale` those of active channels pass unchanged."""
    return features * (choice.scale if rescale else choice.scale > 0)


def spread(features: Tensor, choice: Choice, width: int) -> Tensor:
    """Compact features `(1, k, h, w)` among zeros, `(1, width, h, w)`."""
    if len(choice.subset.channels) == width:
        return features
    whole = features.new_zeros(1, width, *features.shape[2:]).contiguous(memory_format=torch.channels_last)
    return whole.index_copy_(1, choice.subset.channels, features)


def narrow(features: Tensor, choice: Choice) -> Tensor:
    """The chosen channels of features of full width."""
    if len(choice.subset.channels) == features.shape[1]:
        return features
    return features.index_select(1, choice.subset.channels)


def accumulate(whole: Tensor, features: Tensor, choice: Choice) -> Tensor:
    """`whole + spread(features)`, without the zeros."""
    if len(choice.subset.channels) == whole.shape[1]:
        return whole + features
    return whole.index_add(1, choice.subset.channels, features)

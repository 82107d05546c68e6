"""The inputs and outputs of layers on calibration images, as rows, and the inputs' second moments.

A row holds the inputs of one output position: a patch of a convolution's map, or a linear layer's features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import ScoreError
from methods.hooks import hooked, only_input

IMAGES, BATCH = 256, 32
"""Calibration images read, and the number at a time."""

ROWS, ROWS_PER_COLUMN, PLENTY = 1 << 14, 4, 256
"""Rows that are enough for a layer: so many, or the last per column if that is less, and always the second per column.
A depthwise filter of nine columns gains nothing from thousands."""

WIDE = 2304
"""Columns from which on products are summed in float32, twice as fast: there the ridge is far above their noise."""

SIDE = 512
"""Columns of a product of rows that are multiplied at a time."""

RIDGE, SHRINKAGE, FULL = 1e-6, 0.1, 8
"""Added to the diagonal, in units of its mean: always, and per column that has fewer than so many rows."""


@torch.no_grad()
def second_moments(
    network: nn.Module,
    names: Sequence[str],
    images: Tensor,
    *,
    blocks: Mapping[str, tuple[int, int, int]] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The mean of x x' over the rows x that each layer reads: float64 `(groups, n, n)`, positive definite.

    n is a convolution group's channels times its kernel in the order of its weight, or a linear layer's features.
    Padding counts, because the layer reads it. Where rows abound, a fixed random choice of positions stands for all;
    where they are fewer than `FULL` per column, a ridge in proportion keeps them from looking exact. One
    pass serves all layers, and no layer's moments depend on which others are asked for.

    Args:
        names: plain `Conv2d` and `Linear` modules of `network`, which is left untouched.
        images: `(n, c, h, w)`; the first `IMAGES` are read.
        blocks: by name, layers too wide for moments of all columns: the first column, and the number and the size b of
            the blocks of columns from there on that are taken each for itself, `(number, b, b)`.

    Raises:
        ScoreError: a layer reads NaN or infinity, or nothing at all.
    """
    network = copy.deepcopy(network).eval()
    images = images[:IMAGES]
    layers = {name: network.get_submodule(name) for name in names}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, layer: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> None:
        if (given := only_input(inputs, named)) is None:
            return
        rows = input_rows(layer, given, len(images))
        if name in blocks:
            first, number, size = blocks[name]
            rows = rows[:, 0, first : first + number * size].reshape(-1, number, size)
        rows = (rows if rows.shape[-1] >= WIDE else rows.double()).transpose(0, 1)
        if name not in sums:
            sums[name] = rows.new_zeros(len(rows), rows.shape[-1], rows.shape[-1], dtype=torch.float64)
        _add_products(sums[name], rows)
        counts[name] += rows.shape[1]

    hooks = (layer.register_forward_pre_hook(partial(add, name), with_kwargs=True) for name, layer in layers.items())
    with hooked(hooks):
        for batch in torch.split(images, BATCH):
            network(batch.clone())
    for name in names:
        _check(name, sums.get(name))
    return {name: ridged(_mirrored(sums.pop(name)).div_(counts[name]), counts[name]) for name in names}


def products(rows: Tensor) -> Tensor:
    """The sum of x x' over `rows` `(groups, rows, n)`: float64 `(groups, n, n)`."""
    total = rows.new_zeros(len(rows), rows.shape[-1], rows.shape[-1], dtype=torch.float64)
    _add_products(total, rows)
    return _mirrored(total)


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add those of `rows` to the upper blocks of `total`; each pair of columns is multiplied once."""
    for start in range(0, total.shape[-1], SIDE):
        total[:, start : start + SIDE, start:] += rows[..., start : start + SIDE].mT @ rows[..., start:]


def _mirrored(total: Tensor) -> Tensor:
    """`total`, its lower blocks filled."""
    for start in range(SIDE, total.shape[-1], SIDE):
        total[:, start : start + SIDE, :start] = total[:, :start, start : start + SIDE].mT
    return total


def _check(name: str, product: Tensor | None) -> None:
    if product is None or not bool(torch.isfinite(product.diagonal(dim1=-2, dim2=-1)).all()):  # largest there
        found = "nothing" if product is None else "NaN or infinity"
        raise ScoreError(
            f"layer {name!r} reads {found} on the calibration images, expected finite numbers; "
            "check the images and the teacher, or protect the layer with `skip`"
        )


def ridged(second: Tensor, rows: int, least: float = RIDGE) -> Tensor:
    """`second` `(groups, n, n)` and the ridge that it needs, being a mean over so many rows."""
    columns = second.shape[-1]
    share = least + SHRINKAGE * max(0.0, columns / rows - 1 / FULL)
    found = second.clone()
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    diagonal += (share * diagonal.mean(-1, keepdim=True)).clamp(min=1e-30)
    return found


def input_rows(layer: nn.Module, inputs: Tensor, images: int, *, like: nn.Module | None = None) -> Tensor:
    """The rows of `inputs` that `layer` reads at its chosen positions: `(rows, groups, n)`.

    Args:
        images: their number in all; they share out the rows that are enough.
        like: the layer whose positions are taken, by default this one: one of more columns may read more of them.
    """
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(len(inputs), -1, layer.in_features)
        chosen = positions(like or layer, rows.shape[1], images).to(inputs.device)
        return rows[:, chosen].reshape(-1, 1, layer.in_features)
    height, width = numeric_padding(layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, (width, width, height, height), mode=mode)
    spans = zip(padded.shape[-2:], layer.dilation, layer.kernel_size, layer.stride, strict=True)
    sides = [(side - step * (size - 1) - 1) // stride + 1 for side, step, size, stride in spans]
    chosen = positions(like or layer, sides[0] * sides[1], images).to(inputs.device)
    down, right = (
        (start * stride)[:, None] + step * torch.arange(size, device=inputs.device)
        for start, stride, step, size in zip(
            (chosen // sides[1], chosen % sides[1]), layer.stride, layer.dilation, layer.kernel_size, strict=True
        )
    )
    patches = padded[:, :, down[:, :, None], right[:, None, :]].transpose(1, 2)
    return patches.reshape(len(inputs) * len(chosen), layer.groups, -1)


def output_rows(layer: nn.Module, outputs: Tensor, images: int) -> Tensor:
    """The outputs of `layer` at the positions of `input_rows`, less its bias: `(rows, groups, f / groups)`."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    if isinstance(layer, nn.Conv2d):
        rows, groups = outputs.flatten(2).transpose(1, 2), layer.groups
    else:
        rows, groups = outputs.reshape(len(outputs), -1, layer.out_features), 1
    if layer.bias is not None:
        rows = rows - layer.bias
    chosen = positions(layer, rows.shape[1], images).to(outputs.device)
    return rows[:, chosen].reshape(len(rows) * len(chosen), groups, -1)


def positions(layer: nn.Module, count: int, images: int) -> Tensor:
    """The positions, of an image's `count`, that are read, rising: the same for every image and in every run."""
    assert isinstance(layer.weight, Tensor)
    columns = layer.weight[0].numel()
    enough = max(min(ROWS, PLENTY * columns), ROWS_PER_COLUMN * columns)
    generator = np.random.default_rng(0)
    return torch.from_numpy(np.sort(generator.permutation(count)[: -(-enough // images)]))


def numeric_padding(layer: nn.Conv2d) -> tuple[int, int]:
    """The padding of each axis in pixels, also where it was given as 'same' (not uneven) or 'valid'."""
    if layer.padding == "same":
        height, width = (span // 2 for span in spans(layer))
        return height, width
    if layer.padding == "valid":
        return 0, 0
    assert not isinstance(layer.padding, str)
    return layer.padding[0], layer.padding[1]


def spans(layer: nn.Conv2d) -> list[int]:
    """The reach of the dilated kernel beyond one pixel, per axis, for which padding 'same' makes up."""
    return [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]

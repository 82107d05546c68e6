"""Fit a student's layers, in the order in which they run, to what the same layers of its teacher put out.

A layer of a cut network reads something else than its teacher's does: channels are gone, blocks are gone, and the
layers before it are not exact. The weight that best maps what it does read to what it should put out has a closed
form. Each layer is fitted to what those before it came to, so each makes good their loss, as far as it can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from methods.hooks import hooked, only_input
from methods.network.graph import shares_weights
from methods.network.reading import read_elsewhere
from methods.network.rows import Profile
from methods.refit.moments import IMAGES, input_rows, output_rows, products, ridged
from methods.refit.norms import Norms

PRIOR = 1e-2
"""The pull of a weight towards the one it had, in units of the mean second moment of what the layer reads."""

PIXELS = 1 << 22
"""The most pixels of the images that a student is fitted on, all at once."""

WIDEST = 1 << 13
"""Columns of a weight beyond which the normal equations cost more than they are worth: such a layer is left alone."""

LARGEST = 1e15
"""Numbers whose squares can still be added up; a layer that reads larger ones is left alone."""

Solve: TypeAlias = Callable[[nn.Module, Tensor, Tensor], None]
"""Puts a fitted weight into the layers that stand in the place of one, given them, the weight and `second_moments`."""


@torch.no_grad()
def refit(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    *,
    kept: Mapping[str, np.ndarray] = MappingProxyType({}),
    pairs: Mapping[str, Solve] = MappingProxyType({}),
) -> None:
    """Fit the layers of `student`, in place, to the outputs of the layers of the same names in `teacher`.

    With X the rows that a layer of the student reads, Y the outputs that it should have, W its weight before,
    C = X'X / n and P = `PRIOR` times the mean of C's diagonal, the weight becomes (Y'X/n + W P) (C + P)^-1: ridge
    regression held to W. A bias is fitted with it. Convolution groups are fitted each on its own. Where nothing was
    lost, nothing changes. The statistics of the batch norms follow in the same pass: each mean moves by as much, and
    each variance grows by the factor, that the student's maps differ from the teacher's on these images. So they stay
    those of the images that the teacher was trained on, of which these may be a poor sample.

    Left alone are layers that run more than once, share their weights or have them read elsewhere, are wider than
    `WIDEST`, are frozen, read NaN or what is beyond `LARGEST`, or are no plain `Conv2d` or `Linear`.

    Args:
        images: `(n, c, h, w)`; as many are used as `IMAGES` and `PIXELS` allow, and none if that is a single one.
        kept: by name, the teacher's outputs, rising, that a layer or a norm of the student still has, where it lost
            some.
        pairs: by name, how to fit what stands in the place of a layer.
    """
    images = images[: min(IMAGES, max(2, PIXELS // images[0, 0].numel()))]
    if len(images) < 2:
        return
    teacher = copy.deepcopy(teacher).eval()
    elsewhere = read_elsewhere(teacher, images)
    plain = [name for name in _plain(student, teacher) if name not in elsewhere]
    places = {name: teacher.get_submodule(name) for name in (*plain, *pairs)}
    targets: dict[str, list[Tensor]] = {name: [] for name in places}
    norms = Norms(student, teacher, kept)

    def keep(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        rows = output_rows(layer, outputs, len(images)).flatten(1)
        targets[name].append(rows[:, kept[name]] if name in kept else rows)

    def fit(name: str, layer: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> None:
        if len(targets[name]) == 1 and (given := only_input(inputs, named)) is not None:
            held = places[name] if name in pairs else layer
            rows, wanted = input_rows(held, given, len(images), like=places[name]), targets[name].pop()
            if max(float(rows.abs().max()), float(wanted.abs().max())) < LARGEST:  # and neither is NaN
                if name in pairs:
                    weight, second, _ = _fitted(held, rows, wanted, moves_bias=False)
                    pairs[name](layer, weight, second)
                else:
                    _put(layer, *_fitted(held, rows, wanted, moves_bias=layer.bias is not None))

    hooks = [layer.register_forward_hook(partial(keep, name)) for name, layer in places.items()]
    with hooked([*hooks, *norms.watched()]):
        teacher(images.clone())
    layers = [(name, student.get_submodule(name)) for name in places]
    fits = [layer.register_forward_pre_hook(partial(fit, name), with_kwargs=True) for name, layer in layers]
    with hooked([*fits, *norms.following()]):
        student.eval()(images.clone())


def too_wide(profile: Profile) -> tuple[str, ...]:
    """Return, as the note of a plan, which layers of a network are wider than `WIDEST`; nothing where none is."""
    wide = [layer.name for layer in profile.layers if prod(layer.weight_shape[1:]) > WIDEST]
    return (f"too wide to be refit: {', '.join(wide)}",) if wide else ()


def _plain(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The names of the layers that both have and that can be fitted."""
    kinds = {name: type(module) for name, module in teacher.named_modules()}
    layers = [(name, layer) for name, layer in student.named_modules() if type(layer) in (nn.Conv2d, nn.Linear)]
    return [name for name, layer in layers if kinds.get(name) is type(layer) and _is_free(layer, student)]


def _is_free(layer: nn.Module, model: nn.Module) -> bool:
    """Whether the weight of a layer is its own, may be changed, and is narrow enough."""
    weight = layer._parameters.get("weight")
    if weight is None or not weight.requires_grad or weight[0].numel() > WIDEST:
        return False
    return not shares_weights(model, layer, by_name=True)


def _put(layer: nn.Module, weight: Tensor, _: Tensor, shift: Tensor) -> None:
    assert isinstance(layer.weight, Tensor)
    layer.weight.copy_(weight)
    if isinstance(layer.bias, Tensor):
        layer.bias.add_(shift.to(layer.bias))


def _fitted(layer: nn.Module, rows: Tensor, wanted: Tensor, *, moves_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The weight that takes `rows` `(rows, groups, n)` closest to `wanted` `(rows, f)`, held to the layer's own.

    Also the ridged second moments of the rows `(groups, n, n)`, and what is to be added to the bias `(f,)`: nothing
    unless it may be moved, and then the weight makes up for the mean as well.
    """
    assert isinstance(layer.weight, Tensor)
    rows = rows.transpose(0, 1)
    groups, count, columns = rows.shape
    held = layer.weight.to(rows.dtype).reshape(groups, -1, columns)
    missed = wanted.reshape(count, groups, -1).transpose(0, 1) - rows @ held.mT
    shift = missed.new_zeros(groups, 1, missed.shape[-1])
    if moves_bias:
        read, shift = rows.mean(1, keepdim=True), missed.mean(1, keepdim=True)
        rows, missed = rows - read, missed - shift
    second = ridged(products(rows).div_(count), count, least=PRIOR)
    cross = (rows.mT @ missed).double() / count
    change = torch.cholesky_solve(cross, torch.linalg.cholesky(second)).mT
    if moves_bias:
        shift = shift - read @ change.mT.to(read)
    return (held + change).reshape(layer.weight.shape), second, shift.flatten()

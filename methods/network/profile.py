"""One row per layer: the costs of a network and the channels that must go together.

The profile is plain data (names and integers), so a plan can be computed, checked and shown without the network.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from methods.base import Tell, Unsupported, untold
from methods.hooks import hooked, only_input
from methods.network.counting import count_macs, count_params, fastpath_off
from methods.network.coupling import find_groups
from methods.network.keeping import kept
from methods.network.proof import proved
from methods.network.reading import read_elsewhere
from methods.network.rows import Layer, Profile


def profile(model: nn.Module, example: Tensor, tell: Tell = untold) -> Profile:
    """Profile `model` (left untouched) on `example`, `(n, c, h, w)` with n >= 1; `tell` hears how far it is.

    Raises:
        Unsupported: the model has no convolution or linear layer, or its output is no tensor `(n, ...)`.
    """
    model = copy.deepcopy(model).eval()
    calls, blocks = _trace(model, example[:1])
    if not calls:
        raise Unsupported("the network runs no Conv2d and no Linear layer, so there is nothing to compress")
    protected = kept(model)
    elsewhere = read_elsewhere(model, example) | protected
    held = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    groups = find_groups(model, example, elsewhere, tell)
    group_of = {m.module: group.name for group in groups for m in group.members if m.axis == "out"}
    layers = tuple(
        replace(
            _row(name, module, calls[name]),
            group=group_of.get(name),
            block=_innermost(name, blocks),
            whole=protected.get(name) or _own_weight(module, held) or elsewhere.get(name),
        )
        for name, module in model.named_modules()
        if name in calls
    )
    found = Profile(layers, groups, count_macs(model, example), count_params(model), tuple(example.shape[1:]))
    return replace(found, groups=proved(model, found, example, tell))


_Call: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def _trace(model: nn.Module, example: Tensor) -> tuple[dict[str, list[_Call]], list[str]]:
    """Return the shapes of every call of a conv or linear, and the names of modules that keep their input's shape."""
    calls: dict[str, list[_Call]] = {}
    blocks: list[str] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[object, ...], Mapping[str, object], object], None]:
        def record(module: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object], output: object) -> None:
            given = only_input(inputs, named)
            if given is None or not isinstance(output, Tensor):
                return
            if isinstance(module, nn.Conv2d | nn.Linear):
                calls.setdefault(name, []).append((tuple(given.shape), tuple(output.shape)))
            elif any(True for _ in module.children()) and inputs and given.shape == output.shape:
                blocks.append(name)

        return record

    hooks = (
        module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in model.named_modules() if name
    )
    with hooked(hooks), fastpath_off(), torch.no_grad():
        output = model(example.clone())
    if not isinstance(output, Tensor) or output.shape[:1] != example.shape[:1]:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise Unsupported(f"the network must return a tensor with a row for each image, but it returned {shape}")
    return calls, blocks


def _row(name: str, module: nn.Module, calls: list[_Call]) -> Layer:
    """Write the row of a layer that ran on one input, `calls` being the shapes that it read and wrote."""
    source, target = calls[0]
    weight = module.weight
    assert isinstance(weight, Tensor)
    is_conv = isinstance(module, nn.Conv2d)
    positions = [math.prod(out) // weight.shape[0] for _, out in calls]
    return Layer(
        name=name,
        kind="conv" if is_conv else "linear",
        weight_shape=tuple(weight.shape),
        groups=module.groups if isinstance(module, nn.Conv2d) else 1,
        macs=sum(positions) * weight.numel(),
        params=weight.numel() + (module.bias.numel() if isinstance(module.bias, Tensor) else 0),
        calls=len(calls),
        in_hw=(source[-2], source[-1]) if is_conv else (_rows(source), 1),
        out_hw=(target[-2], target[-1]) if is_conv else (_rows(target), 1),
        group=None,
        block=None,
    )


def _rows(shape: tuple[int, ...]) -> int:
    """Count the rows a linear layer sees for one input: the product of all axes but the features."""
    return math.prod(shape[:-1])


def _innermost(name: str, blocks: list[str]) -> str | None:
    return max((block for block in blocks if name.startswith(f"{block}.")), key=len, default=None)


def _own_weight(module: nn.Module, held: Mapping[int, int]) -> str | None:
    """Say why the weight of a layer is not simply its own; `held` counts by id the modules that hold a parameter."""
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"it is a {type(module).__name__}, a subclass that may compute something else"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    return "it shares a parameter with another layer" if any(held[id(one)] > 1 for one in module.parameters()) else None

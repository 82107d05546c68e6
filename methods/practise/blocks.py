"""The blocks that a network can do without: find them, and take them out.

A block is removable if its input is added to its branch: without the branch, the input passes on unchanged.
No list of architectures is kept: two independent rules, one on the block's graph and one on numbers, must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from methods.hooks import hooked
from methods.network.graph import (
    UNTRACEABLE,
    graph_of,
    has_weights,
    is_addition,
    passes_on,
    replace,
    replaced,
    shares_weights,
)
from methods.network.keeping import KEPT, kept

CLOSINGS: Mapping[str, Callable[[], nn.Module]] = {"identity": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}
"""The modules that may take a block's place: the identity, or the activation that the block ends in."""

_TOLERANCE = 1e-5
"""Relative to the largest value."""


@dataclass(frozen=True)
class Blocks:
    """By name and in the network's order: the blocks that can go, with their replacement (a key of `CLOSINGS`).

    `rejected` holds every other module with weights and children, and the reason why it has to stay.
    """

    removable: Mapping[str, str]
    rejected: Mapping[str, str]


@torch.no_grad()
def find_blocks(model: nn.Module, example: Tensor) -> Blocks:
    """The removable blocks of `model` (left untouched) on real images `example` `(n, c, h, w)`, n >= 1.

    Such a block runs once, maps one tensor to one of the same shape, shares no weight with the rest, holds no module
    that is to be kept, and passes two rules. Graph: a path from its input to its output holds an addition, and else
    nothing but activations, dropout and children without weights. Numbers: with zeros from every child that has
    weights, it returns its input. A block whose forward cannot be traced is judged by the numbers alone. Of nested
    blocks, the innermost count.

    A block that ends in an activation is replaced by the identity where its input already has that activation's range,
    as behind another such block, and by the activation elsewhere.

    Source: PRACTISE (arXiv 2202.07861) drops blocks that keep the shape of their input.
    Differs: the authors' code lists the blocks of two families and spares the first of every stage. The numbers are
    needed beside the graph because a child without weights may still change its input, the graph because a product
    with a squeezed map can look like an identity.
    """
    model = copy.deepcopy(model).eval()
    verdicts = {
        name: _verdict(model, model.get_submodule(name), calls) for name, calls in _observe(model, example).items()
    }
    removable = {name: found for name, (found, _) in verdicts.items() if found is not None}
    rejected = {name: reason for name, (found, reason) in verdicts.items() if found is None}
    for name in [name for name in removable if any(other.startswith(f"{name}.") for other in removable)]:
        del removable[name]
        rejected[name] = "a removable block lies inside it"
    for name in list(removable):
        if reason := _misses(model, {name: removable[name]}, example):
            del removable[name]
            rejected[name] = reason
    return Blocks(removable, rejected)


def _misses(model: nn.Module, blocks: Mapping[str, str], example: Tensor) -> str | None:
    """Say why the network does not run without `blocks`: it may read more of them than their output."""
    try:
        with replaced(model, closings(blocks)):
            model(example.clone())
    except UNTRACEABLE as error:
        return f"the network does not run without it: {type(error).__name__}: {error}"
    return None


def removable_blocks(model: nn.Module, example: Tensor) -> list[str]:
    """The names of the blocks that can be dropped from `model`, in its order; see `find_blocks`.

    >>> class Residual(nn.Sequential):
    ...     def forward(self, x):
    ...         return x + super().forward(x)
    >>> network = nn.Sequential(Residual(nn.Linear(4, 4)), nn.Linear(4, 4), Residual(nn.Linear(4, 4), nn.ReLU()))
    >>> removable_blocks(network, torch.ones(2, 4))
    ['0', '2']
    """
    return list(find_blocks(model, example).removable)


def drop(model: nn.Module, blocks: Mapping[str, str]) -> None:
    """Replace each of `blocks`, named as in `Blocks.removable`, in place; every other module keeps its name.

    The replacements are torch's own modules, so a student needs none of this project's code.

    Raises:
        ValueError: the model has no module of that name.
    """
    for name, module in closings(blocks).items():
        replace(model, name, module)


def closings(blocks: Mapping[str, str]) -> dict[str, nn.Module]:
    """Build the modules that take the place of `blocks`, named as in `Blocks.removable`."""
    return {name: CLOSINGS[closing]() for name, closing in blocks.items()}


_Verdict: TypeAlias = tuple[str | None, str]
"""The block's replacement and an empty text, or None and the reason why the block has to stay."""

_Calls: TypeAlias = list[Tensor | str]
"""Per call of a module its input, or the reason why that call rules the module out."""


def _observe(model: nn.Module, example: Tensor) -> dict[str, _Calls]:
    """The calls of every module that holds weights and children, in the order of their first end."""
    calls: dict[str, _Calls] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, inputs: tuple[object, ...], named: dict[str, object], output: object) -> None:
            calls.setdefault(name, []).append(_call(inputs, named, output))

        return record

    hooks = (
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name and any(True for _ in module.children()) and has_weights(module)
    )
    with hooked(hooks):
        model(example.clone())
    return calls


def _call(inputs: tuple[object, ...], named: Mapping[str, object], output: object) -> Tensor | str:
    if len(inputs) != 1 or named or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        return "it does not map one tensor to one tensor"
    if inputs[0].shape != output.shape:
        return f"it turns shape {tuple(inputs[0].shape[1:])} into {tuple(output.shape[1:])}"
    if (inputs[0].dtype, inputs[0].device) != (output.dtype, output.device):
        return "it changes the type or the device of its input"
    return inputs[0].clone()


def _verdict(model: nn.Module, module: nn.Module, calls: _Calls) -> _Verdict:
    for name in kept(module):
        return None, f"{name} in it is {KEPT}" if name else f"it is {KEPT}"
    given = calls[0]
    if isinstance(given, str):
        return None, given
    if len(calls) > 1:
        return None, f"it runs {len(calls)} times"
    if shares_weights(model, module, by_name=True):
        return None, "its weights are known by other names too"
    if _adds_its_input(module) is False:
        return None, "it does not add its input to what it computes"
    noise = torch.rand(given.shape, generator=torch.Generator().manual_seed(0)).to(given) * 0.8 + 0.1
    if not _is_close(_without_branches(module, noise), noise):
        return None, "without its weights it does not pass its input on"
    left = _without_branches(module, given)
    for closing, build in CLOSINGS.items():
        if _is_close(build()(given), left):
            return closing, ""
    return None, f"it ends in an activation that is none of {', '.join(CLOSINGS)}"


def _is_close(one: object, other: object) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())


def _without_branches(module: nn.Module, given: Tensor) -> object:
    """Run the block while every module in it that has weights returns zeros."""

    def silence(_: nn.Module, __: object, output: object) -> object:
        if isinstance(output, tuple):
            return tuple(torch.zeros_like(part) if isinstance(part, Tensor) else part for part in output)
        return torch.zeros_like(output) if isinstance(output, Tensor) else output

    inner = [child for child in module.modules() if child is not module and has_weights(child)]
    with hooked(child.register_forward_hook(silence) for child in inner):
        return module(given.clone())


class _Outline(fx.Tracer):
    """A tracer of one module's own forward, which does not look into its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _adds_its_input(module: nn.Module) -> bool | None:
    """Whether the input reaches the output over additions and weightless children alone; None if untraceable."""
    try:
        graph = graph_of(module, _Outline())
    except UNTRACEABLE:
        return None
    source, *_ = graph.nodes
    is_added = {source: False}
    for node in graph.nodes:
        reached = [is_added[before] for before in node.all_input_nodes if before in is_added]
        if reached and (node.op == "output" or _is_transparent(node, module)):
            is_added[node] = any(reached) or is_addition(node)
    return is_added.get(node, False)


def _is_transparent(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return not has_weights(module.get_submodule(str(node.target)))
    return passes_on(node)

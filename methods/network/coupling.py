"""The channels of a network that must go together: torch-pruning's dependency graph, as far as our cut can slice it.

The graph is guessed from a trace, so `methods.network.proof` tries its groups by really cutting them.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch_pruning import DependencyGraph

from methods.base import Tell, untold
from methods.network.cut import PER_CHANNEL, axis_length
from methods.network.groups import ChannelGroup, Member

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of torch-pruning's tracer, or of a network whose channels were cut wrongly."""


def find_groups(
    model: nn.Module,
    example: Tensor,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
    tell: Tell = untold,
) -> tuple[ChannelGroup, ...]:
    """Find the channel groups of `model` (left untouched), in the order of the layers they are named after.

    Every convolution and linear layer that the network's output depends on produces one group, with a reason in
    `fixed` where its channels cannot be cut. The channels of the network's input are in none. `example` is
    `(n, c, h, w)`; one input of it is used. `elsewhere` says by name why modules must keep their parameters.
    `tell` hears how far torch-pruning is.

    Source: torch-pruning's dependency graph (DepGraph: Fang et al., CVPR 2023).
    Differs: a grouped convolution couples its inputs to its outputs and loses whole convolution groups.
    """
    model = copy.deepcopy(model).eval()
    drafts = _drafts(model, example[:1], tell)
    for draft in drafts:
        for member in draft.members:
            if reason := elsewhere.get(member.module):
                draft.fix(f"{member.module} cannot be cut: {reason}")
    return tuple(draft.finish() for draft in drafts)


@dataclass
class _Draft:
    """A group while it is put together; `places` are the `(module, axis, entry)` that torch-pruning ties to it."""

    name: str
    width: int
    members: list[Member] = field(default_factory=list)
    places: list[tuple[str, str, int]] = field(default_factory=list)
    multiple: int = 1
    fixed: str | None = None

    def fix(self, reason: str) -> None:
        """Fix the group; the first reason stays."""
        self.fixed = self.fixed or reason

    def finish(self) -> ChannelGroup:
        """Return the group, fixed if no smaller width exists or no layer reads it."""
        if not any(member.axis == "in" for member in self.members):
            self.fix("only the network's output reads its channels")
        if self.width % self.multiple:
            self.fix(f"its {self.width} channels are no whole number of runs of {self.multiple}")
        if self.width == self.multiple:
            self.fix("its channels cannot be divided")
        return ChannelGroup(self.name, self.width, tuple(self.members), self.multiple, self.fixed)


def _drafts(model: nn.Module, example: Tensor, tell: Tell) -> list[_Draft]:
    """Draft one group per set of channels, in the order of its first producing layer."""
    traced = _with_depthwise(model)
    names = {module: name for name, module in traced.named_modules()}
    graph = _Bounded(tell)
    try:
        _trace(graph, traced, example)
    except FAILURES as error:
        behind = f" behind {names[graph.latest]}" if graph.latest in names else ""
        reason = f"torch-pruning cannot follow the channels{behind} ({_fault(error)})"
        return [_Draft(name, m.weight.shape[0], fixed=reason) for m, name in names.items() if _is_producer(m)]
    owners: dict[tuple[str, str, int], _Draft] = {}
    drafts = []
    for root, name in names.items():
        if root not in graph.module2node or not _is_producer(root) or (name, "out", 0) in owners:
            continue
        draft = _Draft(name, root.weight.shape[0])
        for module, axis, index in _reach(graph, root, draft):
            if isinstance(module, nn.Parameter):
                draft.fix("its channels meet a parameter of no layer that can be cut")
            elif module in names:
                _join(draft, names[module], model.get_submodule(names[module]), axis, index)
        for place in draft.places:
            owner = owners.setdefault(place, draft)
            if owner is not draft:
                draft.fix(f"it shares some of its channels with {owner.name}, but not all")
                owner.fix(f"it shares some of its channels with {draft.name}, but not all")
        drafts.append(draft)
    _fix_shared_parameters(drafts, model)
    return drafts


def _trace(graph: _Bounded, model: nn.Module, example: Tensor) -> None:
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(model, (example.clone(),), verbose=False)


def _fault(error: Exception) -> str:
    """Say what ended torch-pruning's walk."""
    if isinstance(error, ZeroDivisionError):
        return "it counts 0 of them at a step that takes maps apart or shuffles channels"
    return f"{type(error).__name__}: {error}"


MOST_STEPS = 2_000_000
"""Looks at a node while torch-pruning infers channels, some 20 seconds; a DenseNet-121 needs 800, a Swin-T 114,000."""

STEPS_TOLD = 20_000
"""Steps between two words of progress, less than a second apart."""


class _Bounded(DependencyGraph):  # type: ignore[misc]  # it has no types
    """torch-pruning's graph, which walks all ways between two layers: where those multiply it does not end.

    `latest` is the layer that was looked at last; `tell` hears of the steps now and then.
    """

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.steps = 0
        self.latest: Any = None
        self._tell = tell

    def get_out_channels(self, module_or_node: Any) -> Any:
        self._count(module_or_node)
        return super().get_out_channels(module_or_node)

    def get_in_channels(self, module_or_node: Any) -> Any:
        self._count(module_or_node)
        return super().get_in_channels(module_or_node)

    def _count(self, node: Any) -> None:
        self.steps += 1
        module = getattr(node, "module", node)
        self.latest = module if _is_layer(module) else self.latest
        if self.steps % STEPS_TOLD == 0:
            self._tell(self.steps, MOST_STEPS, "steps along the channels, at most")
        if self.steps > MOST_STEPS:
            raise RuntimeError("the ways between its layers multiply")


def _with_depthwise(model: nn.Module) -> nn.Module:
    """Build a trainable copy in which grouped convolutions that keep the number of channels are depthwise.

    The shapes of all maps stay; torch-pruning, which ties input to output only in depthwise convolutions, now does so
    in these as well. It needs gradients to see a layer at all.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.in_channels == module.out_channels:
            module.groups = module.in_channels
            module.weight = nn.Parameter(module.weight[:, :1].detach())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


_PRODUCERS = (nn.Conv2d, nn.Linear)


def _is_layer(module: object) -> bool:
    return isinstance(module, (*_PRODUCERS, *PER_CHANNEL))


def _is_producer(module: nn.Module) -> bool:
    """Whether the outputs of `module` are channels of their own; those of a depthwise convolution are its inputs'."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 or module.groups != module.out_channels
    return isinstance(module, nn.Linear)


def _fix_shared_parameters(drafts: Sequence[_Draft], model: nn.Module) -> None:
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)
    shared = {name for names in holders.values() if len(names) > 1 for name in names}
    for draft in drafts:
        for member in draft.members:
            if member.module in shared:
                draft.fix(f"{member.module} shares a parameter with another layer")


_Axis: TypeAlias = Literal["out", "in"]


class _Index(NamedTuple):
    """An entry of an axis and the channel of the group it belongs to, under the names that torch-pruning reads."""

    idx: int
    root_idx: int


def _reach(graph: Any, root: nn.Module, draft: _Draft) -> Iterator[tuple[Any, _Axis, list[_Index]]]:
    """Yield all that goes with the outputs of `root`: module, axis, entries of that axis.

    Differs: torch-pruning follows every index set that reaches an axis, which grows without bound in windowed
    attention. Here the first one stays, and another one fixes the group: its channels are not one run. So does one
    with more entries than the longest axis of the network, as where two maps are multiplied.
    """
    longest = max(max(module.weight.shape[:2]) for module in graph.module2node if isinstance(module, _PRODUCERS))
    handler = graph.get_pruner_of_module(root).prune_out_channels
    stack = [(graph.module2node[root], handler, [_Index(channel, channel) for channel in range(draft.width)])]
    seen: dict[tuple[Any, Any], list[_Index]] = {}
    while stack:
        node, handler, index = stack.pop()
        if (node, handler) in seen:
            if seen[node, handler] != index:
                draft.fix("its channels are reordered or repeated on the way")
            continue
        seen[node, handler] = index
        yield node.module, "out" if graph.is_out_channel_pruning_fn(handler) else "in", index
        for dependency in node.dependencies:
            if dependency.is_triggered_by(handler):
                target = _mapped(index, dependency.index_mapping, longest)
                if target is None:
                    draft.fix("its channels are repeated more often than any layer reads")
                elif target:
                    stack.append((dependency.target, dependency.handler, sorted(set(target))))


def _mapped(index: list[_Index], mappings: Sequence[Any], longest: int) -> list[_Index] | None:
    """Apply mappings to the entries of an axis; None if there are more than `longest` of them then."""
    for mapping in filter(None, mappings):
        is_repeating = not getattr(mapping, "reverse", True)
        if len(index) * (getattr(mapping, "_stride", 1) if is_repeating else 1) > longest:
            return None
        index = mapping(index)
    return index


def _join(draft: _Draft, name: str, module: nn.Module, axis: _Axis, index: list[_Index]) -> None:
    """Add one axis of one module to the draft, or fix the draft where the cut could not slice it."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return
    draft.places += [(name, axis, entry) for entry, _ in index]
    is_norm = isinstance(module, PER_CHANNEL)
    if not is_norm and not (isinstance(module, nn.Conv2d | nn.Linear) and "weight" in module._parameters):
        draft.fix(f"{name} is a {type(module).__name__}, which cannot lose channels one by one")
        return
    segment = _segment(index, draft.width)
    if segment is None:
        draft.fix(f"its channels are not one run of entries in {name}")
        return
    start, columns = segment
    length = axis_length(module, axis)
    params = sum(p.numel() for p in module.parameters(recurse=False)) // length if is_norm else 0
    draft.members.append(Member(name, "norm" if is_norm else axis, start, columns, params))
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        _join_grouped(draft, name, module, start, columns)
    elif axis == "out" and not is_norm and (start, columns, draft.width) != (0, 1, length):
        draft.fix(f"its channels are only a part of what {name} produces")


def _join_grouped(draft: _Draft, name: str, conv: nn.Conv2d, start: int, columns: int) -> None:
    run = conv.in_channels // conv.groups
    draft.multiple = math.lcm(draft.multiple, run)
    if conv.in_channels != conv.out_channels or columns != 1 or start % run:
        draft.fix(f"the convolution groups of {name} do not line up with its channels")


def _segment(index: list[_Index], width: int) -> tuple[int, int] | None:
    """Return `(start, columns)` if channel c owns `columns` entries from `start + c * columns` on."""
    start, columns = index[0].idx, len(index) // width
    run = [(start + entry, entry // columns) for entry in range(width * columns)]
    return (start, columns) if index == run else None

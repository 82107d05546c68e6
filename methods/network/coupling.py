"""The channels of a network that must go together: torch-pruning's dependency graph, as far as our cut can slice it.

The graph is guessed from a trace, so `methods.network.proof` tries its groups by really cutting them.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch_pruning import DependencyGraph, ops
from torch_pruning.dependency import index_mapping

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
        reached, channels = _reach(graph, root, draft)
        draft.width = max(channels) + 1
        for (node, handler), outputs in reached.items():
            if isinstance(node.module, nn.Parameter):
                draft.fix("its channels meet a parameter of no layer that can be cut")
            elif node.module in names:
                member = names[node.module]
                entries = {entry: channels[output] for entry, output in outputs.items()}
                _join(draft, member, model.get_submodule(member), _axis(graph, handler), entries)
        for place in draft.places:
            owner = owners.setdefault(place, draft)
            if owner is not draft:
                draft.fix(f"it shares some of its channels with {owner.name}, but not all")
                owner.fix(f"it shares some of its channels with {draft.name}, but not all")
        drafts.append(draft)
    _fix_shared_parameters(drafts, model)
    return drafts


def _trace(graph: _Bounded, model: nn.Module, example: Tensor) -> None:
    """Have torch-pruning read `model`; steps of it at which it cannot say where entries go end up in `graph.lost`."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(model, (example.clone(),), verbose=False)
        except ZeroDivisionError:  # one step stopped it, and those behind that were not looked at
            for node in graph.module2node.values():
                try:
                    if node.type in _MAPPINGS:
                        _MAPPINGS[node.type](graph, node)
                except ZeroDivisionError as error:
                    graph.lost[node] = _fault(error)


_MAPPINGS: dict[Any, Any] = {
    ops.OPTYPE.CONCAT: index_mapping.update_concat_index_mapping,
    ops.OPTYPE.SPLIT: index_mapping.update_split_index_mapping,
    ops.OPTYPE.RESHAPE: index_mapping.update_reshape_index_mapping,
    ops.OPTYPE.UNBIND: index_mapping.update_unbind_index_mapping,
    ops.OPTYPE.EXPAND: index_mapping.update_expand_index_mapping,
    ops.OPTYPE.SLICE: index_mapping.update_slice_index_mapping,
}
"""By kind of step, how torch-pruning finds where its entries go."""


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

    `latest` is the layer that was looked at last, `lost` the steps that it cannot follow, with why; `tell` hears of the
    steps now and then.
    """

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.steps = 0
        self.latest: Any = None
        self.lost: dict[Any, str] = {}
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


MOST_WAYS = 8
"""Times that outputs of a layer may come to new entries of one axis; beyond, their group is fixed."""


class _Index(NamedTuple):
    """An entry of an axis and the output of the root it goes with, under the names that torch-pruning reads."""

    idx: int
    root_idx: int


def _reach(graph: Any, root: nn.Module, draft: _Draft) -> tuple[dict[tuple[Any, Any], dict[int, int]], list[int]]:
    """Find all that goes with the outputs of `root`: by node and handler, an output for each entry of that axis.

    Also the channel of every output: outputs that come to the same entry are one channel, as where a map is joined with
    what a depthwise layer makes of it.

    Differs: torch-pruning follows every index set that reaches an axis, which grows without bound in windowed
    attention. Here one is followed while it brings new entries, `MOST_WAYS` times at most: more fix the group. So does
    one with more entries than the longest axis of the network, as where two maps are multiplied.
    """
    longest = max(max(module.weight.shape[:2]) for module in graph.module2node if isinstance(module, _PRODUCERS))
    handler = graph.get_pruner_of_module(root).prune_out_channels
    stack = [(graph.module2node[root], handler, [_Index(output, output) for output in range(draft.width)])]
    reached: dict[tuple[Any, Any], dict[int, int]] = {}
    ways: Counter[tuple[Any, Any]] = Counter()
    first = list(range(draft.width))
    while stack:
        node, handler, index = stack.pop()
        entries = reached.setdefault((node, handler), {})
        before = len(entries)
        for entry, output in index:
            _unite(first, entries.setdefault(entry, output), output)
        if len(entries) == before:
            continue
        ways[node, handler] += 1
        if ways[node, handler] > MOST_WAYS:
            draft.fix("its channels are reordered or repeated on the way")
            continue
        if node in graph.lost:
            draft.fix(f"torch-pruning cannot follow its channels ({graph.lost[node]})")
        for dependency in node.dependencies:
            if dependency.is_triggered_by(handler):
                target = _mapped(index, dependency.index_mapping, longest, draft)
                stack += [(dependency.target, dependency.handler, sorted(set(target)))] if target else []
    numbers = {one: number for number, one in enumerate(sorted({_first(first, output) for output in first}))}
    return reached, [numbers[_first(first, output)] for output in range(draft.width)]


def _axis(graph: Any, handler: Any) -> _Axis:
    return "out" if graph.is_out_channel_pruning_fn(handler) else "in"


def _first(first: list[int], output: int) -> int:
    """Return the first output of the channel that `output` belongs to."""
    while first[output] != output:
        output = first[output]
    return output


def _unite(first: list[int], one: int, other: int) -> None:
    """Make one channel of those of two outputs."""
    low, high = sorted((_first(first, one), _first(first, other)))
    first[high] = low


def _mapped(index: list[_Index], mappings: Sequence[Any], longest: int, draft: _Draft) -> list[_Index]:
    """Apply mappings to the entries of an axis; fix the draft and return none where they cannot be followed."""
    for mapping in filter(None, mappings):
        is_repeating = not getattr(mapping, "reverse", True)
        if len(index) * (getattr(mapping, "_stride", 1) if is_repeating else 1) > longest:
            draft.fix("its channels are repeated more often than any layer reads")
            return []
        try:
            index = [_Index(int(entry), int(output)) for entry, output in mapping(index)]
        except (LookupError, TypeError):  # the output is None where heads of attention share keys
            draft.fix("torch-pruning cannot follow its channels (they reach a part of a map that it does not know)")
            return []
    return index


def _join(draft: _Draft, name: str, module: nn.Module, axis: _Axis, entries: Mapping[int, int]) -> None:
    """Add one axis of one module, the channels by its entries, or fix the draft where the cut could not slice it."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return
    draft.places += [(name, axis, entry) for entry in entries]
    is_norm = isinstance(module, PER_CHANNEL)
    if not is_norm and not (isinstance(module, nn.Conv2d | nn.Linear) and "weight" in module._parameters):
        draft.fix(f"{name} is a {type(module).__name__}, which cannot lose channels one by one")
        return
    length = axis_length(module, axis)
    runs = _runs(entries, draft.width)
    if not runs or min(entries) < 0 or max(entries) >= length:
        draft.fix(f"its channels are no whole runs of entries in {name}")
        return
    params = sum(p.numel() for p in module.parameters(recurse=False)) // length if is_norm else 0
    draft.members += [Member(name, "norm" if is_norm else axis, start, columns, params) for start, columns in runs]
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        for start, columns in runs:
            _join_grouped(draft, name, module, start, columns)
    elif axis == "out" and not is_norm and (len(entries) < length or any(columns > 1 for _, columns in runs)):
        draft.fix(f"its channels are only a part of what {name} produces")


def _join_grouped(draft: _Draft, name: str, conv: nn.Conv2d, start: int, columns: int) -> None:
    run = conv.in_channels // conv.groups
    draft.multiple = math.lcm(draft.multiple, run)
    if conv.in_channels != conv.out_channels or columns != 1 or start % run:
        draft.fix(f"the convolution groups of {name} do not line up with its channels")


def _runs(entries: Mapping[int, int], width: int) -> list[tuple[int, int]]:
    """Split an axis into runs `(start, columns)`, in which channel c owns entries from `start + c * columns` on.

    Each has all `width` channels; there are none where entries are left over.

    >>> _runs({0: 0, 1: 1, 4: 0, 5: 0, 6: 1, 7: 1}, 2), _runs({0: 1, 1: 0}, 2)
    ([(0, 1), (4, 2)], [])
    """
    found, left = [], sorted(entries)
    while left:
        start, columns = left[0], 0
        while entries.get(start + columns) == 0:
            columns += 1
        run = range(start, start + width * columns)
        if not columns or any(entries.get(entry) != (entry - start) // columns for entry in run):
            return []
        found.append((start, columns))
        left = left[len(run) :]
    return found

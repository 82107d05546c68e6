"""Channel groups of whole heads of attention, drafted for a trial cut.

The channels of queries, keys and values are cut by the head: code takes them apart by a number of heads that the module
keeps. So a head is one channel, which owns its rows and columns in the layers, and the numbers shrink with the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, takewhile

from torch import nn

from methods.network.groups import ChannelGroup, Member
from methods.network.rows import Profile

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
"""The names under which modules keep the number of their heads."""


def counted_heads(model: nn.Module, group: ChannelGroup, found: Profile) -> str | None:
    """Return the dotted name of the number of heads that the group's channels may be divided by; None if there is none.

    It is kept by the innermost module around all layers of the group, which must be plain ones whose weights are their
    own. One head cannot be divided.
    """
    layers = {member.module for member in group.members if member.axis in ("in", "out")}
    plain = {layer.name for layer in found.layers if not layer.whole}
    if not layers <= plain or not {"in", "out"} <= {member.axis for member in group.members}:
        return None
    parents = zip(*(name.split(".")[:-1] for name in layers), strict=False)
    around = ".".join(parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, parents))
    for name, value in _numbers(model.get_submodule(around)).items():
        if name in HEADS and value > 1 and group.width % value == 0:
            return f"{around}.{name}".lstrip(".")
    return None


def drafts(
    model: nn.Module, group: ChannelGroup, heads: str, found: Profile, macs: Mapping[str, int]
) -> Iterator[ChannelGroup]:
    """Yield groups of whole heads that may stand in the place of `group`, for a trial cut to tell the right one.

    They differ in the numbers that shrink with the `heads`: of those equal to the width of all heads, some may be the
    width of the module's input. `macs` are counted by module; those of no layer are taken for products of heads.
    """
    around, _, name = heads.rpartition(".")
    module = model.get_submodule(around)
    count = _numbers(module)[name]
    columns = group.width // count
    inside = f"{around}.".lstrip(".")
    products = macs[around] - sum(layer.macs for layer in found.layers if layer.name.startswith(inside))
    members = [replace(one, columns=one.columns * columns) for one in group.members]
    members += [Member(heads, "count", 0, 1, macs=products // count), *_tables(module, inside, count)]
    same = [other for other, value in _numbers(module).items() if value == group.width and other != name]
    for chosen in _subsets(same):
        counts = [Member(inside + other, "count", 0, columns) for other in chosen]
        yield ChannelGroup(group.name, count, (*members, *counts))


def _numbers(module: nn.Module) -> dict[str, int]:
    """The integers that a module keeps, by name."""
    return {name: value for name, value in vars(module).items() if type(value) is int}


def _tables(module: nn.Module, inside: str, heads: int) -> Iterator[Member]:
    """Yield the parameters and buffers that a module holds itself and that have one axis with an entry per head."""
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, tensor in held:
        if tuple(tensor.shape).count(heads) == 1:
            params = tensor.numel() // heads if isinstance(tensor, nn.Parameter) else 0
            yield Member(inside + name, tensor.shape.index(heads), 0, 1, params)


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield every choice of `names`, the smallest first."""
    for size in range(len(names) + 1):
        yield from combinations(names, size)

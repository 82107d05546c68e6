"""The legal widths of coupled channel groups, and their exact cost.

`methods.network.coupling` finds the groups of a network and `methods.network.cut` cuts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from methods.base import Budget, Infeasible, grid_step
from methods.network.groups import Axis, ChannelGroup, Member
from methods.network.reach import out_of_reach
from methods.network.rows import Profile


@dataclass(frozen=True)
class WidthCost:
    """Exact integer cost of widths `w` (G,): `constant + linear @ w + w @ pairs @ w`, with `pairs` upper triangular."""

    constant: int
    linear: np.ndarray
    pairs: np.ndarray

    def __call__(self, widths: np.ndarray) -> int:
        """Return the cost at integer `widths` (G,)."""
        return self.constant + int(self.linear @ widths) + int(widths @ self.pairs @ widths)


def levels(group: ChannelGroup, channels: int) -> list[int]:
    """List the legal widths of `group` in rising order for a device that prefers multiples of `channels`.

    They are the multiples of one step, from one step on, and the full width. A step is `grid_step`, raised until
    `group.multiple` divides it.

    >>> levels(ChannelGroup("stem", 20, ()), 8), levels(ChannelGroup("wide", 32, (), multiple=8), 3)
    ([2, 4, 6, 8, 10, 12, 14, 16, 18, 20], [24, 32])
    """
    step = math.lcm(grid_step(group.width, channels), group.multiple)
    return [*range(step, group.width, step), group.width]


def width_costs(profile: Profile) -> tuple[dict[str, WidthCost], tuple[ChannelGroup, ...]]:
    """Return the cost of "macs" and "params" as functions of widths, and the prunable groups of those widths.

    Widths are numbers of channels kept, in the order of the groups returned, which is the profile's. At any widths that
    are multiples of each group's `multiple` the value equals what `methods.network.profile` counts on the network after
    the cut, integer for integer. The constant holds all that no width changes, such as fixed groups.

    Source: a convolution costs one bilinear term per pair of groups it joins; ITPruner (arXiv 2108.08532), section 3.3.
    """
    groups = tuple(group for group in profile.groups if group.fixed is None)
    base = np.array([group.width for group in groups], dtype=np.int64)
    segments = _segments(groups)
    macs, params = _Terms(len(groups)), _Terms(len(groups))
    for layer in profile.layers:
        outputs = _kept(layer.weight_shape[0], segments.get((layer.name, "out"), []), base)
        inputs = _kept(layer.weight_shape[1], segments.get((layer.name, "in"), []), base)
        size = math.prod(layer.weight_shape)
        entries = layer.weight_shape[0] * layer.weight_shape[1]
        macs.add_product(layer.macs // entries, outputs, inputs)
        params.add_product(size // entries, outputs, inputs)
        params.linear += (layer.params - size) // layer.weight_shape[0] * outputs[1]
    for position, group in enumerate(groups):
        params.linear[position] += sum(member.params * member.columns for member in group.members)
        macs.linear[position] += sum(member.macs for member in group.members)
    costs = {"macs": macs.cost(profile.macs, base), "params": params.cost(profile.params, base)}
    return costs, groups


def uncut(profile: Profile) -> dict[str, str]:
    """Return, by layer, why no width changes it; layers that lose channels on either side are not named."""
    found = {}
    held = {group.name: {group.name, *(member.module for member in group.members)} for group in profile.groups}
    for layer in profile.layers:
        groups = [group for group in profile.groups if layer.name in held[group.name]]
        if all(group.fixed for group in groups):
            reasons = [f"channel group {group.name}: {group.fixed}" for group in groups]
            found[layer.name] = "; ".join(reasons) or "the output of the network does not depend on it"
    return found


def to_choices(
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    criterion: str,
    kept: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the `Plan.choices` that a cut to `widths` needs, as JSON values; `from_choices` restores them.

    Groups that keep every channel are listed with their width alone, because nothing is cut from them. `kept` names the
    channels that stay where the weights alone cannot tell them.
    """
    rows = []
    for group in groups:
        is_cut = widths[group.name] < group.width
        members = [[m.module, m.axis, m.start, m.columns, m.params] for m in group.members if is_cut]
        chosen = [list(kept[group.name])] if group.name in kept else []
        rows.append([group.name, widths[group.name], group.width, group.multiple, members, *chosen])
    return {"criterion": criterion, "groups": rows}


def from_choices(choices: Mapping[str, Any]) -> tuple[tuple[ChannelGroup, ...], dict[str, int], str]:
    """Restore the groups, their widths by name and the criterion that `to_choices` wrote down."""
    groups = tuple(
        ChannelGroup(name, base, tuple(Member(*member) for member in members), multiple)
        for name, _, base, multiple, members, *_ in choices["groups"]
    )
    widths = {row[0]: row[1] for row in choices["groups"]}
    return groups, widths, choices["criterion"]


def chosen_channels(choices: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the `kept` channels that `to_choices` wrote down, rising, by group."""
    return {name: kept[0] for name, _, _, _, _, *kept in choices["groups"] if kept}


def nothing_to_cut(method: str, profile: Profile) -> str | None:
    """Say why `method` cannot cut any channel of the network; None if it can."""
    if any(group.fixed is None for group in profile.groups):
        return None
    reasons = "; ".join(f"{group.name}: {group.fixed}" for group in profile.groups[:3])
    return (
        f"{method} needs a channel group that can be cut, but every one is fixed ({reasons}); try alds, or rewrite the "
        "forward"
    )


def widths_out_of_reach(method: str, budget: Budget, profile: Profile, least: Mapping[str, int]) -> Infeasible:
    """Build the error for a budget that no widths meet, ready to be raised.

    `least` holds, by cost name, the least value that `method` reaches within the other limit.
    """
    costs, _ = width_costs(profile)
    why = {
        name: f"of which {cost.constant:,} cannot be pruned{_largest_fixed(profile, name)}, at channel multiples of "
        f"{budget.channels}"
        for name, cost in costs.items()
    }
    return out_of_reach(method, budget, profile, least, why=why)


def _largest_fixed(profile: Profile, cost: str) -> str:
    """Name the fixed channel group whose layers cost most, with its reason; that of the outputs has to be fixed."""
    fixed = [group for group in profile.groups if group.fixed and any(one.axis == "in" for one in group.members)]
    if not fixed:
        return ""
    costs = {layer.name: getattr(layer, cost) for layer in profile.layers}
    largest = max(fixed, key=lambda group: sum(costs.get(name, 0) for name in {one.module for one in group.members}))
    return f" ({len(fixed)} channel groups are fixed, the largest of them {largest.name}: {largest.fixed})"


class _Terms:
    """Sums of products of kept widths, collected before the constant is known."""

    def __init__(self, groups: int) -> None:
        self.linear = np.zeros(groups, dtype=np.int64)
        self.pairs = np.zeros((groups, groups), dtype=np.int64)

    def add_product(self, unit: int, left: tuple[int, np.ndarray], right: tuple[int, np.ndarray]) -> None:
        """Add `unit * left * right`, each factor being an affine form `(constant, slopes)` in the widths."""
        self.linear += unit * (left[0] * right[1] + right[0] * left[1])
        product = unit * np.outer(left[1], right[1])
        self.pairs += np.triu(product) + np.tril(product, -1).T

    def cost(self, total: int, base: np.ndarray) -> WidthCost:
        """Return the cost whose value at `base` is `total`."""
        rest = WidthCost(0, self.linear, self.pairs)(base)
        return WidthCost(total - rest, self.linear, self.pairs)


def _segments(groups: Sequence[ChannelGroup]) -> dict[tuple[str, Axis], list[tuple[int, int]]]:
    """Return the groups `(position, columns)` that share each axis of each module."""
    found: dict[tuple[str, Axis], list[tuple[int, int]]] = {}
    for position, group in enumerate(groups):
        for member in group.members:
            found.setdefault((member.module, member.axis), []).append((position, member.columns))
    return found


def _kept(length: int, segments: Sequence[tuple[int, int]], base: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the entries left on an axis of `length` as an affine form: those of no group, the slope of each width."""
    slopes = np.zeros(len(base), dtype=np.int64)
    for position, columns in segments:
        slopes[position] += columns
    return length - int(slopes @ base), slopes

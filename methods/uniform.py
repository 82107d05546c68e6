"""Uniform width: every channel group keeps the same share of its channels. The baseline every method has to beat."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from methods.base import Budget, Choice, Knob, KnobValue, Plan, Scores, Shard
from methods.network import Profile
from methods.network.cut import cut
from methods.network.widths import from_choices, levels, to_choices, uncut, width_costs, widths_out_of_reach
from methods.protocol import recover_student, settle_norms


@dataclass(frozen=True)
class Uniform:
    """One remain rate for all channel groups, rounded down to each group's legal widths, at least one step.

    It measures nothing; the `loss` of a plan is one minus the remain rate. Knob: `criterion` chooses the channels that
    stay, see `methods.network.cut.channel_scores`.
    """

    name: ClassVar[str] = "uniform"
    is_last: ClassVar[bool] = False
    knobs: ClassVar[Mapping[str, Knob]] = MappingProxyType({"criterion": Choice(("l1", "l2", "bn_gamma"), "l1")})

    def accepts(self, profile: Profile) -> str | None:
        """Return `None`, or the reason why no channel of this network can be cut."""
        if any(group.fixed is None for group in profile.groups):
            return None
        reasons = "; ".join(f"{group.name}: {group.fixed}" for group in profile.groups[:3])
        return f"uniform pruning needs a channel group that can be cut, but every one is fixed ({reasons})"

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """Return no shards: widths need no scores."""
        return []

    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """Return no scores."""
        return {}

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """Return no scores."""
        return {}

    def untouched(self, scores: Scores, profile: Profile) -> Mapping[str, str]:
        """The layers whose channel groups are all fixed, with the reasons."""
        return uncut(profile)

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """Plan the largest remain rate at which the network fits every limit of `budget`.

        Raises:
            Infeasible: not even one step of every group fits.
        """
        costs, groups = width_costs(profile)
        legal = [levels(group, budget.channels) for group in groups]
        rates = sorted(
            {Fraction(width, group.width) for group, row in zip(groups, legal, strict=True) for width in row}
        )

        def widths(rate: Fraction) -> np.ndarray:
            return np.array(
                [
                    row[max(bisect_right(row, int(rate * group.width)) - 1, 0)]
                    for group, row in zip(groups, legal, strict=True)
                ]
            )

        def fits(rate: Fraction) -> bool:
            chosen = widths(rate)
            return all(costs[cost](chosen) <= limit for cost, limit in budget.limits().items())

        fitting = bisect_right(rates, False, key=lambda rate: not fits(rate))
        if fitting == 0:
            least = {name: cost(widths(rates[0])) for name, cost in costs.items()}
            raise widths_out_of_reach(self.name, budget, profile, least)
        rate = rates[fitting - 1]
        chosen = widths(rate)
        named = {group.name: int(width) for group, width in zip(groups, chosen, strict=True)}
        return Plan(
            method=self.name,
            macs=costs["macs"](chosen),
            params=costs["params"](chosen),
            choices=to_choices(groups, named, str(knobs["criterion"])),
            loss=1.0 - float(rate),
        )

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """A copy of the teacher, cut to the plan's widths."""
        groups, widths, criterion = from_choices(plan.choices)
        return cut(teacher, groups, widths, criterion)

    settle = settle_norms
    recover = recover_student

"""Uniform width: every channel group keeps the same share of its channels. The baseline every method has to beat."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from methods.base import Budget, Knob, KnobValue, Plan, Scores
from methods.narrowing import Narrowing
from methods.network import Profile
from methods.network.widths import levels, nothing_to_cut, width_costs, widths_out_of_reach
from methods.refit.narrow import CRITERION, width_choices


@dataclass(frozen=True)
class Uniform(Narrowing):
    """One remain rate for all channel groups, rounded down to each group's legal widths, at least one step.

    What rounding left of the budget is spent on one more step for some groups, those that it cost most first. The
    `loss` of a plan is one minus the remain rate. Knob: `criterion` chooses the channels that stay, see
    `methods.refit.removal` and `methods.network.cut.channel_scores`.
    """

    name: ClassVar[str] = "uniform"
    is_last: ClassVar[bool] = False
    knobs: ClassVar[Mapping[str, Knob]] = MappingProxyType({"criterion": CRITERION})

    def accepts(self, profile: Profile) -> str | None:
        """Return `None`, or the reason why no channel of this network can be cut."""
        return nothing_to_cut(self.name, profile)

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

        def places(rate: Fraction) -> list[int]:
            return [
                max(bisect_right(row, int(rate * group.width)) - 1, 0) for group, row in zip(groups, legal, strict=True)
            ]

        def widths(places: Sequence[int]) -> np.ndarray:
            return np.array([row[place] for row, place in zip(legal, places, strict=True)])

        def fits(chosen: np.ndarray) -> bool:
            return all(costs[cost](chosen) <= limit for cost, limit in budget.limits().items())

        fitting = bisect_right(rates, False, key=lambda rate: not fits(widths(places(rate))))
        if fitting == 0:
            least = {name: cost(widths(places(rates[0]))) for name, cost in costs.items()}
            raise widths_out_of_reach(self.name, budget, profile, least)
        rate = rates[fitting - 1]
        levelled = places(rate)
        cut = [
            (rate * group.width - row[place], i)
            for i, (group, row, place) in enumerate(zip(groups, legal, levelled, strict=True))
        ]
        for _, i in sorted(cut, key=lambda item: (-item[0], item[1])):
            raised = [place + (j == i) for j, place in enumerate(levelled)]
            if raised[i] < len(legal[i]) and fits(widths(raised)):
                levelled = raised
        chosen = widths(levelled)
        return Plan(
            method=self.name,
            macs=costs["macs"](chosen),
            params=costs["params"](chosen),
            choices=width_choices(groups, chosen, str(knobs["criterion"]), scores),
            loss=1.0 - float(rate),
        )

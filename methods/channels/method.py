"""Channels: widths of least error, the channels that others can best make up for removed, and the rest refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from methods.allocation.grid import Grid
from methods.allocation.path import Path, build_path, least_loss
from methods.base import Budget, Choice, Knob, KnobValue, Plan, Scores
from methods.narrowing import Narrowing
from methods.network import Profile
from methods.network.widths import levels, nothing_to_cut, width_costs, widths_out_of_reach
from methods.refit.narrow import ELIMINATION, width_choices
from methods.refit.removal import errors_of


@dataclass(frozen=True)
class Channels(Narrowing):
    """Widths that cost the layers which read them least, each group's channels removed by elimination.

    Per channel group, elimination (`methods.refit.removal`) gives the order in which channels go and the relative
    energy that the readers' outputs lose at every width; these errors are added over the groups and made least within
    the budget's MACs and params, counted exactly. What is left is refit to the teacher, in order (`methods.refit`).

    Knob: `power` of an error is what is added; below 1, many small errors weigh more beside one large error.

    Source: not a published method. The order is Optimal Brain Surgeon's by blocks, the allocation ITPruner's.
    """

    name: ClassVar[str] = "channels"
    is_last: ClassVar[bool] = False
    knobs: ClassVar[Mapping[str, Knob]] = MappingProxyType({"power": Choice((1.0, 0.75, 0.5), 1.0)})

    def accepts(self, profile: Profile) -> str | None:
        """`None`, or the reason why no channel of this network can be cut."""
        return nothing_to_cut(self.name, profile)

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """The plan of least error within every limit, out of one path of candidates for all budgets (`build_path`).

        Raises:
            Infeasible: not even the smallest widths fit.
        """
        power = float(knobs["power"])
        costs, groups = width_costs(profile)
        legal = [levels(group, budget.channels) for group in groups]
        errors = (errors_of(scores, group, row) ** power for group, row in zip(groups, legal, strict=True))
        grid, path = _path(profile, budget.channels, tuple(tuple(row.tolist()) for row in errors))
        chosen = path.select(budget.limits())
        if chosen is None:
            raise widths_out_of_reach(self.name, budget, profile, path.least())
        widths, loss = path.widths[chosen], max(0.0, -float(path.gains[chosen]))
        return Plan(
            method=self.name,
            macs=costs["macs"](widths),
            params=costs["params"](widths),
            choices=width_choices(groups, widths, ELIMINATION, scores) | {"power": power},
            loss=loss,
            bound=min(loss, least_loss(grid, costs, budget.limits())),
        )


@lru_cache(maxsize=8)
def _path(profile: Profile, channels: int, errors: tuple[tuple[float, ...], ...]) -> tuple[Grid, Path]:
    """The widths with their `errors`, a row a group, and the candidates for every budget."""
    costs, groups = width_costs(profile)
    widths = tuple(np.array(levels(group, channels)) for group in groups)
    grid = Grid(widths, tuple(-np.array(row) for row in errors))
    return grid, build_path(grid, costs)

"""The exact allocation of errors that add up: one option per layer, so that the sum of losses is least.

This is the multiple-choice knapsack problem with one or two limits. Its linear relaxation prices the limits; an option
that is dearer at these prices than its layer's best by more than the gap between relaxation and optimum is in no
optimum. The rest, a few options per layer, is a small integer program.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from math import fsum
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from methods.base import Infeasible
from methods.muted import muted

SumOptions: TypeAlias = Sequence[tuple[float, tuple[int, ...]]]
"""One layer's (loss, costs) options, with one cost per limit."""

_FEW = 4
"""Options per layer that the first integer program is given beside the best."""

_NODES = 2000
"""Nodes of a search tree before the best choice so far is taken: seconds, and met only by large networks."""

_INFEASIBLE = 2
"""The status of `milp` when it has proven that there is no choice."""


class Selection(NamedTuple):
    """The index of each layer's option, their summed loss, and a proven lower bound on the sum of any choice."""

    picks: list[int]
    loss: float
    bound: float


def least_sum(options: Sequence[SumOptions], limits: Sequence[int]) -> Selection:
    """The choice of one option per layer whose losses sum to the least, within every limit on the summed costs.

    `bound` equals `loss` where that is proven, to six digits of the relaxation's own gap. Two limits may take more than
    `_NODES`; then `bound` is the relaxation's, some 1e-5 of the loss below it in networks of 50 layers.

    Args:
        options: losses are finite and at least 0; costs are whole numbers, one per limit.

    Raises:
        Infeasible: no choice keeps every limit; `least` holds the least of each cost alone, by its position.

    Source: Sinha and Zoltners 1979 for the problem and its relaxation; HiGHS (Huangfu and Hall 2018) solves both.

    >>> layer = [(0.0, (10,)), (0.1, (6,)), (0.4, (1,))]
    >>> least_sum([layer, layer], [12])
    Selection(picks=[1, 1], loss=0.2, bound=0.2)
    """
    if not options:
        return Selection([], 0.0, 0.0)
    tables = [_undominated(layer) for layer in options]
    least = np.array([table.costs.min(0) for table in tables]).sum(0)
    relaxed = None if (least > limits).any() else _relaxed(tables, limits)
    if relaxed is None:
        raise _infeasible(least, limits)
    excess, bound = relaxed
    ranked = sorted(np.concatenate(excess).tolist())
    gap = max(ranked[min(_FEW * len(tables), len(ranked) - 1)], 1e-12)
    while True:
        kept = [np.flatnonzero(row <= gap) for row in excess]
        found = _integer_program([table.rows(rows) for table, rows in zip(tables, kept, strict=True)], limits, gap)
        if found is not None:
            picks = [int(table.indices[rows[at]]) for table, rows, at in zip(tables, kept, found.picks, strict=True)]
            loss = fsum(layer[pick][0] for layer, pick in zip(options, picks, strict=True))
        is_whole = sum(map(len, kept)) == len(ranked)
        if found is not None and (is_whole or loss - bound <= gap or not found.is_least):
            return Selection(picks, loss, loss if found.is_least else bound)
        if is_whole:
            raise _infeasible(least, limits)
        gap = 8 * gap if found is None else (1 + 1e-9) * (loss - bound)


class _Found(NamedTuple):
    """A row of each table, and whether none is better."""

    picks: list[int]
    is_least: bool


class _Table(NamedTuple):
    """A layer's options by rising loss: losses `(n,)`, costs `(n, limits)`, and their places in the input."""

    losses: np.ndarray
    costs: np.ndarray
    indices: np.ndarray

    def rows(self, chosen: np.ndarray) -> _Table:
        return _Table(*(column[chosen] for column in self))


def _undominated(options: SumOptions) -> _Table:
    """The options that no other, or no earlier equal, undercuts in loss and every cost."""
    losses = np.array([loss for loss, _ in options], dtype=np.float64)
    costs = np.array([cost for _, cost in options], dtype=np.int64)
    if not len(losses) or not np.isfinite(losses).all():
        raise ValueError(
            f"a layer's options are {list(options)[:5]}, expected at least one and finite losses; check its table"
        )
    firsts, seconds = costs[:, 0].tolist(), costs[:, -1].tolist()
    stairs: list[tuple[int, int]] = []
    kept = []
    for index in np.lexsort((*costs.T[::-1], losses)).tolist():
        step = (firsts[index], -seconds[index])
        at = bisect_left(stairs, (firsts[index] + 1,))
        if at and -stairs[at - 1][1] <= seconds[index]:
            continue
        behind = at
        while behind < len(stairs) and -stairs[behind][1] >= seconds[index]:
            behind += 1
        start = at - 1 if at and stairs[at - 1][0] == firsts[index] else at
        stairs[start:behind] = [step]
        kept.append(index)
    return _Table(losses[kept], costs[kept], np.array(kept))


def _relaxed(tables: Sequence[_Table], limits: Sequence[int]) -> tuple[list[np.ndarray], float] | None:
    """The excess of each option over its layer's best at the relaxation's prices, and the bound these prices prove."""
    scale = np.maximum(limits, 1)
    losses, costs, one_each = _columns(tables)
    result = linprog(losses, A_ub=(costs / scale).T, b_ub=limits / scale, A_eq=one_each, b_eq=np.ones(len(tables)))
    if result.x is None:
        return None
    prices = np.maximum(-result.ineqlin.marginals, 0) / scale
    charged = [table.losses + table.costs @ prices for table in tables]
    bound = fsum([float(row.min()) for row in charged]) - float(prices @ np.array(limits))
    return [row - row.min() for row in charged], bound


def _integer_program(tables: Sequence[_Table], limits: Sequence[int], unit: float) -> _Found | None:
    """The best row of each table within the limits, or None if no choice keeps them.

    Losses are in units of the gap to be closed and costs are counted from each layer's least, because HiGHS is exact to
    a millionth of a unit only; a choice that slips over a limit by that is refused and sought again below it.
    """
    owners = np.cumsum([len(table.losses) for table in tables])[:-1]
    least = [table.costs.min(0) for table in tables]
    room = np.array(limits) - sum(least)
    tables = [
        _Table((table.losses - table.losses.min()) / unit, table.costs - low, table.indices)
        for table, low in zip(tables, least, strict=True)
    ]
    losses, costs, one_each = _columns(tables)
    step = np.maximum(np.gcd.reduce(costs, axis=0), 1)
    is_exact = True
    while (room >= 0).all():
        rows = [LinearConstraint(one_each, 1, 1), LinearConstraint((costs // step).T, ub=room // step)]
        program = partial(milp, losses, integrality=1, bounds=Bounds(0, 1), constraints=rows)
        with muted():
            result = program(options={"mip_rel_gap": 0, "node_limit": _NODES})
            if result.x is None and result.status != _INFEASIBLE:
                result = program(options={"mip_rel_gap": 0})
        if result.x is None:
            return None
        picks = [int(part.argmax()) for part in np.split(result.x, owners)]
        over = sum(table.costs[pick] for table, pick in zip(tables, picks, strict=True)) - room
        if (over <= 0).all():
            return _Found(picks, is_exact and result.status == 0)
        room, is_exact = room - np.maximum(over, 0), False
    return None


def _columns(tables: Sequence[_Table]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All options' losses and costs, and the rows that assign each to its layer."""
    owner = np.repeat(np.arange(len(tables)), [len(table.losses) for table in tables])
    one_each = (owner == np.arange(len(tables))[:, None]).astype(float)
    return np.concatenate([table.losses for table in tables]), np.concatenate([t.costs for t in tables]), one_each


def _infeasible(least: np.ndarray, limits: Sequence[int]) -> Infeasible:
    message = (
        f"the limits are {', '.join(f'{limit:,}' for limit in limits)}, but the least costs are "
        f"{', '.join(f'{cost:,}' for cost in least.tolist())}, each for itself, and no choice keeps every limit; "
        "raise one or add cheaper options"
    )
    return Infeasible(message, {str(at): int(cost) for at, cost in enumerate(least)})

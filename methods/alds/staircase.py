"""The exact allocation: one option per layer, so that the largest error is least and the summed cost fits.

For a threshold t every layer takes its cheapest option of error at most t, independently of the others. That cost is a
staircase in t, and so is the sum over layers: its first step within the budget is the optimum, for any error table
and any additive cost. The paper searches for the same optimum with repeated random starts.

Source: the objective, the largest relative error at a given size, is that of Liebenwein et al. 2021 (arXiv 2107.11442).
Differs: solved exactly. It is NP-hard for the true loss, but not for the largest per-layer error.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp

from methods.base import Infeasible
from methods.muted import muted

Options: TypeAlias = Sequence[tuple[float, int]]
"""One layer's (error, cost) options."""

JointOptions: TypeAlias = Sequence[tuple[float, tuple[int, int]]]
"""One layer's (error, (first cost, second cost)) options."""


def minimax(options: Sequence[Options], budget: int) -> list[int]:
    """The index of each layer's option, so that the largest error is the least that `budget` affords.

    Every layer takes its cheapest option within that error; of equal ones the less wrong, then the first. The rest
    of the budget stays unspent: `lexi` spends it.

    Raises:
        Infeasible: the cheapest options together cost more than `budget`; `least["cost"]` is their cost.
        ValueError: a layer has no option, or an error that is not a number.

    >>> minimax([[(0.0, 10), (0.5, 4)], [(0.0, 10), (0.2, 6), (0.9, 1)]], budget=16)
    [0, 1]
    """
    stairs = [_staircase(layer) for layer in options]
    levels, costs = _merge(stairs)
    _check_budget(stairs, budget)
    threshold = levels[int(np.searchsorted(-costs, -budget))] if len(levels) else 0.0
    return [int(stair.indices[stair.at(threshold)]) for stair in stairs]


def frontier(options: Sequence[Options]) -> list[tuple[float, int]]:
    """Every (largest error, least cost) worth having: errors rise and costs fall, both strictly.

    It answers every budget at once: `minimax` reaches the first entry whose cost is within the budget.

    >>> frontier([[(0.0, 10), (0.5, 4)], [(0.0, 10), (0.2, 6), (0.9, 1)]])
    [(0.0, 20), (0.2, 16), (0.5, 10), (0.9, 5)]
    """
    levels, costs = _merge([_staircase(layer) for layer in options])
    return list(zip(levels.tolist(), costs.tolist(), strict=True))


def lexi(options: Sequence[Options], budget: int) -> list[int]:
    """Like `minimax`, with the rest spent on the second largest error, then on the third, and so on.

    The errors, sorted from the largest down, are lexicographically least; among such choices the cost is least. One
    sweep down the thresholds: a layer that cannot pay for its next step stays, the others move on. Only where several
    layers sit at the same error and some, not all, can move on, the choice between them takes an assignment problem.

    Raises:
        Infeasible: as `minimax`.
        ValueError: as `minimax`.

    >>> lexi([[(0.0, 10), (0.5, 4)], [(0.0, 10), (0.2, 6), (0.9, 1)]], budget=15)
    [1, 0]
    """
    stairs = [_staircase(layer) for layer in options]
    left = budget - _check_budget(stairs, budget)
    steps = [0] * len(stairs)
    moving = set(range(len(stairs)))
    events = sorted(((error, layer) for layer, stair in enumerate(stairs) for error in stair.errors), reverse=True)
    for _, tied in groupby(events, key=lambda event: event[0]):
        reached = [layer for _, layer in tied if layer in moving]
        moving -= {layer for layer in reached if steps[layer] + 1 == len(stairs[layer].costs)}
        rises = {layer: stairs[layer].rise(steps[layer]) for layer in reached if layer in moving}
        if sum(rises.values()) <= left:
            left -= sum(rises.values())
            for layer in rises:
                steps[layer] += 1
        elif min(rises.values()) > left:
            moving -= rises.keys()
        else:
            rest = sorted(moving)
            spent = sum(int(stairs[layer].costs[steps[layer]]) for layer in rest)
            for layer, step in zip(rest, _settle([stairs[layer] for layer in rest], left + spent), strict=True):
                steps[layer] = step
            break
    return [int(stair.indices[step]) for stair, step in zip(stairs, steps, strict=True)]


@dataclass(frozen=True)
class _Staircase:
    """A layer's undominated options: costs strictly up, errors strictly down, and their places in the input."""

    errors: np.ndarray
    costs: np.ndarray
    indices: np.ndarray

    def at(self, threshold: float) -> int:
        """The cheapest step whose error is at most `threshold`; one past the end if no error is."""
        return int(np.searchsorted(-self.errors, -threshold))

    def rise(self, step: int) -> int:
        """The cost of going from `step` to the next one."""
        return int(self.costs[step + 1] - self.costs[step])


def _staircase(options: Options) -> _Staircase:
    errors = np.array([error for error, _ in options], dtype=np.float64)
    costs = np.array([cost for _, cost in options], dtype=np.int64)
    if not len(errors) or np.isnan(errors).any():
        raise ValueError(
            f"a layer's options are {list(options)[:5]}, expected at least one and no NaN; check its table"
        )
    order = np.lexsort((errors, costs))
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], errors[order][:-1])))
    is_record = errors[order] < best_before
    is_record[0] = True
    kept = order[is_record]
    return _Staircase(errors[kept], costs[kept], kept)


def _merge(stairs: Sequence[_Staircase]) -> tuple[np.ndarray, np.ndarray]:
    """The summed staircase: thresholds strictly up, costs strictly down."""
    if not stairs:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    errors = np.concatenate([stair.errors for stair in stairs])
    savings = np.concatenate([np.append(np.diff(stair.costs), 0) for stair in stairs])
    levels, position = np.unique(errors, return_inverse=True)
    saved = np.zeros(len(levels), dtype=np.int64)
    np.add.at(saved, position, savings)
    costs = sum(int(stair.costs[-1]) for stair in stairs) - np.cumsum(saved)
    reachable = levels >= max(stair.errors[-1] for stair in stairs)
    levels, costs = levels[reachable], costs[reachable]
    is_step = np.append(True, np.diff(costs) < 0)
    return levels[is_step], costs[is_step]


def _check_budget(stairs: Sequence[_Staircase], budget: int) -> int:
    """The cost of all layers' cheapest options together."""
    least = sum(int(stair.costs[0]) for stair in stairs)
    if least > budget:
        message = f"the budget is {budget:,}, but the cheapest options cost {least:,}; raise it or add cheaper options"
        raise Infeasible(message, {"cost": least})
    return least


def _settle(stairs: Sequence[_Staircase], budget: int) -> list[int]:
    """The lexicographic optimum where layers tie: one step per layer.

    A falling list of error caps is affordable if its cheapest one-to-one assignment to the layers is. The caps are
    found one after the other, each the least level to which all that follow can come down.
    """
    levels = np.unique(np.concatenate([stair.errors for stair in stairs]))

    def assign(caps: Sequence[float]) -> tuple[int, list[int]]:
        steps = np.array([np.searchsorted(-stair.errors, -np.array(caps)) for stair in stairs])
        costs = [np.append(stair.costs, budget + 1)[row] for stair, row in zip(stairs, steps, strict=True)]
        chosen = linear_sum_assignment(np.array(costs))
        return int(np.array(costs)[chosen].sum()), steps[chosen].tolist()

    caps: list[float] = []
    while len(caps) < len(stairs):
        trials = [caps + [level] * (len(stairs) - len(caps)) for level in levels.tolist()]
        caps.append(trials[bisect_left(trials, True, key=lambda trial: assign(trial)[0] <= budget)][-1])
    return assign(caps)[1]


def joint(options: Sequence[JointOptions], limits: tuple[int, int]) -> list[int]:
    """Like `lexi` under two limits at once, one for each summed cost.

    The largest error is the least possible. Below it, layers that tie for one error are served in their order. The
    sweep keeps one affordable choice; a layer of that choice that sits at the threshold goes below it from the slack,
    or else by a new choice for all layers, and stays where `_fit` shows that there is none.

    Raises:
        Infeasible: no choice keeps both limits; `least` holds the least of each cost alone, as "first" and "second".

    >>> layer = [(0.0, (9, 9)), (0.1, (2, 8)), (0.2, (8, 2))]
    >>> joint([layer, layer], limits=(10, 10))
    [1, 2]
    """
    tables = [_by_error(layer) for layer in options]
    counts = [len(table.errors) for table in tables]
    picks = _fit(tables, counts, limits)
    if picks is None:
        first, second = (int(low) for low in sum(table.costs.min(0) for table in tables))
        message = (
            f"the limits are {limits[0]:,} and {limits[1]:,}, but the least costs are {first:,} and {second:,}, each "
            "for itself, and no choice keeps both; raise one or add cheaper options"
        )
        raise Infeasible(message, {"first": first, "second": second})
    events = {(float(error), layer) for layer, table in enumerate(tables) for error in table.errors}
    stays: set[int] = set()
    for error, layer in sorted(events, key=lambda event: (-event[0], event[1])):
        if layer in stays:
            continue
        counts[layer] = int(np.searchsorted(tables[layer].errors, error))
        if picks[layer] < counts[layer]:
            continue
        lower = _swap(tables, picks, layer, counts[layer], limits) or _fit(tables, counts, limits)
        if lower is None:
            stays.add(layer)
            counts[layer] = int(np.searchsorted(tables[layer].errors, error, side="right"))
        picks = lower or picks
    return [int(table.indices[pick]) for table, pick in zip(tables, picks, strict=True)]


@dataclass(frozen=True)
class _Table:
    """A layer's options by rising error: errors (n,), costs (n, 2), and their places in the input."""

    errors: np.ndarray
    costs: np.ndarray
    indices: np.ndarray


def _by_error(options: JointOptions) -> _Table:
    errors = np.array([error for error, _ in options], dtype=np.float64)
    costs = np.array([cost for _, cost in options], dtype=np.int64).reshape(-1, 2)
    order = np.argsort(errors, kind="stable")
    return _Table(errors[order], costs[order], order)


def _swap(
    tables: Sequence[_Table], picks: list[int], layer: int, count: int, limits: tuple[int, int]
) -> list[int] | None:
    """`picks` with another of the first `count` options for `layer`, the cheapest that fits, or None."""
    others = sum(table.costs[pick] for at, (table, pick) in enumerate(zip(tables, picks, strict=True)) if at != layer)
    costs = tables[layer].costs[:count]
    price = (costs / np.maximum(limits, 1)).sum(1)
    price[(costs + others > limits).any(1)] = np.inf
    if not len(price) or np.isinf(price.min()):
        return None
    return [*picks[:layer], int(price.argmin()), *picks[layer + 1 :]]


def _fit(tables: Sequence[_Table], counts: Sequence[int], limits: tuple[int, int]) -> list[int] | None:
    """One of the first `counts[l]` options per layer l within both limits, or None if no choice keeps them.

    Prices `w first + (1 - w) second`, in units of the limits, settle most cases: their cheapest choice fits, or costs
    more than 1, which no choice within both limits does. The rest goes to an integer program.
    """
    if min(counts) == 0:
        return None
    fronts = [_front(table.costs[:count]) for table, count in zip(tables, counts, strict=True)]
    costs = [table.costs[front] for table, front in zip(tables, fronts, strict=True)]
    low, high = 0.0, 1.0
    for _ in range(30):
        weight = (low + high) / 2
        prices = [cost @ (np.array([weight, 1 - weight]) / np.maximum(limits, 1)) for cost in costs]
        chosen = [int(price.argmin()) for price in prices]
        totals = sum(cost[at] for cost, at in zip(costs, chosen, strict=True))
        if (totals <= limits).all():
            return [int(front[at]) for front, at in zip(fronts, chosen, strict=True)]
        if sum(float(price.min()) for price in prices) > 1 + 1e-9:
            return None
        low, high = (weight, high) if totals[0] > limits[0] else (low, weight)
    found = _integer_program(costs, limits)
    return None if found is None else [int(front[at]) for front, at in zip(fronts, found, strict=True)]


def _front(costs: np.ndarray) -> np.ndarray:
    """The indices of `costs` (n, 2) that no other undercuts in both, by rising first cost."""
    order = np.lexsort((costs[:, 1], costs[:, 0]))
    second = costs[order, 1]
    kept: np.ndarray = order[np.append(True, second[1:] < np.minimum.accumulate(second)[:-1])]
    return kept


def _integer_program(costs: Sequence[np.ndarray], limits: tuple[int, int]) -> list[int] | None:
    """One row of each of `costs` within both limits, or None; HiGHS, exact to a millionth of a limit."""
    owner = np.repeat(np.arange(len(costs)), [len(cost) for cost in costs])
    scaled = np.concatenate(costs) / np.maximum(limits, 1)
    one_each = LinearConstraint((owner == np.arange(len(costs))[:, None]).astype(float), 1, 1)
    within = LinearConstraint(scaled.T, ub=np.ones(2))
    with muted():
        result = milp(np.zeros(len(owner)), integrality=1, bounds=Bounds(0, 1), constraints=[one_each, within])
    if result.x is None:
        return None
    picks = [int(result.x[owner == layer].argmax()) for layer in range(len(costs))]
    totals = sum(cost[pick] for cost, pick in zip(costs, picks, strict=True))
    return picks if (totals <= limits).all() else None

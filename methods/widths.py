"""Channel widths for every budget at once: a path of candidate plans from the smallest network to the teacher.

The path knows gains and costs but no budget; a budget only picks from it. So a larger budget can never get a worse
plan, whichever of its limits grows, which no search made for one budget at a time could promise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from methods.channels import WidthCost
from methods.elimination import Charge, Grid, Levels, ascend, cliques, largest_table, maximise

_MIXES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Shares of the first of two costs."""

_SOLVES, _COARSE, _FINE, _MOST_SWAPS, _UNIFORM = 120, 24, 64, 1 << 16, 100
"""Per mix: solves, levels per group in a solve and in a walk, plans tried by exchange; and uniform plans in all."""

_LARGEST_TABLE, _LARGEST_PROOF = 1 << 16, 1 << 23
"""Entries of an elimination table, above which a solve is local only, and a bound is not attempted."""


@dataclass(frozen=True)
class Path:
    """Candidate plans, best first: `widths` `(C, L)`, their `gains` `(C,)` and, by name, their `costs` `(C,)`."""

    widths: np.ndarray
    gains: np.ndarray
    costs: Mapping[str, np.ndarray]

    def select(self, limits: Mapping[str, int]) -> int | None:
        """The index of the best candidate within every limit, or None if there is none."""
        fits = np.ones(len(self.gains), dtype=bool)
        for cost, limit in limits.items():
            fits &= self.costs[cost] <= limit
        return int(fits.argmax()) if fits.any() else None

    def least(self) -> dict[str, int]:
        """The smallest value of each cost."""
        return {name: int(values.min()) for name, values in self.costs.items()}


def build_path(grid: Grid, costs: Mapping[str, WidthCost]) -> Path:
    """The candidate plans of `grid` under `costs` (each over the same L groups), which serve every budget.

    For five mixes of the costs it takes the plans that no other beats for some price per unit of cost, then walks
    between neighbours among them in single steps of the grid. Few groups make a coarse grid, so there it also tries
    every exchange of one step between two groups. Plans of one remain rate for all groups are added.
    Among equal gains the plan with the least first cost comes first, then the one with the lexicographically least
    widths.
    """
    grid, _ = grid.thinned(_FINE)
    found = list(uniform(grid))
    charges = {name: share(cost, grid.pick(grid.top)) for name, cost in costs.items()}
    for mix in _mixes(costs):
        charge = _mixed(charges, mix)
        points = _supported(grid, charge)
        steps = [levels for low, high in pairwise(points) for levels in _between(grid, charge, low, high)]
        found += points + steps
        found += list(_swapped(grid, charge, np.stack(points + steps)))
    levels = np.unique(np.stack(found), axis=0)
    widths, gains = grid.pick(levels), grid.gain(levels)
    priced = {name: evaluate(cost, widths) for name, cost in costs.items()}
    order = np.lexsort((next(iter(priced.values())), -gains))
    return Path(widths[order], gains[order], {name: values[order] for name, values in priced.items()})


def evaluate(cost: WidthCost, widths: np.ndarray) -> np.ndarray:
    """The exact cost of many widths `(C, L)`, as `(C,)` int64."""
    values: np.ndarray = cost.constant + widths @ cost.linear + ((widths @ cost.pairs) * widths).sum(1)
    return values


def share(cost: WidthCost, base: np.ndarray) -> Charge:
    """What the widths cost as a share of the cost at widths `base` `(L,)`, leaving out the constant part."""
    whole = cost(base)
    return Charge(cost.linear / whole, cost.pairs / whole)


def uniform(grid: Grid) -> Iterator[Levels]:
    """Plans with one remain rate for all groups: the widest levels that do not exceed it."""
    for rate in np.linspace(0, 1, _UNIFORM + 1):
        fitting = [np.searchsorted(widths, rate * widths[-1], side="right") - 1 for widths in grid.widths]
        yield np.maximum(fitting, 0)


def price_bound(grid: Grid, charges: Mapping[str, Charge], limits: Mapping[str, float]) -> float:
    """No plan of `grid` whose charges are within `limits` gains more than this; infinite if the tables are too large.

    For any price per unit of cost, the best `gain - price * (charge - limit)` of all plans is such a bound. A coarser
    grid finds a good price by bisection, the whole grid proves the bound.

    Source: Lagrangian duality (Everett 1963).
    """
    best = np.inf
    for mix in _mixes(limits):
        charge = _mixed(charges, mix)
        limit = sum(weight * limits[name] for name, weight in mix.items())
        order = cliques(charge.pairs, [len(widths) for widths in grid.widths])
        if largest_table(order, [len(widths) for widths in grid.widths]) > _LARGEST_PROOF:
            continue
        price = _tightest_price(grid.thinned(_COARSE)[0], charge, limit)
        levels = maximise(grid, charge.times(price), order)
        best = min(best, float(grid.gain(levels) - price * (charge(grid.pick(levels)) - limit)))
    return best


def _tightest_price(grid: Grid, charge: Charge, limit: float) -> float:
    solve = _solver(grid, charge)
    low, high = -7.0, 7.0
    for _ in range(24):
        middle = (low + high) / 2
        is_over = charge(grid.pick(solve(10**middle))) > limit
        low, high = (middle, high) if is_over else (low, middle)
    return float(10**high)


def _mixes(names: Iterable[str]) -> Iterator[dict[str, float]]:
    """Weights of one or two costs that sum to 1."""
    one, *rest = names
    if not rest:
        yield {one: 1.0}
        return
    yield from ({one: theta, rest[0]: 1 - theta} for theta in _MIXES)


def _mixed(charges: Mapping[str, Charge], mix: Mapping[str, float]) -> Charge:
    parts = [charges[name].times(weight) for name, weight in mix.items()]
    return Charge(np.sum([part.linear for part in parts], 0), np.sum([part.pairs for part in parts], 0))


def _supported(grid: Grid, charge: Charge) -> list[Levels]:
    """The corners of the concave hull of (cost, gain), least cost first, between the smallest plan and the largest.

    Halves intervals: the price at which both ends tie either finds a plan above their chord or proves there is none.
    Large groups offer a coarser choice here; the steps between neighbours use all of it.
    """
    coarse, kept = grid.thinned(_COARSE)
    solve = _solver(coarse, charge)
    ends = np.zeros_like(coarse.top), coarse.top
    points = list(ends)
    intervals = deque([ends])
    for _ in range(_SOLVES):
        if not intervals:
            break
        low, high = intervals.popleft()
        spans = [charge(coarse.pick(high)) - charge(coarse.pick(low)), coarse.gain(high) - coarse.gain(low)]
        if spans[0] <= 0 or spans[1] <= 0:
            continue
        price = float(spans[1] / spans[0])
        middle = solve(price)
        values = [coarse.gain(x) - price * charge(coarse.pick(x)) for x in (middle, low)]
        if values[0] > values[1] + 1e-9 * spans[1]:
            points.append(middle)
            intervals += [(low, middle), (middle, high)]
    points.sort(key=lambda levels: float(charge(coarse.pick(levels))))
    return [np.array([keep[level] for keep, level in zip(kept, levels, strict=True)]) for levels in points]


def _solver(grid: Grid, charge: Charge) -> Callable[[float], Levels]:
    """Maximises `gain - price * charge`: exactly where the tables stay small, else by single-group ascent."""
    sizes = [len(widths) for widths in grid.widths]
    order = cliques(charge.pairs, sizes)
    is_sparse = largest_table(order, sizes) <= _LARGEST_TABLE

    def solve(price: float) -> Levels:
        priced = charge.times(price)
        return maximise(grid, priced, order) if is_sparse else ascend(grid, priced, grid.top)

    return solve


def _between(grid: Grid, charge: Charge, low: Levels, high: Levels) -> list[Levels]:
    """Single-step walks from `low` towards `high`: from what both have, from `low` by high's raises, and by any."""
    ceiling = float(charge(grid.pick(high)))
    return [
        *_climb(grid, charge, np.minimum(low, high), high, np.inf),
        *_climb(grid, charge, low, np.maximum(low, high), ceiling),
        *_climb(grid, charge, low, grid.top, ceiling),
    ]


def _swapped(grid: Grid, charge: Charge, levels: np.ndarray) -> np.ndarray:
    """Undominated plans one step up, down, or both in two groups, from the undominated among `levels` `(C, L)`."""
    start: np.ndarray = levels[_undominated(grid, charge, levels)]
    count = levels.shape[1]
    one = np.concatenate([np.zeros((1, count), dtype=np.int64), np.eye(count, dtype=np.int64)])
    moves = (one[:, None] - one[None, :]).reshape(-1, count)
    if len(start) * len(moves) > _MOST_SWAPS:
        return start
    moved: np.ndarray = np.unique((start[:, None] + moves[None, :]).reshape(-1, count), axis=0)
    moved = moved[((moved >= 0) & (moved <= grid.top)).all(1)]
    found: np.ndarray = moved[_undominated(grid, charge, moved)]
    return found


def _undominated(grid: Grid, charge: Charge, levels: np.ndarray) -> np.ndarray:
    """Indices of the plans that gain more than every other of at most their cost."""
    gains, prices = grid.gain(levels), charge(grid.pick(levels))
    order: np.ndarray = np.lexsort((-gains, prices))
    best = np.maximum.accumulate(gains[order])
    is_better = np.append(True, gains[order][1:] > best[:-1])
    return np.compress(is_better, order)


def _climb(grid: Grid, charge: Charge, start: Levels, stop: Levels, ceiling: float) -> list[Levels]:
    """Raises one group by one level at a time, best gain per cost first, within levels `stop` and cost `ceiling`."""
    both, own = charge.pairs + charge.pairs.T, charge.pairs.diagonal()
    levels, widths = start.copy(), grid.pick(start).astype(float)
    cost = float(charge(widths))
    every = np.arange(len(levels))
    slope = charge.linear + both @ widths
    visited = [levels.copy()]
    while True:
        step, rise = grid.steps[every, levels], grid.rises[every, levels]
        price = step * (slope + step * own)
        fits = (levels < stop) & (cost + price <= ceiling)
        if not fits.any():
            return visited
        group = int(np.where(fits, rise / np.maximum(price, 1e-300), -np.inf).argmax())
        cost += price[group]
        slope = slope + step[group] * both[group]
        levels[group] += 1
        visited.append(levels.copy())

"""Channel widths for every budget at once: a path of candidate plans from the smallest network to the teacher.

The path knows gains and costs but no budget; a budget only picks from it. So a larger budget can never get a worse
plan, whichever of its limits grows, which no search made for one budget at a time could promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from methods.allocation.grid import Charge, Grid, Levels, ascend, cliques, largest_table, maximise, tables
from methods.network.widths import WidthCost

_MIXES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Shares of the first of two costs."""

_SOLVES, _COARSE, _FINE, _MOST_SWAPS, _UNIFORM = 120, 24, 64, 1 << 16, 100
"""Per mix: solves, levels per group in a solve and in a walk, plans tried by exchange; and uniform plans in all."""

_LARGEST_TABLE, _LARGEST_PROOF, _LARGEST_BATCH = 1 << 16, 1 << 23, 1 << 17
"""Entries of an elimination table, above which a solve is local only, and a bound is not attempted; and at once."""


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
    found = [uniform(grid)]
    charges = {name: share(cost, grid.pick(grid.top)) for name, cost in costs.items()}
    for mix in _mixes(costs):
        charge = _mixed(charges, mix)
        points = _supported(grid, charge)
        walked = np.concatenate([points, _between(grid, charge, points)])
        found += [walked, _swapped(grid, charge, walked)]
    levels = distinct(np.concatenate(found))
    widths, gains = grid.pick(levels), grid.gain(levels)
    priced = {name: evaluate(cost, widths) for name, cost in costs.items()}
    order = np.lexsort((next(iter(priced.values())), -gains))
    return Path(widths[order], gains[order], {name: values[order] for name, values in priced.items()})


def evaluate(cost: WidthCost, widths: np.ndarray) -> np.ndarray:
    """The exact cost of many widths `(C, L)`, as `(C,)` int64."""
    values: np.ndarray = cost.constant + widths @ cost.linear + ((widths @ cost.pairs) * widths).sum(1)
    return values


def share(cost: WidthCost, base: np.ndarray) -> Charge:
    """The cost of widths as a share of the cost at widths `base` `(L,)`, without the constant part."""
    whole = cost(base)
    return Charge(cost.linear / whole, cost.pairs / whole)


def distinct(levels: np.ndarray) -> np.ndarray:
    """Each of `levels` `(C, L)`, all below `_FINE`, once, in lexicographic order.

    Ten of them make one number: to sort rows of few numbers is much faster than numpy's sort of rows.
    """
    count, groups = levels.shape
    padded = np.zeros((count, -(-groups // 10) * 10), dtype=np.int64)
    padded[:, :groups] = levels
    codes = padded.reshape(count, -1, 10) @ _FINE ** np.arange(9, -1, -1)
    order: np.ndarray = np.lexsort(codes.T[::-1])
    is_new = np.append(True, (codes[order[1:]] != codes[order[:-1]]).any(1))
    return np.compress(is_new, levels[order], 0)


def uniform(grid: Grid) -> Levels:
    """Plans `(C, L)` with one remain rate for all groups: the widest levels that do not exceed it."""
    rates = np.linspace(0, 1, _UNIFORM + 1)
    fitting = [np.searchsorted(widths, rates * widths[-1], side="right") - 1 for widths in grid.widths]
    levels: np.ndarray = np.maximum(np.stack(fitting, 1), 0)
    return levels


def relative(
    grid: Grid, costs: Mapping[str, WidthCost], limits: Mapping[str, int]
) -> tuple[dict[str, Charge], dict[str, float]]:
    """Each cost as a share of its value at the top of `grid`; and what the limits below that leave to the widths."""
    base = grid.pick(grid.top)
    left = {
        name: (limit - costs[name].constant) / whole
        for name, limit in limits.items()
        if limit < (whole := costs[name](base))
    }
    return {name: share(cost, base) for name, cost in costs.items()}, left


def least_loss(grid: Grid, costs: Mapping[str, WidthCost], limits: Mapping[str, int]) -> float:
    """A lower bound on the gain that plans of `grid` within `limits` lose against its top, by `price_bound`."""
    charges, left = relative(grid, costs, limits)
    best = float(grid.gain(grid.top))
    return max(0.0, best - price_bound(grid, charges, left)) if left else 0.0


def price_bound(grid: Grid, charges: Mapping[str, Charge], limits: Mapping[str, float]) -> float:
    """An upper bound on the gain of plans of `grid` with charges within `limits`; infinite if the tables are too large.

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
        (levels,) = maximise(grid, order, tables(grid, charge, order), np.array([price]))
        best = min(best, float(grid.gain(levels) - price * (charge(grid.pick(levels)) - limit)))
    return best


def _tightest_price(grid: Grid, charge: Charge, limit: float) -> float:
    solve = _solver(grid, charge)
    low, high = -7.0, 7.0
    for _ in range(24):
        middle = (low + high) / 2
        (levels,) = solve(np.array([10**middle]))
        is_over = charge(grid.pick(levels)) > limit
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


def _supported(grid: Grid, charge: Charge) -> Levels:
    """The corners `(P, L)` of the concave hull of (cost, gain), from the smallest plan to the largest.

    Halves intervals, all there are at once: the price at which both ends tie either finds a plan above their chord or
    proves there is none. Large groups offer a coarser choice here; the steps between neighbours use all of it.
    """
    coarse, kept = grid.thinned(_COARSE)
    solve = _solver(coarse, charge)

    def worth(levels: np.ndarray) -> np.ndarray:
        """Charge and gain of plans `(P, L)`, as `(P, 2)`."""
        return np.stack([charge(coarse.pick(levels)), coarse.gain(levels)], -1)

    points = np.stack([np.zeros_like(coarse.top), coarse.top])
    intervals, left = np.array([[0, 1]]), _SOLVES
    while left > 0 and len(intervals):
        intervals, left = intervals[:left], left - len(intervals)
        lows, highs = worth(points[intervals[:, 0]]), worth(points[intervals[:, 1]])
        spans = highs - lows
        is_rising = (spans > 0).all(1)
        if not is_rising.any():
            break
        intervals, lows, spans = intervals[is_rising], lows[is_rising], spans[is_rising]
        prices = spans[:, 1] / spans[:, 0]
        middles = solve(prices)
        profits = [found[:, 1] - prices * found[:, 0] for found in (worth(middles), lows)]
        is_above = profits[0] > profits[1] + 1e-9 * spans[:, 1]
        new = len(points) + np.arange(is_above.sum())
        points = np.concatenate([points, middles[is_above]])
        ends = intervals[is_above]
        intervals = np.stack([ends[:, 0], new, new, ends[:, 1]], 1).reshape(-1, 2)
    points = points[np.argsort(charge(coarse.pick(points)), kind="stable")]
    return np.stack([keep[levels] for keep, levels in zip(kept, points.T, strict=True)], 1)


def _solver(grid: Grid, charge: Charge) -> Callable[[np.ndarray], np.ndarray]:
    """Maximiser of `gain - price * charge` for prices `(P,)`: exact where tables stay small, else by ascent."""
    sizes = [len(widths) for widths in grid.widths]
    order = cliques(charge.pairs, sizes)
    if (largest := largest_table(order, sizes)) > _LARGEST_TABLE:
        return lambda prices: np.stack([ascend(grid, charge.times(price), grid.top) for price in prices])
    charges, most = list(tables(grid, charge, order)), max(1, _LARGEST_BATCH // largest)

    def solve(prices: np.ndarray) -> np.ndarray:
        parts = [prices[first : first + most] for first in range(0, len(prices), most)]
        return np.concatenate([maximise(grid, order, charges, part) for part in parts])

    return solve


def _between(grid: Grid, charge: Charge, points: Levels) -> Levels:
    """Single-step walks `(C, L)` between neighbours among `points` `(P, L)`: from what both have, from the lower one by
    the higher one's raises, and by any."""
    low, high = points[:-1], points[1:]
    ceilings = charge(grid.pick(high))
    starts = np.concatenate([np.minimum(low, high), low, low])
    stops = np.concatenate([high, np.maximum(low, high), np.broadcast_to(grid.top, low.shape)])
    return _climb(grid, charge, starts, stops, np.concatenate([np.full_like(ceilings, np.inf), ceilings, ceilings]))


def _swapped(grid: Grid, charge: Charge, levels: np.ndarray) -> np.ndarray:
    """Undominated plans one step up, down, or both in two groups, from the undominated among `levels` `(C, L)`."""
    start: np.ndarray = levels[_undominated(grid, charge, levels)]
    count = levels.shape[1]
    one = np.concatenate([np.zeros((1, count), dtype=np.int64), np.eye(count, dtype=np.int64)])
    moves = (one[:, None] - one[None, :]).reshape(-1, count)
    if len(start) * len(moves) > _MOST_SWAPS:
        return start
    moved: np.ndarray = (start[:, None] + moves[None, :]).reshape(-1, count)
    moved = distinct(moved[((moved >= 0) & (moved <= grid.top)).all(1)])
    found: np.ndarray = moved[_undominated(grid, charge, moved)]
    return found


def _undominated(grid: Grid, charge: Charge, levels: np.ndarray) -> np.ndarray:
    """Indices of the plans that gain more than every other of at most their cost."""
    gains, prices = grid.gain(levels), charge(grid.pick(levels))
    order: np.ndarray = np.lexsort((-gains, prices))
    best = np.maximum.accumulate(gains[order])
    is_better = np.append(True, gains[order][1:] > best[:-1])
    return np.compress(is_better, order)


def _climb(grid: Grid, charge: Charge, levels: Levels, stops: Levels, ceilings: np.ndarray) -> Levels:
    """All plans of walks from `levels` `(W, L)`, which raise one group by one level at a time.

    The best gain per cost goes first, within levels `stops` `(W, L)` and costs `ceilings` `(W,)`.
    """
    both, own = charge.pairs + charge.pairs.T, charge.pairs.diagonal()
    widths = grid.pick(levels).astype(float)
    costs, slopes = charge(widths), charge.linear + widths @ both
    every = np.arange(levels.shape[1])
    visited = [levels]
    while True:
        steps, rises = grid.steps[every, levels], grid.rises[every, levels]
        prices = steps * (slopes + steps * own)
        fits = (levels < stops) & (costs[:, None] + prices <= ceilings[:, None])
        if not fits.any():
            return np.concatenate(visited)
        best = np.where(fits, rises / np.maximum(prices, 1e-300), -np.inf).argmax(1)
        walks = np.flatnonzero(fits.any(1))
        groups = best[walks]
        costs = costs[walks] + prices[walks, groups]
        slopes = slopes[walks] + steps[walks, groups, None] * both[groups]
        levels, stops, ceilings = levels[walks] + np.eye(len(every), dtype=int)[groups], stops[walks], ceilings[walks]
        visited.append(levels)

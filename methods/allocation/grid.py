"""Exact maximisation of `sum gains - charge` over width grids, by max-plus variable elimination.

Costs of widths are sums of terms in one or two groups, so they form a sparse graph: a chain for plain networks, loops
of three for residual ones. Eliminating groups one by one, each against the neighbours it still has, is then exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

Levels: TypeAlias = np.ndarray
"""One level index per group, `(L,)` int64, or several such rows."""

Clique: TypeAlias = tuple[int, ...]
"""A group, eliminated together with the later groups it still touches: those first, latest first, itself last."""


@dataclass(frozen=True)
class Grid:
    """The options of each group: `widths[g]` ascending int64, and `gains[g]`, the worth of each."""

    widths: tuple[np.ndarray, ...]
    gains: tuple[np.ndarray, ...]

    @property
    def top(self) -> Levels:
        """Every group at its base width."""
        return np.array([len(widths) - 1 for widths in self.widths])

    @cached_property
    def steps(self) -> np.ndarray:
        """The channels that the next level has more than each, `(L, K)`; 0 from the base on."""
        return _rises(self.widths)

    @cached_property
    def rises(self) -> np.ndarray:
        """The gain that the next level has more than each, `(L, K)`; 0 from the base on."""
        return _rises(self.gains)

    def pick(self, levels: np.ndarray) -> np.ndarray:
        """The widths of `levels` `(..., L)`."""
        return np.stack([widths[levels[..., g]] for g, widths in enumerate(self.widths)], axis=-1)

    def gain(self, levels: np.ndarray) -> np.ndarray:
        """The summed gains of `levels` `(..., L)`, as `(...)`; equal levels give equal sums, to the last bit."""
        picked = [gains[levels[..., g]] for g, gains in enumerate(self.gains)]
        return np.array(sum(picked[1:], start=picked[0]))

    def thinned(self, most: int) -> tuple[Grid, tuple[np.ndarray, ...]]:
        """A grid of at most `most` evenly spread levels per group, both ends included, and their indices here."""
        kept = tuple(np.unique(np.linspace(0, len(w) - 1, min(most, len(w))).round().astype(int)) for w in self.widths)
        pick = [tuple(values[keep] for values, keep in zip(v, kept, strict=True)) for v in (self.widths, self.gains)]
        return Grid(pick[0], pick[1]), kept


def _rises(rows: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.zeros((len(rows), max(len(row) for row in rows)))
    for target, row in zip(padded, rows, strict=True):
        target[: len(row) - 1] = np.diff(row)
    return padded


@dataclass(frozen=True)
class Charge:
    """A price on widths `(..., L)`: `linear @ w + w @ pairs @ w`, float64, `pairs` upper triangular."""

    linear: np.ndarray
    pairs: np.ndarray

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """The price of `widths` `(..., L)`, as `(...)`."""
        return np.asarray(widths @ self.linear + ((widths @ self.pairs) * widths).sum(-1))

    def gradient(self, widths: np.ndarray) -> np.ndarray:
        """The slope of the price in each of `widths` `(L,)`."""
        slopes: np.ndarray = self.linear + (self.pairs + self.pairs.T) @ widths
        return slopes

    def times(self, factor: float) -> Charge:
        """The price in another unit."""
        return Charge(factor * self.linear, factor * self.pairs)


def cliques(pairs: np.ndarray, sizes: Sequence[int]) -> list[Clique]:
    """An elimination order of the graph of `pairs` `(L, L)`, with the groups that each touches when its turn comes.

    The group with the smallest table goes first; `sizes` counts each group's levels.
    """
    linked = (pairs != 0) | (pairs.T != 0)
    near = {g: set(np.flatnonzero(linked[g]).tolist()) - {g} for g in range(len(sizes))}
    touched: list[tuple[int, set[int]]] = []
    while near:
        group = min(near, key=lambda g: (math.prod(sizes[j] for j in near[g]) * sizes[g], g))
        rest = near.pop(group)
        for other in rest:
            near[other] = (near[other] | rest) - {group, other}
        touched.append((group, rest))
    turn = {group: position for position, (group, _) in enumerate(touched)}
    return [(*sorted(rest, key=lambda g: -turn[g]), group) for group, rest in touched]


def largest_table(order: Sequence[Clique], sizes: Sequence[int]) -> int:
    """Entries of the largest table that `maximise` would fill."""
    return max(math.prod(sizes[g] for g in clique) for clique in order)


def tables(grid: Grid, charge: Charge, order: Sequence[Clique]) -> Iterator[np.ndarray]:
    """The charge of the group of every clique in `order`: alone, and with each of the clique's others."""
    for scope in order:
        group = scope[-1]
        widths = grid.widths[group].astype(float)
        alone = charge.linear[group] * widths + charge.pairs[group, group] * widths**2
        total = np.broadcast_to(alone, [len(grid.widths[g]) for g in scope])
        for axis, other in enumerate(scope[:-1]):
            if pair := charge.pairs[group, other] + charge.pairs[other, group]:
                others = (pair * grid.widths[other]).reshape([-1 if i == axis else 1 for i in range(len(scope))])
                total = total + others * widths
        yield total


def maximise(grid: Grid, order: Sequence[Clique], charges: Iterable[np.ndarray], prices: np.ndarray) -> Levels:
    """For each of `prices` `(P,)` the levels `(P, L)` with the greatest `gain - price * charge`.

    Among equals the lower level, group by group. `charges` are the `tables` of `order`.

    Source: bucket elimination (Dechter 1999), with the max-plus semiring.
    """
    inbox: dict[int, list[tuple[Clique, np.ndarray]]] = {group: [] for *_, group in order}
    choices: list[np.ndarray] = []
    for scope, charge in zip(order, charges, strict=True):
        group = scope[-1]
        total = grid.gains[group] - prices.reshape([-1, *[1] * len(scope)]) * charge
        for axes, message in inbox.pop(group):
            total += message.reshape(
                [len(prices), *(message.shape[1 + axes.index(g)] if g in axes else 1 for g in scope)]
            )
        choice = total.argmax(-1)
        choices.append(choice)
        if len(scope) > 1:
            message = np.take_along_axis(total, choice[..., None], -1)[..., 0]
            inbox[scope[-2]].append((scope[:-1], message))
    levels = np.zeros((len(prices), len(order)), dtype=np.int64)
    for scope, choice in zip(reversed(order), reversed(choices), strict=True):
        levels[:, scope[-1]] = choice[(np.arange(len(prices)), *(levels[:, g] for g in scope[:-1]))]
    return levels


def ascend(grid: Grid, charge: Charge, start: Levels) -> Levels:
    """Levels that no change of a single group improves, reached from `start`: for graphs too dense to eliminate."""
    levels = start.copy()
    widths = grid.pick(levels).astype(float)
    both = charge.pairs + charge.pairs.T
    for _ in range(100):
        before = levels.copy()
        for group, options in enumerate(grid.widths):
            own = charge.pairs[group, group]
            price = charge.linear[group] + both[group] @ widths - 2 * own * widths[group]
            levels[group] = (grid.gains[group] - price * options - own * options.astype(float) ** 2).argmax()
            widths[group] = options[levels[group]]
        if (levels == before).all():
            break
    return levels

"""Convex bounds on the gain of any choice of remain rates within a budget, from cvxpy."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import cvxpy as cp
import numpy as np

from methods.allocation.grid import Charge, cliques

Objective: TypeAlias = Literal["quadratic", "linear", "log"]

_FLOOR_PRICE = 25.0
_ACCURACIES = (1e-7, 1e-6, 1e-5)
"""Tried in turn: the finest is at times out of reach, and a coarser one only widens the margin."""

_LARGEST_CONE = 12
"""Groups in one semidefinite block; denser graphs keep the linear rows alone, which bound less tightly."""


@dataclass(frozen=True)
class Worth:
    """The worth of a remain rate x of each group: concave and rising, separable over the L groups.

    `importance` c `(L,)` weighs a shape, "linear" `c x`, "quadratic" `-c (1 - x)^2 / 2` or "log" `c log x`; below
    `floor`, `25 (floor - x)^2` is taken off, so that a small budget is shared by all groups and kills none.
    """

    objective: Objective
    importance: tuple[float, ...]
    floor: float

    def __call__(self, group: int, rates: np.ndarray) -> np.ndarray:
        """The worth of `rates` (any shape) of one group."""
        match self.objective:
            case "linear":
                shape = rates
            case "quadratic":
                shape = -((1 - rates) ** 2) / 2
            case "log":
                shape = np.log(rates)
        return self.importance[group] * shape - _FLOOR_PRICE * np.maximum(0, self.floor - rates) ** 2

    def total(self, rates: np.ndarray) -> float:
        """The summed worth of `rates` `(L,)`."""
        return float(sum(self(group, rate) for group, rate in enumerate(rates)))

    def gradient(self, rates: np.ndarray) -> np.ndarray:
        """The slope of the worth of each of `rates` `(L,)`."""
        slopes = {"linear": np.ones_like(rates), "quadratic": 1 - rates, "log": 1 / rates}
        below = np.maximum(0, self.floor - rates)
        return np.asarray(np.array(self.importance) * slopes[self.objective] + 2 * _FLOOR_PRICE * below)

    def expression(self, rates: Any, squares: Any) -> Any:
        """The summed worth of all groups, concave in `rates` `(L,)` and `squares` `(L,)`, which are at least `rates`^2.

        Not for "log", whose bound needs no squares.
        """
        weights = np.array(self.importance)
        shape = rates if self.objective == "linear" else rates - squares / 2 - 1 / 2
        return weights @ shape - _FLOOR_PRICE * cp.sum_squares(cp.pos(self.floor - rates))


def upper_bound(worth: Worth, charges: Mapping[str, Charge], limits: Mapping[str, float], low: np.ndarray) -> float:
    """An upper bound on the worth of remain rates in `[low, 1]` `(L,)` within every limit.

    "log" is a geometric program, exact but for the soft floor, which only lowers the worth. The others get Shor's
    semidefinite relaxation with the products of bounds (RLT). Products matter only along the edges of the cost graph,
    so one small semidefinite block per clique of its chordal completion is as tight as a single large one.

    Args:
        worth: the concave objective.
        charges: by name, the price of rates (not widths), without the constant part, as a share of the whole.
        limits: by name, the most of each to spend; keys among those of `charges`.
        low: the least rate of each group, `(L,)`, above 0, which must be affordable.

    Returns:
        The solver's optimum and a margin for its accuracy; infinite if it reached none.

    Source: Shor 1987; Sherali and Adams 1990 (RLT); Fukuda et al. 2001 (clique decomposition).
    Differs: ITPruner solves its bilinear program with a local method and proves nothing about the point it finds.
    """
    limited = [(charges[name], limit) for name, limit in limits.items()]
    problem = (_geometric if worth.objective == "log" else _semidefinite)(worth, limited, low)
    for accuracy in _ACCURACIES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solution may be inaccurate")
            try:
                problem.solve(solver=cp.CLARABEL, tol_gap_abs=accuracy, tol_gap_rel=accuracy, tol_feas=accuracy)
            except cp.SolverError:
                continue
        if problem.status == cp.OPTIMAL:
            value = float(problem.value)
            return value + 10 * accuracy * (1 + abs(value))
    return math.inf


def _geometric(worth: Worth, limited: Sequence[tuple[Charge, float]], low: np.ndarray) -> Any:
    """The problem in the logarithms of the rates: every cost is a sum of exponentials, the objective linear."""
    logs = cp.Variable(len(low))
    rules = [logs >= np.log(low), logs <= 0]
    for charge, limit in limited:
        singles, (one, two) = np.flatnonzero(charge.linear), np.nonzero(charge.pairs)
        terms = [logs[singles] + np.log(charge.linear[singles])] if len(singles) else []
        terms += [logs[one] + logs[two] + np.log(charge.pairs[one, two])] if len(one) else []
        rules.append(cp.log_sum_exp(cp.hstack(terms)) <= math.log(limit))
    return cp.Problem(cp.Maximize(np.array(worth.importance) @ logs), rules)


def _semidefinite(worth: Worth, limited: Sequence[tuple[Charge, float]], low: np.ndarray) -> Any:
    graph = sum((charge.pairs for charge, _ in limited), start=np.zeros((len(low), len(low))))
    blocks = cliques(graph, [2] * len(low))
    edges = sorted({tuple(sorted(pair)) for block in blocks for pair in itertools.combinations(block, 2)})
    rates, squares = cp.Variable(len(low)), cp.Variable(len(low))
    products: Any = cp.Variable(len(edges)) if edges else np.zeros(0)
    rules = [rates >= low, rates <= 1, squares <= cp.multiply(1 + low, rates) - low]
    rules += _product_rows(rates, products, edges, low)
    if max(map(len, blocks)) <= _LARGEST_CONE:
        rules += _blocks(rates, squares, products, blocks, edges)
    else:
        rules.append(squares >= cp.square(rates))
    for charge, limit in limited:
        spent = charge.linear @ rates + charge.pairs.diagonal() @ squares
        joint = np.array([charge.pairs[i, j] for i, j in edges])
        rules.append(spent + joint @ products <= limit if edges else spent <= limit)
    return cp.Problem(cp.Maximize(worth.expression(rates, squares)), rules)


def _product_rows(rates: Any, products: Any, edges: Sequence[tuple[int, ...]], low: np.ndarray) -> list[Any]:
    """McCormick's four half-spaces around each product of two rates in their bounds."""
    if not edges:
        return []
    one, two = (np.array(side) for side in zip(*edges, strict=True))
    x, y, a, b = rates[one], rates[two], low[one], low[two]
    return [
        products >= cp.multiply(a, y) + cp.multiply(b, x) - a * b,
        products >= x + y - 1,
        products <= y + cp.multiply(b, x) - b,
        products <= x + cp.multiply(a, y) - a,
    ]


def _blocks(rates: Any, squares: Any, products: Any, blocks: Sequence[tuple[int, ...]], edges: Sequence[Any]) -> Any:
    """The rules that `[[1, x'], [x, X]]` is positive semidefinite on every maximal clique."""
    groups = rates.shape[0]
    lifted = cp.hstack([np.ones(1), rates, squares, products])
    place = {edge: 1 + 2 * groups + k for k, edge in enumerate(edges)}
    place |= {(g, g): 1 + groups + g for g in range(groups)}
    rules = []
    for block in blocks:
        if any(set(block) < set(other) for other in blocks):
            continue
        inner = [[place[min(i, j), max(i, j)] for j in block] for i in block]
        rows = [[0, *(1 + g for g in block)], *([1 + g, *row] for g, row in zip(block, inner, strict=True))]
        rules.append(cp.reshape(lifted[np.ravel(rows)], (len(rows), len(rows)), order="C") >> 0)
    return rules

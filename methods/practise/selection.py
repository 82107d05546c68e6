"""The choice of blocks to drop: the least error that saves enough, proven least by a mixed-integer program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any, TypeAlias

import cvxpy as cp
import numpy as np
from scipy.sparse import coo_array

from methods.base import Infeasible
from methods.muted import muted

_LARGEST = 1e4
"""The largest error that HiGHS is given: all others are scaled alike."""

_MARGIN, _SLACK = 1e-9, 1e-12
"""The share of a target that HiGHS is let off, so that rounding loses no choice. Its choices are checked again: whole
numbers exactly, others to the slack."""

_TOLERANCE = 1e-7
"""The most by which HiGHS may miss a rule; from 1e-9 downwards it takes the rounding in its own cuts for a rule, and
misses the best set now and then."""

_EXACT = {
    "mip_rel_gap": 0.0,
    "mip_abs_gap": 0.0,
    "mip_feasibility_tolerance": _TOLERANCE,
    "primal_feasibility_tolerance": _TOLERANCE,
    "dual_feasibility_tolerance": _TOLERANCE,
}

_Row: TypeAlias = tuple[Sequence[float], float]
"""The savings of each choice in one resource, and the target for their sum."""


def select(savings: Sequence[float], recoverability: Sequence[float], target: float) -> list[int]:
    """The indices, rising, of least summed recoverability among all sets that save at least `target` together.

    A target of 0 or less takes nothing. Of equally good sets, the one with the smaller sum of positions is taken.

    Args:
        savings: of each, in any unit; whole numbers are compared exactly.
        recoverability: the error that each costs.
        target: the least that the chosen have to save, in the unit of `savings`.

    Raises:
        Infeasible: all together save less than `target`.
        ValueError: the lengths differ, or a number is not finite.

    Source: PRACTISE (arXiv 2202.07861) ranks blocks by recoverability per latency saved and drops the first k.
    Differs: that greedy choice misses the optimum of this covering problem in about half of random cases.

    >>> select([4, 3, 3], [1.0, 0.6, 0.6], target=4), select([4, 3, 3], [1.0, 0.6, 0.6], target=5)
    ([0], [1, 2])
    """
    return select_jointly([savings], recoverability, [target])


def select_jointly(
    savings: Sequence[Sequence[float]],
    recoverability: Sequence[float],
    targets: Sequence[float],
    *,
    interactions: np.ndarray | None = None,
) -> list[int]:
    """Like `select` for several resources at once, one row of `savings` and one target each, and for joint errors.

    It takes the set of least `pairwise_error`; `interactions` is `(n, n)`, symmetric, of any sign.

    Raises:
        Infeasible: no set reaches every target; `least` holds the most that can be saved of each, as "row 0" and so on.
        ValueError: the sizes differ, or a number is not finite.

    Source: McCormick 1976, the products of 0-1 variables as variables; Sherali and Adams 1990, a target times each.
    """
    q = np.zeros((len(recoverability),) * 2) if interactions is None else interactions
    _check(savings, recoverability, targets, q)
    rows = [_in_units(row, target) for row, target in zip(savings, targets, strict=True) if target > 0]
    if not rows:
        return []
    if any(not _reaches(row, [i for i, saving in enumerate(row) if saving > 0], target) for row, target in rows):
        raise _unreachable(savings, targets)
    chosen = cp.Variable(len(recoverability), boolean=True)
    shares = [np.array(row, dtype=np.float64) / target / (1 - _MARGIN) for row, target in rows]
    rules: list[Any] = []
    while (found := _solve(chosen, recoverability, q, shares, rules)) is not None:
        if all(_reaches(row, found, target) for row, target in rows):
            return found
        is_out = np.ones(len(recoverability))
        is_out[found] = -1  # short of a target by less than the tolerance: this very set is ruled out
        rules.append(is_out @ chosen >= 1 - len(found))
    raise _unreachable(savings, targets)


def pairwise_error(chosen: Sequence[int], recoverability: Sequence[float], interactions: np.ndarray) -> float:
    """The error of the indices `chosen`: the sum of theirs and, for each two of them, of their interaction.

    >>> pairwise_error([0, 2], [1.0, 5.0, 2.0], np.full((3, 3), 0.25))
    3.25
    """
    picked = list(chosen)
    pairs = np.triu(interactions, 1)[np.ix_(picked, picked)]
    return math.fsum([*(recoverability[i] for i in picked), *pairs.flat])


def _solve(
    chosen: Any, recoverability: Sequence[float], q: np.ndarray, rows: Sequence[np.ndarray], rules: Sequence[Any]
) -> list[int] | None:
    """The set of least error that, within tolerance, saves 1 by each of `rows` and keeps `rules`; None: none does.

    Ties are settled by a second program: a small price on positions would be lost in the rounding of the first. If
    rounding leaves the second without any set, the set of the first stands.
    """
    worth = np.array(recoverability, dtype=np.float64)
    scale = (max(np.abs(worth).max(initial=0), np.abs(q).max(initial=0)) or 1.0) / _LARGEST
    error = worth / scale @ chosen
    rules = [*rules, *(row @ chosen >= 1 for row in rows)]
    if q.any():
        one, two = np.triu_indices(len(worth), 1)
        both = cp.Variable(len(one))
        error += q[one, two] / scale @ both
        rules += [both >= 0, both >= chosen[one] + chosen[two] - 1, both <= chosen[one], both <= chosen[two]]
        rules += [_times_chosen(row, chosen, both) for row in rows]
    if not _is_solved(error, rules):
        return None
    found = _picked(chosen)
    least = pairwise_error(found, recoverability, q) / scale
    positions = np.arange(1, len(worth) + 1) @ chosen
    return _picked(chosen) if _is_solved(positions, [*rules, error <= least + _TOLERANCE]) else found


def _picked(chosen: Any) -> list[int]:
    return [int(index) for index in np.flatnonzero(chosen.value > 0.5)]


def _is_solved(cost: Any, rules: Sequence[Any]) -> bool:
    """Set the variables so that `cost` is least under `rules`; return False if nothing keeps the rules."""
    problem = cp.Problem(cp.Minimize(cost), rules)
    with muted():
        problem.solve(solver=cp.HIGHS, **_EXACT)
    assert problem.status in (cp.OPTIMAL, cp.INFEASIBLE), problem.status
    return bool(problem.status == cp.OPTIMAL)


def _times_chosen(row: np.ndarray, chosen: Any, both: Any) -> Any:
    """Multiply `row @ chosen >= 1` by each variable: implied by whole numbers, it cuts away fractions, and hours."""
    one, two = np.triu_indices(len(row), 1)
    pairs = np.arange(len(one))
    shape = (len(row), len(pairs))
    entries = (np.concatenate([row[two], row[one]]), (np.concatenate([one, two]), np.concatenate([pairs, pairs])))
    return coo_array(entries, shape=shape) @ both >= cp.multiply(1 - row, chosen)


def _check(
    savings: Sequence[Sequence[float]], recoverability: Sequence[float], targets: Sequence[float], q: np.ndarray
) -> None:
    count = len(recoverability)
    if len(savings) != len(targets) or any(len(row) != count for row in savings) or q.shape != (count, count):
        raise ValueError(
            f"there are {[len(row) for row in savings]} savings for {len(targets)} targets and interactions "
            f"{q.shape} for {count} choices, expected one of each per choice; check the tables"
        )
    numbers = [np.array(values, dtype=np.float64).ravel() for values in (*savings, recoverability, targets, q)]
    if not np.isfinite(np.concatenate(numbers)).all():
        raise ValueError("a saving, an error or a target is not finite, expected numbers; score again")


def _in_units(row: Sequence[float], target: float) -> _Row:
    """Divide whole savings and their target by the greatest common divisor, so that they stand out of the tolerance."""
    if not all(isinstance(saving, Integral) or float(saving).is_integer() for saving in row):
        return row, target
    whole = [int(saving) for saving in row]
    unit = math.gcd(*whole) or 1
    exact = int(target) if isinstance(target, Integral) else Fraction(float(target))
    return [saving // unit for saving in whole], math.ceil(Fraction(exact, unit))


def _reaches(row: Sequence[float], found: Sequence[int], target: float) -> bool:
    total = sum(row[index] for index in found)
    return total >= target or (not isinstance(total, Integral) and total >= target * (1 - _SLACK))


def _unreachable(savings: Sequence[Sequence[float]], targets: Sequence[float]) -> Infeasible:
    most = [sum(saving for saving in row if saving > 0) for row in savings]
    amounts = ", ".join(f"{target:,} (of {total:,})" for target, total in zip(targets, most, strict=True))
    return Infeasible(
        f"the targets are {amounts} and no set reaches them together, not even all {len(savings[0])}; lower a target",
        {f"row {index}": int(total) for index, total in enumerate(most)},
    )

"""The exact choice, against all subsets: for any savings, errors, interactions and targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from methods.base import Infeasible
from methods.practise import select
from methods.practise.selection import pairwise_error, select_jointly

whole = st.integers(0, 12)


@st.composite
def tables(draw: st.DrawFn, largest: int, rows: int = 1) -> tuple[list[list[int]], list[int], list[float]]:
    """Savings per resource, errors, and targets up to exactly all that can be saved; with many ties."""
    count = draw(st.integers(1, largest))
    savings = [draw(st.lists(whole, min_size=count, max_size=count)) for _ in range(rows)]
    errors = draw(st.lists(whole, min_size=count, max_size=count))
    return savings, errors, [draw(st.integers(0, sum(row))) for row in savings]


@st.composite
def interacting(draw: st.DrawFn, count: int) -> np.ndarray:
    upper = np.zeros((count, count))
    for one, two in combinations(range(count), 2):
        upper[one, two] = draw(st.integers(-6, 6))
    return upper + upper.T


def subsets(count: int) -> list[tuple[int, ...]]:
    return [chosen for size in range(count + 1) for chosen in combinations(range(count), size)]


def brute(
    savings: Sequence[Sequence[float]], errors: Sequence[float], targets: Sequence[float], q: np.ndarray
) -> tuple[float, int]:
    """The least error of any set that reaches every target, and the least sum of positions at that error."""
    fitting = [
        chosen
        for chosen in subsets(len(errors))
        if all(sum(row[i] for i in chosen) >= target for row, target in zip(savings, targets, strict=True))
    ]
    return min((_error(chosen, errors, q), sum(i + 1 for i in chosen)) for chosen in fitting)


def _error(chosen: Sequence[int], errors: Sequence[float], q: np.ndarray) -> float:
    return sum(errors[i] for i in chosen) + sum(float(q[i, j]) for i in chosen for j in chosen if i < j)


@settings(max_examples=150)
@example(([[2, 10, 10, 6, 12, 12, 1, 12]], [2, 10, 10, 6, 12, 12, 1, 12], [37]))
@example(([[0, 8, 10, 0, 11, 1, 1, 4, 5, 8]], [0, 8, 10, 0, 11, 1, 1, 6, 5, 8], [25]))
@example(([[9, 9, 2, 8, 2, 11, 4, 9]], [9, 9, 2, 8, 2, 11, 4, 9], [12]))
@given(tables(largest=10))
def test_the_choice_is_the_best_of_all_subsets(table: tuple[list[list[int]], list[int], list[float]]) -> None:
    (savings,), errors, (target,) = table
    chosen = select(savings, errors, target)
    assert chosen == sorted(set(chosen)) == select(savings, errors, target)
    assert sum(savings[i] for i in chosen) >= target
    if target > 0:
        found = sum(errors[i] for i in chosen), sum(i + 1 for i in chosen)
        assert found == brute([savings], errors, [target], np.zeros((len(errors),) * 2))


@settings(max_examples=60)
@given(st.data())
def test_joint_errors_and_several_targets_are_solved_exactly_too(data: st.DataObject) -> None:
    savings, errors, targets = data.draw(tables(largest=7, rows=data.draw(st.integers(1, 2))))
    q = data.draw(interacting(len(errors)))
    chosen = select_jointly(savings, errors, targets, interactions=q)
    if max(targets) <= 0:
        assert chosen == []
        return
    assert all(sum(row[i] for i in chosen) >= target for row, target in zip(savings, targets, strict=True))
    assert pairwise_error(chosen, errors, q) == _error(chosen, errors, q) == brute(savings, errors, targets, q)[0]


def test_rounding_within_the_solver_loses_no_choice() -> None:
    """HiGHS told to be as exact as it can called [0, 2, 3, 4], of error 3, the best here."""
    q = np.zeros((6, 6))
    for (one, two), error in {(0, 4): 1, (0, 5): -2, (1, 4): 2, (3, 4): -2, (3, 5): 3, (4, 5): 2}.items():
        q[one, two] = q[two, one] = error
    assert select_jointly([[0, 3, 3, 12, 4, 7]], [0, 0, 0, 4, 0, 0], [17], interactions=q) == [2, 3, 4]


def test_random_real_numbers_are_solved_exactly() -> None:
    random = np.random.default_rng(0)
    for _ in range(15):
        savings, errors = random.random(9).tolist(), random.random(9).tolist()
        q = random.normal(0, 0.2, (9, 9))
        q = q + q.T
        target = float(random.uniform(0.2, 1) * sum(savings))
        chosen = select_jointly([savings], errors, [target], interactions=q)
        assert _error(chosen, errors, q) == pytest.approx(brute([savings], errors, [target], q)[0], abs=1e-8)


@settings(max_examples=25)
@given(st.data())
def test_more_to_save_never_costs_less(data: st.DataObject) -> None:
    (savings,), errors, _ = data.draw(tables(largest=8))
    q = data.draw(interacting(len(errors)))
    losses = [
        pairwise_error(select_jointly([savings], errors, [target], interactions=q), errors, q)
        for target in range(1, sum(savings) + 1, max(1, sum(savings) // 6))
    ]
    assert all(before <= after for before, after in pairwise(losses))


@settings(max_examples=50)
@given(tables(largest=10))
def test_the_papers_greedy_choice_is_never_better(table: tuple[list[list[int]], list[int], list[float]]) -> None:
    (savings,), errors, (target,) = table
    order = sorted(range(len(errors)), key=lambda i: errors[i] / savings[i] if savings[i] else math.inf)
    greedy: list[int] = []
    for i in order:
        if sum(savings[j] for j in greedy) < target:
            greedy.append(i)
    assert sum(errors[i] for i in select(savings, errors, target)) <= sum(errors[i] for i in greedy)


def test_greed_on_paper() -> None:
    """Per unit saved, the first is the best (0.2 against 0.25); it alone is not enough, and the second alone is."""
    assert select([5, 8], [1.0, 2.0], target=8) == [1]


def test_a_target_is_met_to_the_last_unit() -> None:
    billion = 10**10
    assert select([billion, billion + 1], [1.0, 2.0], target=billion) == [0]
    assert select([billion, billion + 1], [1.0, 2.0], target=billion + 1) == [1]
    many = [billion + 7 * i for i in range(8)]
    assert select(many, [1.0] * 8, target=sum(many[4:])) == [4, 5, 6, 7]


def test_all_that_can_be_saved_can_be_asked_for() -> None:
    savings = [0.1, 0.2, 0.3, 0.7, 1e-3]
    assert select(savings, [1.0] * 5, target=sum(savings)) == [0, 1, 2, 3, 4]
    assert select(savings, [1.0] * 5, target=math.fsum(savings)) == [0, 1, 2, 3, 4]


def test_equal_choices_are_settled_by_position() -> None:
    assert select([3, 3, 3, 3], [1.0] * 4, target=6) == [0, 1]
    assert select([3, 3, 3, 6], [0.0] * 4, target=6) == [0, 1]
    assert select([3, 6, 3, 3], [0.0] * 4, target=6) == [1]


@pytest.mark.parametrize("target", [0, -5, 0.0])
def test_nothing_to_save_takes_nothing(target: float) -> None:
    assert select([1, 2], [0.0, 0.0], target) == []
    assert select([], [], target) == []


def test_negative_savings_are_a_cost() -> None:
    """A block that was measured to save less than nothing is never a help."""
    assert select([-1.0, 2.0, 3.0], [0.0, 1.0, 5.0], target=2.0) == [1]
    assert select_jointly([[2, 3], [-1, 1]], [1.0, 5.0], [2, 1]) == [1]


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(Infeasible, match=r"the targets are 11 \(of 10\) and no set .* not even all 3; lower a target"):
        select([4, 3, 3], [1.0, 1.0, 1.0], target=11)
    with pytest.raises(Infeasible):
        select([], [], target=1)
    with pytest.raises(Infeasible) as caught:
        select_jointly([[2, -1], [-1, 2]], [1.0, 1.0], [2, 2])
    assert caught.value.least == {"row 0": 2, "row 1": 2}


def test_tables_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of each per choice"):
        select([1, 2], [1.0], target=1)
    with pytest.raises(ValueError, match="expected one of each per choice"):
        select_jointly([[1, 2]], [1.0, 1.0], [1], interactions=np.zeros((3, 3)))
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            select([1, 2], [1.0, wrong], target=1)
        with pytest.raises(ValueError, match="not finite"):
            select([1, 2], [1.0, 1.0], target=wrong)

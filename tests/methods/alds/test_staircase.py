"""The exact allocation against brute force, its frontier, its ties and its two-limit form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.alds import minimax
from methods.alds.staircase import frontier, joint, lexi
from methods.base import Infeasible

# Few distinct errors and costs, so that ties between and within layers are common; costs need not fall with error.
errors = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 1.5])
options = st.lists(st.tuples(errors, st.integers(0, 9)), min_size=1, max_size=4)
layers = st.lists(options, min_size=1, max_size=4)
pairs = st.tuples(st.integers(0, 6), st.integers(0, 6))
joint_layers = st.lists(st.lists(st.tuples(errors, pairs), min_size=1, max_size=4), min_size=1, max_size=4)


def every_choice(table: Sequence[Sequence[tuple[float, int]]], budget: int) -> list[tuple[list[float], int]]:
    """Every affordable choice as (errors from the largest down, cost): the slow, obvious way."""
    sums = [(sorted((e for e, _ in pick), reverse=True), sum(c for _, c in pick)) for pick in product(*table)]
    return [(falling, cost) for falling, cost in sums if cost <= budget]


def outcome(table: Sequence[Sequence[tuple[float, int]]], chosen: list[int]) -> tuple[list[float], int]:
    picked = [layer[index] for layer, index in zip(table, chosen, strict=True)]
    return sorted((error for error, _ in picked), reverse=True), sum(cost for _, cost in picked)


@settings(max_examples=200, deadline=None)
@given(layers, st.integers(0, 30))
def test_minimax_is_the_brute_force_optimum(table: list[list[tuple[float, int]]], budget: int) -> None:
    affordable = every_choice(table, budget)
    if not affordable:
        with pytest.raises(Infeasible) as caught:
            minimax(table, budget)
        assert caught.value.least == {"cost": sum(min(cost for _, cost in layer) for layer in table)}
        return
    falling, cost = outcome(table, minimax(table, budget))
    best = min(found[0] for found, _ in affordable)
    assert (falling[0], cost) == (best, min(c for found, c in affordable if found[0] == best))


@settings(max_examples=200, deadline=None)
@given(layers, st.integers(0, 30))
def test_lexi_is_the_brute_force_lexicographic_optimum(table: list[list[tuple[float, int]]], budget: int) -> None:
    affordable = every_choice(table, budget)
    if affordable:
        assert outcome(table, lexi(table, budget)) == min(affordable)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.25, 0.5, 0.75]).flatmap(
            lambda e: st.tuples(
                st.just((1.0, 0)), st.tuples(st.just(e), st.integers(1, 4)), st.tuples(st.just(0.0), st.integers(5, 9))
            )
        ),
        min_size=3,
        max_size=6,
    ),
    st.integers(0, 30),
)
def test_lexi_settles_ties_between_layers(table: list[tuple[tuple[float, int], ...]], budget: int) -> None:
    """Every layer starts at error 1, so only some can come down: the choice decides about the second error."""
    assert outcome(table, lexi(table, budget)) == min(every_choice(table, budget))


def test_lexi_pins_the_layer_whose_next_step_would_cost_most() -> None:
    # Both start at 0.5. Only one may go below; the second can (2), the first (9) cannot, and 1 is left over.
    assert lexi([[(0.5, 1), (0.1, 10)], [(0.5, 1), (0.1, 3)]], budget=5) == [0, 1]


def test_a_layer_with_nothing_but_its_dense_option_stays() -> None:
    assert lexi([[(0.0, 7)], [(0.0, 9), (0.3, 2)]], budget=9) == [0, 1]
    assert lexi([], budget=0) == minimax([], budget=0) == frontier([]) == []


@pytest.mark.parametrize("solve", [minimax, lexi])
def test_no_option_or_no_number_is_refused(solve: object) -> None:
    for table in ([[]], [[(float("nan"), 1)]]):
        with pytest.raises(ValueError, match="expected at least one and no NaN"):
            solve(table, 5)  # type: ignore[operator]


@settings(max_examples=200, deadline=None)
@given(layers)
def test_the_frontier_answers_every_budget(table: list[list[tuple[float, int]]]) -> None:
    points = frontier(table)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(points))
    for budget in range(points[-1][1], points[0][1] + 2):
        expected = next(point for point in points if point[1] <= budget)
        falling, cost = outcome(table, minimax(table, budget))
        assert (falling[0], cost) == expected
        assert outcome(table, lexi(table, budget))[0][0] == expected[0]


@settings(max_examples=100, deadline=None)
@given(layers, st.integers(0, 30), st.randoms(use_true_random=False))
def test_order_of_layers_and_options_changes_nothing(
    table: list[list[tuple[float, int]]], budget: int, random: Random
) -> None:
    shuffled = [random.sample(layer, len(layer)) for layer in random.sample(table, len(table))]
    try:
        expected = [outcome(table, solve(table, budget)) for solve in (minimax, lexi)]
    except Infeasible:
        with pytest.raises(Infeasible):
            lexi(shuffled, budget)
        return
    assert [outcome(shuffled, solve(shuffled, budget)) for solve in (minimax, lexi)] == expected


Joint = list[list[tuple[float, tuple[int, int]]]]


@settings(max_examples=200, deadline=None)
@given(joint_layers, pairs.map(lambda pair: (2 * pair[0], 2 * pair[1])))
def test_joint_is_the_brute_force_optimum_under_both_limits(table: Joint, limits: tuple[int, int]) -> None:
    def totals(pick: Sequence[tuple[float, tuple[int, int]]]) -> tuple[int, int]:
        return sum(cost[0] for _, cost in pick), sum(cost[1] for _, cost in pick)

    affordable = [
        pick for pick in product(*table) if all(t <= limit for t, limit in zip(totals(pick), limits, strict=True))
    ]
    if not affordable:
        with pytest.raises(Infeasible, match="no choice keeps both"):
            joint(table, limits)
        return
    picked = [layer[index] for layer, index in zip(table, joint(table, limits), strict=True)]
    assert all(total <= limit for total, limit in zip(totals(picked), limits, strict=True))
    assert max(e for e, _ in picked) == min(max(e for e, _ in pick) for pick in affordable)


distinct = st.lists(st.permutations(range(24)), min_size=1, max_size=1).flatmap(
    lambda orders: st.lists(pairs, min_size=12, max_size=12).map(
        lambda costs: [
            [(orders[0][4 * layer + at] / 24, costs[4 * layer + at]) for at in range(4)] for layer in range(3)
        ]
    )
)


@settings(max_examples=200, deadline=None)
@given(distinct, pairs.map(lambda pair: (2 * pair[0], 2 * pair[1])))
def test_joint_is_lexicographic_where_errors_differ(table: Joint, limits: tuple[int, int]) -> None:
    affordable = [
        sorted((e for e, _ in pick), reverse=True)
        for pick in product(*table)
        if all(sum(cost[axis] for _, cost in pick) <= limits[axis] for axis in (0, 1))
    ]
    if affordable:
        chosen = joint(table, limits)
        picked = [layer[index][0] for layer, index in zip(table, chosen, strict=True)]
        assert sorted(picked, reverse=True) == min(affordable)


def test_joint_needs_the_integer_program_in_the_duality_gap() -> None:
    # On paper: no price makes (6, 6) a layer's cheapest option, as (0, 10) and (10, 0) cost 5 on average. Yet both
    # limits hold at error 0.2 only if both layers take it.
    layer = [(0.1, (0, 10)), (0.2, (6, 6)), (0.3, (10, 0))]
    assert joint([layer, layer], (12, 12)) == [1, 1]
    assert joint([[(0.2, (6, 6)), (0.3, (10, 0)), (0.4, (0, 10))]] * 2, (12, 12)) == [0, 0]

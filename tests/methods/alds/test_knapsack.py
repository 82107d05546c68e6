"""The least sum against brute force and against a table of every cost, under one limit and under two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from math import fsum
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.alds import knapsack
from methods.alds.knapsack import SumOptions, least_sum
from methods.base import Infeasible

# Few distinct losses and costs, so that ties between and within layers are common; costs need not fall with loss.
losses = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 1.5])


def tables(limits: int) -> st.SearchStrategy[list[list[tuple[float, tuple[int, ...]]]]]:
    costs = st.tuples(*[st.integers(0, 9)] * limits)
    return st.lists(st.lists(st.tuples(losses, costs), min_size=1, max_size=5), min_size=1, max_size=4)


problems = st.integers(1, 2).flatmap(
    lambda count: st.tuples(tables(count), st.lists(st.integers(0, 30), min_size=count, max_size=count))
)


def every_sum(table: Sequence[SumOptions], limits: Sequence[int]) -> list[float]:
    """The summed loss of every choice within the limits: the slow, obvious way."""
    return [
        sum(loss for loss, _ in pick)
        for pick in product(*table)
        if all(sum(cost[at] for _, cost in pick) <= limit for at, limit in enumerate(limits))
    ]


@settings(max_examples=300, deadline=None)
@given(problems)
def test_it_is_the_brute_force_optimum(problem: tuple[list[SumOptions], list[int]]) -> None:
    table, limits = problem
    affordable = every_sum(table, limits)
    if not affordable:
        with pytest.raises(Infeasible, match="no choice keeps every limit") as caught:
            least_sum(table, limits)
        least = [sum(min(cost[at] for _, cost in layer) for layer in table) for at in range(len(limits))]
        assert list(caught.value.least.values()) == least
        return
    picks, loss, bound = least_sum(table, limits)
    picked = [layer[at] for layer, at in zip(table, picks, strict=True)]
    assert all(sum(cost[at] for _, cost in picked) <= limit for at, limit in enumerate(limits))
    assert loss == bound == fsum(one for one, _ in picked) == min(affordable)


@settings(max_examples=100, deadline=None)
@given(problems, st.randoms(use_true_random=False))
def test_the_order_of_layers_and_options_does_not_matter(
    problem: tuple[list[SumOptions], list[int]], random: Random
) -> None:
    table, limits = problem
    shuffled = [random.sample(list(layer), len(layer)) for layer in random.sample(table, len(table))]
    if every_sum(table, limits):
        assert least_sum(shuffled, limits).loss == least_sum(table, limits).loss


def cut_network(layers: int, ranks: int, seed: int) -> list[list[tuple[float, tuple[int, int]]]]:
    """Layers of falling, convex-ish, noisy losses; every layer trades the two costs at its own rate."""
    generator = np.random.default_rng(seed)
    table = []
    for _ in range(layers):
        energy = np.sort(generator.exponential(size=ranks))[::-1].cumsum()
        rate, unit = generator.integers(1, 5), generator.integers(1, 4)
        lost = generator.exponential() * (1 - energy / energy[-1])
        table.append([(float(lost[j]), (int(unit * j), int(unit * rate * j))) for j in range(ranks)])
    return table


def by_dynamic_programming(table: Sequence[SumOptions], limit: int) -> float:
    """The least sum for one limit: the best loss of every total cost, layer after layer."""
    best = np.full(limit + 1, np.inf)
    best[0] = 0
    for layer in table:
        after = np.full(limit + 1, np.inf)
        for loss, (cost, *_) in layer:
            if cost <= limit:
                after[cost:] = np.minimum(after[cost:], best[: limit + 1 - cost] + loss)
        best = after
    return float(best.min())


@pytest.mark.parametrize("seed", range(6))
def test_many_layers_agree_with_dynamic_programming(seed: int) -> None:
    table = [[(loss, cost[:1]) for loss, cost in layer] for layer in cut_network(30, 40, seed)]
    dense = sum(layer[-1][1][0] for layer in table)
    for share in (0.1, 0.3, 0.7):
        limit = int(share * dense)
        assert least_sum(table, [limit]).loss == pytest.approx(by_dynamic_programming(table, limit), abs=1e-12)


def test_a_second_limit_that_does_not_bind_changes_nothing() -> None:
    table = cut_network(30, 40, seed=7)
    alone = least_sum([[(loss, cost[:1]) for loss, cost in layer] for layer in table], [700])
    both = least_sum(table, [700, 10**9])
    assert both.loss == pytest.approx(alone.loss, abs=1e-12)
    tighter = least_sum(table, [700, sum(layer[at][1][1] for layer, at in zip(table, both.picks, strict=True)) - 1])
    assert tighter.loss > both.loss


def test_a_search_cut_short_still_says_what_it_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    # Layers of a pyramid: maps shrink fourfold where widths double, and no unit of cost divides another.
    table = []
    for layer in range(8):
        unit, power = 101 * 2 ** (layer // 2) + layer, 2 + layer % 7 / 2
        losses = [(1 - j / 60) ** power for j in range(61)]
        table.append([(loss, (unit * j, unit * j * 4 ** (3 - layer // 2))) for j, loss in enumerate(losses)])
    dense = [sum(layer[-1][1][at] for layer in table) for at in (0, 1)]
    limits = [[int(share * dense[0]), int(0.3 * dense[1])] for share in (0.33, 0.36)]
    exact = [least_sum(table, both) for both in limits]
    assert all(one.bound == one.loss for one in exact)
    monkeypatch.setattr(knapsack, "_NODES", 1)
    short = [least_sum(table, both) for both in limits]
    assert all(one.bound <= best.loss <= one.loss < one.bound + 0.2 for one, best in zip(short, exact, strict=True))
    assert any(one.bound < one.loss for one in short)


@pytest.mark.parametrize("limits", [1, 2])
def test_a_larger_limit_is_never_worse(limits: int) -> None:
    table = [[(loss, cost[:limits]) for loss, cost in layer] for layer in cut_network(20, 30, seed=3)]
    found = [least_sum(table, [limit] * limits).loss for limit in range(300, 1500, 60)]
    assert all(before >= after for before, after in pairwise(found))


def test_large_costs_are_kept_to_the_unit() -> None:
    # One unit too little for both cheap steps: the second best has to do.
    big = 3 * 10**9
    layer = [(0.0, (big,)), (0.25, (big - 7,)), (1.0, (1,))]
    assert least_sum([layer, layer], [2 * big - 7]).loss == 0.25
    assert least_sum([layer, layer], [2 * big - 8]).loss == 0.5


@pytest.mark.parametrize("table", [[[]], [[(float("nan"), (1,))]], [[(float("inf"), (1,))]]])
def test_no_option_or_no_number_is_refused(table: list[SumOptions]) -> None:
    with pytest.raises(ValueError, match="expected at least one and finite losses"):
        least_sum(table, [5])


def test_no_layer_is_no_choice() -> None:
    assert least_sum([], [0]) == ([], 0.0, 0.0)

"""Allocation of widths over bare costs: exact elimination, the candidate path, proven bounds, published lists."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from methods.allocation.grid import Charge, Grid, ascend, cliques, largest_table, maximise, tables
from methods.allocation.path import build_path, distinct, evaluate, price_bound, share, uniform
from methods.itpruner.relaxation import Worth, upper_bound
from methods.network.widths import WidthCost
from tests.methods.allocation.itpruner_vectors import VECTORS, Vector
from tests.methods.itpruner.authors import reference_rates, reference_widths
from tests.methods.itpruner.continuous import continuous

OBJECTIVES = ("quadratic", "linear", "log")
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
seeds = st.integers(0, 2**32 - 1)

CHAIN = ((0, 1), (1, 2))
LOOP = ((0, 1), (1, 2), (0, 2), (2, 3), (1, 1))


def network(base: Sequence[int], edges: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, WidthCost]:
    """Costs of a made-up network whose layers join the groups of `edges`."""
    rng = np.random.default_rng(seed)
    macs, params = np.zeros((2, len(base), len(base)), dtype=np.int64)
    for one, two in edges:
        params[one, two] += 9
        macs[one, two] += 9 * int(rng.integers(1, 65))
    linear = rng.integers(1, 2000, len(base))
    return {"macs": WidthCost(1000, linear, macs), "params": WidthCost(10, np.full(len(base), 29), params)}


def worths(objective: str, groups: int, seed: int = 0, floor: float = 0.2) -> Worth:
    weights = np.random.default_rng(seed).uniform(0.5, 1.5, groups)
    return Worth(objective, tuple((weights / weights.mean()).tolist()), floor)  # type: ignore[arg-type]


def grid_of(base: Sequence[int], worth: Worth, step: int) -> Grid:
    widths = tuple(np.array([*range(step, b, step), b]) for b in base)
    return Grid(widths, tuple(worth(g, w / w[-1]) for g, w in enumerate(widths)))


def all_levels(grid: Grid) -> np.ndarray:
    return np.array(list(itertools.product(*(range(len(widths)) for widths in grid.widths))))


def rates_of(charge: Charge, base: np.ndarray) -> Charge:
    return Charge(charge.linear * base, charge.pairs * np.outer(base, base))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 5))
def test_elimination_finds_what_brute_force_finds(seed: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    widths = tuple(np.sort(rng.choice(20, size=rng.integers(1, 5), replace=False) + 1) for _ in range(groups))
    grid = Grid(widths, tuple(np.sort(rng.random(len(w))) for w in widths))
    charge = Charge(
        rng.random(groups) / 100, np.triu(rng.random((groups, groups)) * (rng.random((groups, groups)) < 0.5)) / 500
    )
    order = cliques(charge.pairs, [len(w) for w in widths])
    levels = all_levels(grid)
    prices = np.array([0.0, 0.3, 1.0, 7.0])
    every = maximise(grid, order, tables(grid, charge, order), prices)
    for price, found in zip(prices, every, strict=True):
        values = grid.gain(levels) - price * charge(grid.pick(levels))
        climbed = ascend(grid, charge.times(price), grid.top)
        assert grid.gain(found) - price * charge(grid.pick(found)) == pytest.approx(values.max(), abs=1e-12)
        assert grid.gain(climbed) - price * charge(grid.pick(climbed)) <= values.max() + 1e-12


def test_a_residual_stage_is_eliminated_in_tables_of_three_groups() -> None:
    blocks = 10
    pairs = np.zeros((2 * blocks + 2,) * 2)
    for block in range(blocks):
        one, two = 2 + 2 * block, 3 + 2 * block
        for edge in ((0 if block == 0 else 1, one), (one, two), (1, two), (0, 1)):
            pairs[min(edge), max(edge)] = 1
    assert largest_table(cliques(pairs, [8] * len(pairs)), [8] * len(pairs)) == 8**3


@every_objective
@pytest.mark.parametrize(("base", "edges"), [((16, 24, 32), CHAIN), ((8, 12, 8, 6), LOOP)])
def test_the_path_and_both_bounds_hold_brute_force_between_them(
    objective: str, base: Sequence[int], edges: Sequence[tuple[int, int]]
) -> None:
    costs, worth = network(base, edges), worths(objective, len(base))
    grid = grid_of(base, worth, 2)
    path, full = build_path(grid, costs), np.array(base)
    levels = all_levels(grid)
    gains, prices = grid.gain(levels), {name: evaluate(cost, grid.pick(levels)) for name, cost in costs.items()}
    charges = {name: share(cost, full) for name, cost in costs.items()}
    rates = {name: rates_of(charge, full) for name, charge in charges.items()}
    shortfalls = []
    for macs, params in itertools.product((0.1, 0.25, 0.4, 0.6, 0.8), (0.3, 0.7, None)):
        shares = {"macs": macs} | ({"params": params} if params else {})
        limits = {name: int(part * costs[name](full)) for name, part in shares.items()}
        best = gains[np.all([prices[name] <= limit for name, limit in limits.items()], axis=0)].max()
        chosen = path.select(limits)
        assert chosen is not None
        assert path.gains[chosen] <= best
        shortfalls.append((best - path.gains[chosen]) / np.ptp(gains))
        left = {name: (limit - costs[name].constant) / costs[name](full) for name, limit in limits.items()}
        smallest = np.array([widths[0] for widths in grid.widths]) / full
        assert upper_bound(worth, rates, left, smallest) >= best
        assert best - 1e-12 <= price_bound(grid, charges, left) <= best + 0.1 * np.ptp(gains)
    assert max(shortfalls) <= 0.02
    assert np.mean(shortfalls) <= 0.004


@every_objective
def test_a_larger_budget_never_gets_a_worse_plan(objective: str) -> None:
    base = (16, 24, 32, 24)
    costs = network(base, LOOP, seed=1)
    path = build_path(grid_of(base, worths(objective, 4), 3), costs)
    full = {name: cost(np.array(base)) for name, cost in costs.items()}
    shares = np.linspace(0.2, 1, 50)
    for fixed in ({}, {"params": full["params"] // 2}):
        gains = [path.gains[path.select({"macs": int(part * full["macs"])} | fixed)] for part in shares]
        assert gains == sorted(gains)
        for part in shares[::7]:
            chosen = path.select({"macs": int(part * full["macs"])} | fixed)
            assert path.costs["macs"][chosen] == costs["macs"](path.widths[chosen]) <= part * full["macs"]
    assert path.widths[path.select(full)].tolist() == list(base)
    assert path.select({"macs": path.least()["macs"]}) is not None
    assert path.select({"macs": path.least()["macs"] - 1}) is None


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(OBJECTIVES))
def test_dense_graphs_get_plans_between_the_uniform_one_and_the_bound(seed: int, objective: str) -> None:
    base = np.array([32] * 6)
    edges = list(itertools.combinations(range(6), 2))
    costs, worth = network(base.tolist(), edges, seed), worths(objective, 6, seed)
    grid = grid_of(base.tolist(), worth, 2)
    path = build_path(grid, {"macs": costs["macs"]})
    limit = int(0.4 * costs["macs"](base))
    same = [grid.gain(levels) for levels in uniform(grid) if costs["macs"](grid.pick(levels)) <= limit]
    charge = rates_of(share(costs["macs"], base), base)
    left = {"macs": (limit - costs["macs"].constant) / costs["macs"](base)}
    bound = upper_bound(worth, {"macs": charge}, left, np.full(6, 1 / 16))
    chosen = path.select({"macs": limit})
    assert max(same) <= path.gains[chosen] <= bound


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_a_network_in_other_units_gets_the_same_widths(factor: float) -> None:
    base = (16, 24, 32)
    costs, worth = network(base, CHAIN), worths("quadratic", 3)
    grid = grid_of(base, worth, 2)
    scaled = Grid(grid.widths, tuple(gains * factor for gains in grid.gains))
    limits = {"macs": int(0.4 * costs["macs"](np.array(base)))}
    plans = [path.widths[path.select(limits)].tolist() for path in (build_path(g, costs) for g in (grid, scaled))]
    assert plans[0] == plans[1]


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 23))
def test_distinct_rows_are_numpys(seed: int, groups: int) -> None:
    levels = np.random.default_rng(seed).choice([0, 1, 63], size=(50, groups), p=[0.1, 0.1, 0.8])
    np.testing.assert_array_equal(distinct(levels), np.unique(levels, axis=0))


def test_one_group_gets_the_widest_level_that_fits() -> None:
    cost = {"macs": WidthCost(7, np.array([10]), np.array([[3]]))}
    path = build_path(grid_of([32], Worth("quadratic", (1.0,), 0.2), 4), cost)
    for limit in range(cost["macs"](np.array([4])), cost["macs"](np.array([32])), 97):
        widest = max(w for w in range(4, 33, 4) if cost["macs"](np.array([w])) <= limit)
        assert path.widths[path.select({"macs": limit})].tolist() == [widest]


@pytest.mark.parametrize("objective", ["quadratic", "log"])
def test_the_soft_floor_shares_a_small_budget(objective: str) -> None:
    base, weights = np.array([64] * 5), (0.2, 0.6, 1.0, 1.4, 1.8)
    costs = network(base.tolist(), [(g, g + 1) for g in range(4)])
    limits = {"macs": int(0.12 * costs["macs"](base))}

    def narrowest(floor: float) -> float:
        path = build_path(grid_of(base.tolist(), Worth(objective, weights, floor), 1), costs)  # type: ignore[arg-type]
        return float(path.widths[path.select(limits)].min() / 64)

    assert narrowest(0.0) < 0.17 <= narrowest(0.2)


@every_objective
@pytest.mark.parametrize("part", [0.15, 0.4, 0.7])
def test_the_continuous_solve_lies_between_a_fine_grid_and_its_bound(objective: str, part: float) -> None:
    base = np.array([32, 32, 32])
    costs, worth = network(base.tolist(), LOOP[:3]), worths(objective, 3, floor=0.0)
    charge = rates_of(share(costs["macs"], base), base)
    low = np.full(3, 0.25)
    limits = {"macs": part * float(charge(np.ones(3)))}
    found = continuous(worth, {"macs": charge}, limits, low)
    grid = low + (1 - low) * np.array(list(itertools.product(np.linspace(0, 1, 31), repeat=3)))
    values = sum(worth(g, grid[:, g]) for g in range(3))
    best = values[charge(grid) <= limits["macs"]].max()
    assert best - 1e-5 <= found.value <= found.bound
    assert charge(found.rates) <= limits["macs"]
    assert (low <= found.rates).all()
    assert found.rates.max() <= 1
    assert found.value == pytest.approx(worth.total(found.rates))


def test_the_continuous_solve_beats_one_solve_from_full_width_and_refuses_a_floor_too_high() -> None:
    table = VECTORS["mobilenet_150m"].table()
    charge, worth = table.charge(), worths("linear", 14, seed=3, floor=0.0)
    limits, low = {"macs": 0.3 * float(charge(np.ones(14)))}, np.full(14, 0.1)
    alone = minimize(
        lambda x: -worth.total(x),
        np.ones(14),
        method="SLSQP",
        bounds=[(0.1, 1)] * 14,
        constraints={"type": "ineq", "fun": lambda x: 1 - float(charge(x)) / limits["macs"]},
    )
    found = continuous(worth, {"macs": charge}, limits, low)
    assert -alone.fun - 1e-6 <= found.value <= found.bound <= 1.05 * found.value
    with pytest.raises(ValueError, match="lower the floor"):
        continuous(worth, {"macs": charge}, limits, np.full(14, 0.9))


def test_noise_moves_continuous_quadratic_widths_little() -> None:
    charge = VECTORS["resnet20_20m"].table().charge()
    limits, low = {"macs": 0.4 * float(charge(np.ones(9)))}, np.full(9, 0.1)
    relative = np.linspace(0.8, 1.2, 9)
    noisy = relative * (1 + 0.01 * np.cos(np.arange(9)))
    rates = [
        continuous(Worth("quadratic", tuple(np.exp(1 - t)), 0.2), {"macs": charge}, limits, low).rates
        for t in (relative, noisy)
    ]
    assert 0 < abs(rates[0] - rates[1]).max() < 0.1


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_the_reference_solver_returns_the_published_widths_without_any_importance(vector: Vector) -> None:
    table = vector.table()
    charge = table.charge()
    for weights in (np.zeros(len(table.base)), 1e-9 * np.linspace(0, 1, len(table.base))):
        rates = reference_rates([(charge, vector.target)], weights)
        assert np.around(rates * table.base).astype(int).tolist() == vector.widths
    assert charge(np.array(vector.widths) / table.base) == pytest.approx(vector.constrained, abs=0.01)


@pytest.mark.parametrize("limited", [("macs",), ("macs", "params")])
def test_the_reference_widths_keep_every_limit(limited: Sequence[str]) -> None:
    base, costs = np.array([16, 24, 32]), network((16, 24, 32), CHAIN)
    grid = grid_of(base.tolist(), worths("linear", 3), 2)
    for part in (0.3, 0.6, 1.0):
        limits = {name: int(part * costs[name](base)) for name in limited}
        widths = reference_widths(grid, costs, [1.0, 1.0, 1.0], limits)
        assert all(width in options for width, options in zip(widths, grid.widths, strict=True))
        assert all(costs[name](widths) <= limit for name, limit in limits.items())
    assert widths.tolist() == base.tolist()


def test_the_table_of_resnet20_costs_what_the_released_code_says() -> None:
    table = VECTORS["resnet20_20m"].table()
    assert table.charge()(np.ones(9)) == pytest.approx(41.06, abs=0.005)

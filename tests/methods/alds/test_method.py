"""ALDS: plans that say the truth about their student, and the layers that are scored, chosen and left alone."""

from __future__ import annotations

import copy
import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.alds import ALDS
from methods.alds.spectra import MEASURES, SCHEMES
from methods.alds.whitening import FITTED
from methods.base import Budget, Infeasible, Plan, ScoreError, Scores
from methods.network import Layer, Profile, count_macs, count_params, profile
from methods.refit import refit
from methods.training import recalibrate
from tests.methods.alds.test_spectra import merged
from tests.support.networks import NETWORKS, fits

CALIBRATION = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
measures = st.sampled_from([*MEASURES, *FITTED])


def scored(network: nn.Module) -> tuple[Profile, Scores]:
    rows = profile(network, EXAMPLE)
    partials = [ALDS().score(shard, network, CALIBRATION, seed=0) for shard in ALDS().shards(rows, CALIBRATION)]
    return rows, ALDS().merge(partials, rows)


def spectra(rows: Profile, method: ALDS | None = None) -> list[tuple[str, int, int]]:
    """Every (layer, slices, scheme) that is scored without data."""
    shards = (method or ALDS()).shards(rows, CALIBRATION)
    return [task for kind, *tasks in shards if kind == "spectra" for task in tasks]


@cache
def zoo(name: str) -> tuple[nn.Module, Profile, Scores]:
    network = NETWORKS[name]()
    return network, *scored(network)


# Plans


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(NETWORKS)),
    measures,
    st.sampled_from(["0", "all"]),
    st.floats(0.05, 1.1),
    st.one_of(st.none(), st.floats(0.05, 1.1)),
    st.sampled_from([1, 8]),
)
def test_the_plan_says_what_its_student_costs(
    name: str, measure: str, schemes: str, macs: float, params: float | None, channels: int
) -> None:
    network, rows, scores = zoo(name)
    limit = None if params is None else int(params * rows.params)
    budget = Budget("drawn", int(macs * rows.macs), limit, channels)
    try:
        plan = ALDS().allocate(scores, rows, budget, {"measure": measure, "schemes": schemes})
    except Infeasible:
        return
    student = ALDS().apply(network, Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    fitted = ALDS().apply(network, plan, CALIBRATION)
    for one in (student, fitted):
        assert (plan.macs, plan.params) == (count_macs(one, EXAMPLE), count_params(one))
    student.load_state_dict(fitted.state_dict())
    assert torch.equal(student(EXAMPLE), fitted(EXAMPLE))
    assert fits(budget, plan.macs, plan.params)
    assert (
        plan.bound == plan.loss == ALDS().allocate(scores, rows, budget, {"measure": measure, "schemes": schemes}).loss
    )
    assert student(EXAMPLE).shape == network(EXAMPLE).shape
    if schemes == "0" or measure in FITTED:
        assert {choice["scheme"] for choice in plan.choices["layers"]} <= {0}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(NETWORKS)), measures, st.booleans())
def test_a_larger_budget_is_never_worse(name: str, measure: str, is_joint: bool) -> None:
    _, rows, scores = zoo(name)
    losses = []
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        budget = Budget("rising", int(share * rows.macs), int(share * rows.params) if is_joint else None)
        try:
            losses.append(ALDS().allocate(scores, rows, budget, {"measure": measure}).loss)
        except Infeasible:
            assert not losses
    assert all(before >= after for before, after in pairwise(losses))
    assert losses[-1] == 0


@torch.no_grad()
def test_the_loss_is_the_sum_of_the_students_squared_errors() -> None:
    network, rows, scores = zoo("residual")
    plan = ALDS().allocate(scores, rows, Budget("half", rows.macs // 2), {"measure": "fro"})
    student = ALDS().apply(network, plan)
    lost = []
    for choice in plan.choices["layers"]:
        weight, pair = network.get_submodule(choice["name"]).weight, student.get_submodule(choice["name"])
        dense = merged(pair, choice["slices"]) if weight.ndim == 4 else _linear_weight(pair, weight.shape[1])
        lost.append(float((dense - weight.double()).norm() / weight.double().norm()))
    assert sum(error**2 for error in lost) == pytest.approx(plan.loss, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("measure", FITTED)
def test_calibration_images_bring_the_student_closer_and_leave_the_teacher(measure: str) -> None:
    network = NETWORKS["residual"]()
    recalibrate(network, CALIBRATION)
    rows, scores = scored(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plan = ALDS().allocate(scores, rows, Budget("half", rows.macs // 2), {"measure": measure})
    wanted = network(CALIBRATION)
    lost = []
    for images in (None, CALIBRATION):
        student = ALDS().apply(network, plan, images)
        ALDS().settle(student, plan, CALIBRATION)
        lost.append(float((student(CALIBRATION) - wanted).norm() / wanted.norm()))
    assert lost[1] < 0.95 * lost[0]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    again = ALDS().apply(network, plan, CALIBRATION), ALDS().apply(network, plan, CALIBRATION)
    assert torch.equal(again[0](EXAMPLE), again[1](EXAMPLE))


@torch.no_grad()
def test_the_largest_error_is_least_for_bounds() -> None:
    _, rows, scores = zoo("residual")
    limit = rows.macs // 2
    budget = Budget("half", limit)
    loss = ALDS().allocate(scores, rows, budget, {"measure": "rss"}).loss
    assert 0 < loss < 1
    options = _affordable_errors(scores, rows)
    cheapest = sum(min(cost for error, cost in layer if error <= loss) for layer in options)
    tighter = sum(min((cost for error, cost in layer if error < loss), default=10**12) for layer in options)
    fixed = rows.macs - sum(layer[0][1] for layer in options)
    assert fixed + cheapest <= limit < fixed + tighter


def _affordable_errors(scores: Scores, rows: Profile) -> list[list[tuple[float, int]]]:
    """Each layer's (rss, MACs), the layer itself first, from the scores and the students they lead to."""
    table = []
    for layer in rows.layers:
        options = [(0.0, layer.macs)]
        for name, slices, scheme in spectra(rows):
            if name == layer.name:
                curve, whole = scores[f"{name}|{slices}|{scheme}"], scores[f"{name}|1|{scheme}"]
                errors = MEASURES["rss"](curve, whole, slices).tolist()
                macs = [rank * _macs_of_a_rank(layer, slices, scheme) for rank in range(len(errors))]
                options += [pair for pair in zip(errors, macs, strict=True) if 0 < pair[1] <= layer.macs]
        table.append(options)
    return table


def _macs_of_a_rank(layer: Layer, slices: int, scheme: int) -> int:
    """Encoder: inputs times its kernel at every position of its map; decoder: outputs times its kernel times slices."""
    high, wide = layer.weight_shape[2:] or (1, 1)
    kernel, map_ = ([high, wide], list(layer.out_hw))
    rest = [1, 1]
    for axis in (0, 1):
        if scheme & 1 << axis:
            kernel[axis], rest[axis], map_[axis] = 1, kernel[axis], layer.in_hw[axis]
    encoder = layer.weight_shape[1] * layer.groups * kernel[0] * kernel[1] * map_[0] * map_[1]
    return encoder + slices * layer.weight_shape[0] * rest[0] * rest[1] * layer.out_hw[0] * layer.out_hw[1]


def _linear_weight(pair: nn.Module, width: int) -> Tensor:
    return (pair(torch.eye(width)) - pair(torch.zeros(1, width))).T.double()


@pytest.mark.parametrize("budget", [Budget("free"), Budget("all", 10**12, 10**12)])
def test_at_the_teachers_cost_nothing_changes(budget: Budget) -> None:
    network, rows, scores = zoo("residual")
    plan = ALDS().allocate(scores, rows, budget, {})
    assert (plan.choices["layers"], plan.loss, plan.macs, plan.params) == ([], 0.0, rows.macs, rows.params)
    assert torch.equal(ALDS().apply(network, plan)(EXAMPLE), network(EXAMPLE))


def test_ranks_follow_the_grid_of_the_device() -> None:
    _, rows, scores = zoo("plain")
    plan = ALDS(slices=(1,)).allocate(scores, rows, Budget("grid", rows.macs // 2, channels=4), {"schemes": "0"})
    ranks = {choice["name"]: choice["rank"] for choice in plan.choices["layers"]}
    assert ranks
    full = {layer.name: min(layer.weight_shape[0], int(np.prod(layer.weight_shape[1:]))) for layer in rows.layers}
    assert all(rank % min(4, max(1, full[name] // 8)) == 0 for name, rank in ranks.items())


def test_an_infeasible_budget_names_what_is_missing() -> None:
    _, rows, scores = zoo("plain")
    with pytest.raises(Infeasible) as caught:
        ALDS().allocate(scores, rows, Budget("pebble", 100, rows.params), {})
    least = caught.value.least
    assert str(caught.value).startswith(
        "budget 'pebble' allows 100 MACs (0.0% of the teacher), but alds reaches no less than"
    )
    assert f"{least['macs']:,} ({least['macs'] / rows.macs:.1%}), most of it in " in str(caught.value)
    assert str(caught.value).endswith("raise it or try another method")
    assert ALDS().allocate(scores, rows, Budget("least", least["macs"]), {}).macs <= least["macs"]
    with pytest.raises(Infeasible):
        ALDS().allocate(scores, rows, Budget("less", least["macs"] - 1), {})


# Scores


def test_shards_and_their_order_do_not_matter() -> None:
    network, rows, scores = zoo("grouped")
    tasks = [(kind, task) for kind, *tasks in ALDS().shards(rows, CALIBRATION) for task in tasks]
    assert len(tasks) == len(set(tasks)) == len(spectra(rows)) + len(rows.layers)
    partials = [ALDS().score(task, network, CALIBRATION, seed) for seed, task in enumerate(reversed(tasks))]
    again = ALDS().merge([*partials, partials[0]], rows)
    assert list(again) == list(scores)
    assert all(np.array_equal(again[key], scores[key]) for key in scores)


def test_small_networks_are_one_shard_and_large_ones_longest_first() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.Sequential(*[nn.Conv2d(3 if not i else 512, 512, 3) for i in range(3)])
            self.head = nn.Linear(512, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.convs(x).mean((2, 3)))

    assert [shard[0] for shard in ALDS().shards(zoo("residual")[1], EXAMPLE)] == ["spectra", "fitted"]
    rows = profile(Wide(), EXAMPLE[:1, :, :8, :8])
    shards = ALDS().shards(rows, EXAMPLE.expand(2, -1, -1, -1))
    sizes = [len(shard) - 1 for shard in shards]
    assert 2 < len(shards) < sum(sizes) / 2
    assert {task[0] for task in shards[0][1:]} <= {"convs.1", "convs.2"}
    # 4608 columns are 170 MB of second moments, so the two large layers never share a bundle.
    fitted = [{name for name, _ in tasks} for kind, *tasks in shards if kind == "fitted"]
    assert not any({"convs.1", "convs.2"} <= names for names in fitted)
    assert set.union(*fitted) == {"convs.0", "convs.1", "convs.2", "head"}


def test_missing_and_contradicting_scores_are_named() -> None:
    _, rows, scores = zoo("plain")
    key = next(iter(scores))
    with pytest.raises(ScoreError, match=r"1 scores are missing, first '0\|1\|0'"):
        ALDS().merge([{name: curve for name, curve in scores.items() if name != key}], rows)
    with pytest.raises(ScoreError, match=r"two scores of '0\|1\|0' differ"):
        ALDS().merge([scores, {key: scores[key] + 1}], rows)


def test_a_weight_that_is_not_finite_is_named() -> None:
    network = NETWORKS["plain"]()
    network[3].weight.data[0, 0, 0, 0] = float("nan")  # type: ignore[index, union-attr, operator]
    with pytest.raises(ScoreError, match="the weight of '3' holds NaN or infinity"):
        ALDS().score(("spectra", ("3", 1, 0)), network, EXAMPLE, 0)


def test_inputs_that_are_not_finite_are_named() -> None:
    network = NETWORKS["plain"]()
    network[1].weight.data[0] = float("inf")  # type: ignore[index, union-attr, operator]
    with pytest.raises(ScoreError, match="layer '3' reads NaN or infinity"):
        ALDS().score(("fitted", ("0", (1,)), ("3", (1, 2))), network, EXAMPLE, 0)


@pytest.mark.parametrize(("measure", "scheme"), [("refit", 0), ("white", 0), ("rss", 1), ("fro", 1)])
def test_a_layer_of_zeros_is_cut_for_free(measure: str, scheme: int) -> None:
    network = NETWORKS["plain"]()
    nn.init.zeros_(network[6].weight)  # type: ignore[index, arg-type]
    rows, scores = scored(network)
    plan = ALDS().allocate(scores, rows, Budget("free", rows.macs - 1), {"measure": measure})
    assert plan.loss == 0
    # On paper, one rank with stride 2 on 8 x 8: 3,968 MACs in scheme 0, 3,840 in 1 and 2, 6,144 in 3.
    assert plan.choices["layers"] == [{"name": "6", "slices": 1, "rank": 1, "scheme": scheme}]
    for images in (None, CALIBRATION):
        student = ALDS().apply(network, plan, images)
        if images is not None:
            ALDS().settle(student, plan, images)
            teacher, network = network, copy.deepcopy(network)
            refit(network, teacher, images)  # the layers that are left follow their norms
            ALDS().settle(network, plan, images)
        torch.testing.assert_close(student(EXAMPLE), network(EXAMPLE))


# Settings


def test_depthwise_and_protected_layers_are_left_alone() -> None:
    network, rows, _ = zoo("depthwise")
    method = ALDS(skip=("head",))
    tasks = {task[0] for _, *tasks in method.shards(rows, EXAMPLE) for task in tasks}
    depthwise = {layer.name for layer in rows.layers if layer.groups > 1}
    assert depthwise
    assert tasks == {layer.name for layer in rows.layers} - depthwise - {"head"}
    assert method.accepts(rows) is None
    assert "skip names hed" in str(ALDS(skip=("hed",)).accepts(rows))
    assert "no layer is left" in str(ALDS(skip=tuple(layer.name for layer in rows.layers)).accepts(rows))
    assert network.head.weight.shape == (10, 16)


def test_slice_counts_divide_the_channels_and_hold_the_papers() -> None:
    _, rows, _ = zoo("plain")
    counts = {name: sorted({k for n, k, _ in spectra(rows) if n == name}) for name in "0369"}
    # Three channels: 1 and 3. 24: the powers, and 3, 5, 7, 9 snapped to 3, 6 (over 4), 8 (over 6), 8.
    assert [counts["0"], counts["6"]] == [[1, 3], [1, 2, 3, 4, 6, 8]]
    assert {k for _, k, _ in spectra(rows, ALDS(slices=(4, 5)))} == {1, 4}
    fitted = {task for kind, *tasks in ALDS().shards(rows, EXAMPLE) if kind == "fitted" for task in tasks}
    assert {name: list(slices) for name, slices in fitted if name in "036"} == {name: counts[name] for name in "036"}


@pytest.mark.parametrize("wrong", [{"schemes": ()}, {"schemes": (4,)}, {"slices": (0,)}, {"slices": ()}])
def test_settings_out_of_range_are_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ALDS(**wrong)  # type: ignore[arg-type]
    without = ALDS(schemes=(1,))
    assert list(without.knobs["schemes"].options) == ["all"]
    assert (without.knobs["measure"].default, set(without.knobs["measure"].options)) == ("rss", set(MEASURES))
    assert {kind for kind, *_ in without.shards(zoo("plain")[1], EXAMPLE)} == {"spectra"}


@pytest.mark.parametrize(
    ("kernel", "expected"), [((1, 1), {0}), ((1, 3), {0, 2}), ((3, 1), {0, 1}), ((3, 3), {*SCHEMES})]
)
def test_schemes_that_coincide_are_tried_once(kernel: tuple[int, int], expected: set[int]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, kernel), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert {scheme for _, _, scheme in spectra(profile(network, EXAMPLE))} == expected

"""PRACTISE: plans that say the truth about their student, the first blocks to go, and the recovery."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methods.base import Budget, Infeasible, Plan, ScoreError, Scores
from methods.network import Profile, count_macs, count_params, profile
from methods.practise import PRACTISE, removable_blocks, select
from methods.practise.method import _pairs, interactions
from methods.practise.recoverability import Repair, observe, recoverability
from methods.practise.selection import pairwise_error
from methods.training import Recipe, recalibrate
from search.workload.data.samples import Arrays
from tests.methods.practise.test_blocks import DEEP, deep, silenced
from tests.support.networks import NETWORKS, _seeded, fits

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
selectors = st.sampled_from(["pairwise", "additive"])


def scored(network: nn.Module, repair: Repair = "sequential_ls") -> tuple[Profile, Scores]:
    method, rows = PRACTISE(repair, steps=2), profile(network, IMAGES[:2])
    partials = [method.score(shard, network, IMAGES, seed=0) for shard in method.shards(rows, IMAGES)]
    return rows, method.merge(partials, rows)


@cache
def ready(name: str) -> tuple[nn.Module, Profile, Scores]:
    return deep(name), *scored(deep(name))


# Plans


@settings(max_examples=40)
@given(st.sampled_from(sorted(DEEP)), selectors, st.floats(0.2, 1.1), st.one_of(st.none(), st.floats(0.2, 1.1)))
def test_the_plan_says_what_its_student_costs(name: str, selector: str, macs: float, params: float | None) -> None:
    network, rows, scores = ready(name)
    budget = Budget("drawn", int(macs * rows.macs), None if params is None else int(params * rows.params))
    try:
        plan = PRACTISE().allocate(scores, rows, budget, {"selector": selector})
    except Infeasible:
        least = {cost: getattr(rows, cost) - scores[cost].sum() for cost in budget.limits()}
        assert any(least[cost] > limit for cost, limit in budget.limits().items())
        return
    student = PRACTISE().apply(network, Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert (plan.macs, plan.params) == (count_macs(student, IMAGES), count_params(student))
    assert fits(budget, plan.macs, plan.params)
    assert student(IMAGES).shape == network(IMAGES).shape
    assert plan == PRACTISE().allocate(scores, rows, budget, {"selector": selector})


@pytest.mark.parametrize("name", ["residual", "bottleneck", "squeeze"])
@pytest.mark.parametrize("selector", ["pairwise", "additive"])
def test_the_chosen_blocks_are_the_best_of_all_subsets(name: str, selector: str) -> None:
    """Every budget that tells two sets apart, against all subsets of the network's blocks."""
    _, rows, scores = ready(name)
    q, errors = interactions(scores, selector), scores["recoverability"].tolist()
    assert len(errors) <= 8
    subsets = [set_ for size in range(len(errors) + 1) for set_ in combinations(range(len(errors)), size)]
    cost = {s: tuple(getattr(rows, c) - int(scores[c][list(s)].sum()) for c in ("macs", "params")) for s in subsets}
    loss = {s: pairwise_error(s, errors, q) for s in subsets}
    limits = sorted({*cost.values(), *((macs, rows.params) for macs, _ in cost.values())})
    for macs, params in limits:
        fitting = [s for s in subsets if cost[s][0] <= macs and cost[s][1] <= params]
        best = () if () in fitting else min(fitting, key=lambda s: loss[s])
        plan = PRACTISE().allocate(scores, rows, Budget("brute", macs, params), {"selector": selector})
        chosen = tuple(scores["blocks"].tolist().index(block) for block in plan.choices["blocks"])
        assert loss[chosen] == pytest.approx(loss[best], abs=1e-9)
        assert (plan.macs, plan.params) == cost[chosen]
        assert plan.bound == plan.loss == pytest.approx(max(0, loss[best]), abs=1e-9)
        distinct = sum(abs(loss[s] - loss[best]) < 1e-6 for s in fitting) == 1
        assert chosen == best or not distinct


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(0, 2**16), st.floats(0, 1))
def test_interactions_never_make_a_further_block_a_gain(count: int, seed: int, spread: float) -> None:
    """A joint error equal to the larger one is the worst case: every pair seems to lose nothing more."""
    random = np.random.default_rng(seed)
    alone = random.random(count)
    joint = np.maximum(alone[:, None], alone[None, :]) + spread * np.triu(random.random((count, count)), 1)
    scores = {"recoverability": alone, "joint": np.triu(joint) + np.triu(joint, 1).T}
    q = interactions(scores, "pairwise")
    assert np.array_equal(q, q.T)
    assert not interactions(scores, "additive").any()
    for size in range(count):
        for smaller in combinations(range(count), size):
            for other in set(range(count)) - set(smaller):
                larger = pairwise_error([*smaller, other], alone.tolist(), q)
                assert larger >= pairwise_error(smaller, alone.tolist(), q) - 1e-12


def test_interactions_on_paper() -> None:
    """Blocks 0 and 1 lose 0.1 beyond their sum, 0 and 2 as much less, which block 2 (0.05 alone) can only halve."""
    joint = np.array([[0.3, 0.6, 0.25], [0.6, 0.2, 0.25], [0.25, 0.25, 0.05]])
    q = interactions({"recoverability": joint.diagonal(), "joint": joint}, "pairwise")
    np.testing.assert_allclose(q, [[0, 0.1, -0.05], [0.1, 0, 0], [-0.05, 0, 0]], atol=1e-12)


@settings(max_examples=20)
@given(st.sampled_from(sorted(DEEP)), selectors, st.booleans())
def test_a_larger_budget_is_never_worse(name: str, selector: str, is_joint: bool) -> None:
    _, rows, scores = ready(name)
    losses = []
    for share in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0):
        budget = Budget("rising", int(share * rows.macs), int(share * rows.params) if is_joint else None)
        try:
            losses.append(PRACTISE().allocate(scores, rows, budget, {"selector": selector}).loss)
        except Infeasible:
            assert not losses
    assert all(before >= after for before, after in pairwise(losses))
    assert losses[-1] == 0


@torch.no_grad()
@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("budget", [Budget("free"), Budget("all", 10**12, 10**12)])
def test_at_the_teachers_cost_nothing_changes(name: str, budget: Budget) -> None:
    network, rows, scores = ready(name)
    for limits in (budget, Budget("exact", rows.macs, rows.params)):
        plan = PRACTISE().allocate(scores, rows, limits, {})
        assert (plan.choices, plan.loss, plan.macs, plan.params) == ({"blocks": {}}, 0.0, rows.macs, rows.params)
        assert torch.equal(PRACTISE().apply(network, plan)(IMAGES), network(IMAGES))


def test_the_least_cost_can_be_planned_and_one_less_cannot() -> None:
    network, rows, scores = ready("residual")
    for cost in ("macs", "params"):
        with pytest.raises(Infeasible) as caught:
            PRACTISE().allocate(scores, rows, Budget("pebble", **{cost: 1}), {})
        least = caught.value.least[cost]
        plan = PRACTISE().allocate(scores, rows, Budget("least", **{cost: least}), {})
        assert list(plan.choices["blocks"]) == removable_blocks(network, IMAGES[:2])
        assert getattr(plan, cost) == least
        with pytest.raises(Infeasible):
            PRACTISE().allocate(scores, rows, Budget("less", **{cost: least - 1}), {})


def test_an_infeasible_budget_names_what_is_missing() -> None:
    _, rows, scores = ready("residual")
    with pytest.raises(Infeasible) as caught:
        PRACTISE().allocate(scores, rows, Budget("pebble", 100, rows.params), {})
    least = caught.value.least["macs"]
    assert str(caught.value) == (
        f"budget 'pebble' allows 100 MACs (0.0% of the teacher), but practise reaches no less than "
        f"{least:,} ({least / rows.macs:.1%}), with all 5 removable blocks dropped; raise it or try a chain such as "
        "[practise, alds]"
    )


@torch.no_grad()
def test_a_student_survives_its_state_and_the_teacher_is_untouched() -> None:
    network, rows, scores = ready("depthwise")
    before = copy.deepcopy(network.state_dict())
    plan = PRACTISE().allocate(scores, rows, Budget("part", int(0.7 * rows.macs)), {})
    assert plan.choices["blocks"]
    student = PRACTISE().apply(network, plan, IMAGES)
    PRACTISE().settle(student, plan, IMAGES)
    again = PRACTISE().apply(network, plan)
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(IMAGES), student(IMAGES))
    assert not torch.equal(PRACTISE().apply(network, plan)(IMAGES), student(IMAGES))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# Scores


@pytest.mark.parametrize("repair", ["sequential_ls", "adaptor_sgd", "drop"])
def test_a_silent_block_is_the_first_to_go(repair: Repair) -> None:
    block = "body.7"
    network = silenced(deep("residual"), block)
    method = PRACTISE(repair, steps=2)
    rows, scores = scored(network, repair)
    assert scores["blocks"][scores["recoverability"].argmin()] == block
    assert (scores["recoverability"].min() == 0) == (repair != "adaptor_sgd")
    plan = method.allocate(scores, rows, Budget("some", rows.macs - 1), {})
    assert list(plan.choices["blocks"]) == [block]
    if repair != "adaptor_sgd":
        assert plan.loss == 0
        assert torch.equal(method.apply(network, plan)(IMAGES), network(IMAGES))


def test_scores_are_the_recoverabilities_of_singles_and_pairs() -> None:
    network, _, scores = ready("squeeze")
    names = scores["blocks"].tolist()
    seen = observe(network, IMAGES, dict(zip(names, scores["closings"].tolist(), strict=True)))
    assert names == DEEP["squeeze"][1]
    assert scores["recoverability"].tolist() == [recoverability(seen, [name]) for name in names]
    for i, j in combinations(range(len(names)), 2):
        assert scores["joint"][i, j] == scores["joint"][j, i] == recoverability(seen, [names[i], names[j]])


@pytest.mark.parametrize("repair", ["sequential_ls", "adaptor_sgd"])
def test_shards_and_their_order_do_not_matter(repair: Repair) -> None:
    method = PRACTISE(repair, steps=3)
    network, rows = deep("bottleneck"), ready("bottleneck")[1]
    once = method.merge([method.score((0, 1), network, IMAGES, 5)], rows)
    partials = [method.score((part, 4), network, IMAGES, 5) for part in (2, 0, 3, 1)]
    again = method.merge([*partials, partials[0]], rows)
    assert list(again) == list(once)
    assert all(np.array_equal(again[key], once[key]) for key in once)


def test_missing_and_contradicting_scores_are_named() -> None:
    network, rows, _ = ready("squeeze")
    partial = PRACTISE().score((0, 1), network, IMAGES, 0)
    key = "error|body.3|body.4"
    with pytest.raises(ScoreError, match=r"1 scores are missing, first 'error\|body\.3\|body\.4'"):
        PRACTISE().merge([{name: value for name, value in partial.items() if name != key}], rows)
    with pytest.raises(ScoreError, match=r"two scores of 'error\|body\.3\|body\.4' differ"):
        PRACTISE().merge([partial, {key: partial[key] + 1}], rows)
    with pytest.raises(ScoreError, match="scores are missing"):
        PRACTISE().merge([], rows)


def test_shards_are_bundles_of_a_dozen() -> None:
    """Five blocks in `residual` and its inner sequences: 6 rows of blocks at most, 6 + 15 scores, two shards."""
    for name in DEEP:
        _, rows, scores = ready(name)
        parts = PRACTISE().shards(rows, IMAGES)
        count = len(scores["blocks"])
        assert parts == [(part, len(parts)) for part in range(len(parts))]
        assert len(parts) * 12 >= count + count * (count - 1) // 2


@pytest.mark.parametrize(("name", "limit", "measured"), [("MOST_IN_PAIRS", 4, 0), ("MOST_PAIRS", 5, 5)])
def test_of_many_pairs_the_neighbours_are_measured(
    monkeypatch: pytest.MonkeyPatch, name: str, limit: int, measured: int
) -> None:
    whole = scored(deep("residual"), "drop")[1]
    monkeypatch.setattr(f"methods.practise.method.{name}", limit)
    rows, scores = scored(deep("residual"), "drop")
    alone = scores["recoverability"]
    assert len(alone) == 5
    pairs = {(0, 1), (1, 2), (2, 3), (3, 4), (0, 2)} if measured else set()
    for one, two in combinations(range(5), 2):
        expected = whole["joint"][one, two] if (one, two) in pairs else alone[one] + alone[two]
        assert scores["joint"][one, two] == scores["joint"][two, one] == expected
    plan = PRACTISE("drop").allocate(scores, rows, Budget("part", int(0.7 * rows.macs)), {})
    assert plan.notes == (
        f"{measured} of 10 pairs of blocks were measured, neighbours first; the others' errors are added",
    )


def test_up_to_nine_blocks_are_measured_in_all_pairs() -> None:
    assert _pairs(9) == sorted(combinations(range(9), 2), key=lambda pair: pair[1] - pair[0])
    assert [len(_pairs(blocks)) for blocks in (0, 1, 10, 60, 61)] == [0, 0, 36, 36, 0]


# Networks without a block


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_only_networks_without_a_shape_keeping_module_are_refused(name: str) -> None:
    reason = PRACTISE().accepts(profile(NETWORKS[name](), IMAGES[:2]))
    if name in ("plain", "concat", "flatten"):
        assert reason is not None
        assert "no module of the network keeps the shape of its input" in reason
    else:
        assert reason is None


def test_a_network_without_a_removable_block_says_why() -> None:
    same = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    network = _seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), same, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    )
    rows, scores = scored(network)
    assert PRACTISE().accepts(rows) is None
    assert PRACTISE().allocate(scores, rows, Budget("all", rows.macs), {}).choices == {"blocks": {}}
    with pytest.raises(Infeasible) as caught:
        PRACTISE().allocate(scores, rows, Budget("half", rows.macs // 2), {})
    assert caught.value.least == {"macs": rows.macs}
    assert "because no block can be dropped (1: it does not add its input to what it computes)" in str(caught.value)


@pytest.mark.parametrize("wrong", [{"repair": "hope"}, {"steps": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        PRACTISE(**wrong)  # type: ignore[arg-type]


def test_the_additive_choice_is_the_public_one() -> None:
    _, rows, scores = ready("residual")
    plan = PRACTISE().allocate(scores, rows, Budget("part", int(0.6 * rows.macs)), {"selector": "additive"})
    chosen = select(scores["macs"].tolist(), scores["recoverability"].tolist(), rows.macs - int(0.6 * rows.macs))
    assert list(plan.choices["blocks"]) == scores["blocks"][chosen].tolist()


# Recovery


def test_mimicking_reads_no_label_and_leaves_the_classifier() -> None:
    """Labels of -1 would stop any loss that reads them."""
    network = copy.deepcopy(deep("residual"))
    recalibrate(network, IMAGES)
    rows, scores = scored(network)
    data = Arrays(IMAGES.numpy(), np.full(16, -1, dtype=np.int64), mirror=False)
    plan = PRACTISE().allocate(scores, rows, Budget("part", int(0.8 * rows.macs)), {})
    student = PRACTISE().apply(network, plan)
    raw = copy.deepcopy(student)
    before = copy.deepcopy(network.state_dict())
    recipe = Recipe(50, batch_size=16, learning_rate=0.05, labels=False, report_every=50)
    assert list(PRACTISE().recover(student, network, data, recipe, seed=0)) == [50]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    for key in ("head.weight", "head.bias"):
        assert torch.equal(student.state_dict()[key], before[key])
    assert not torch.equal(student.state_dict()["body.1.running_mean"], before["body.1.running_mean"])
    assert _lost(student, network) < 0.5 * _lost(raw, network)
    with pytest.raises(IndexError):
        list(PRACTISE().recover(student, network, data, replace(recipe, labels=True, distill=0.0), seed=0))


@torch.no_grad()
def _lost(student: nn.Module, teacher: nn.Module) -> float:
    wanted = teacher.get_submodule("body")(IMAGES)
    return float((student.get_submodule("body")(IMAGES) - wanted).square().mean() / wanted.var())

"""ManiDP: plans that say the truth, budgets met in expected MACs, and a recovery that follows its schedule."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.base import Budget, Infeasible, Plan, ScoreError, Scores
from methods.manidp import ManiDP
from methods.manidp.gates import Gated, saliencies
from methods.manidp.losses import quantile_threshold
from methods.manidp.objective import GatedObjective
from methods.manidp.thresholds import calibrate, set_quantiles
from methods.network import Profile, count_macs, count_params, profile
from methods.pipeline import WorkerInputs, rebuild, trial
from methods.protocol import defaults
from methods.training import Recipe, evaluate, recover, top1, train
from search.workload.data.samples import Arrays
from tests.support.networks import NETWORKS

METHOD = ManiDP()
networks = pytest.mark.parametrize("name", NETWORKS)


def images(count: int, seed: int) -> Tensor:
    """Images `(count, 3, 16, 16)` that differ in colour, contrast and detail."""
    generator = torch.Generator().manual_seed(seed)
    contrast, colour = torch.rand(count, 1, 1, 1, generator=generator), torch.rand(count, 3, 1, 1, generator=generator)
    return colour + (0.5 + contrast) * torch.randn(count, 3, 16, 16, generator=generator)


CALIBRATION = images(128, 0)


@cache
def case(name: str) -> tuple[nn.Module, Profile, Scores]:
    teacher = NETWORKS[name]()
    return teacher, *scored(teacher)


def scored(teacher: nn.Module) -> tuple[Profile, Scores]:
    rows = profile(teacher, CALIBRATION[:2])
    parts = [METHOD.score(shard, teacher, CALIBRATION, 0) for shard in METHOD.shards(rows, CALIBRATION)]
    return rows, METHOD.merge(parts, rows)


def plan_for(name: str, share: float, method: ManiDP = METHOD) -> Plan:
    _, rows, scores = case(name)
    return method.allocate(scores, rows, Budget("b", macs=int(share * rows.macs)), defaults(METHOD))


def plan_or_why(rows: Profile, scores: Scores, budget: Budget) -> Plan | Infeasible:
    try:
        return METHOD.allocate(scores, rows, budget, defaults(METHOD))
    except Infeasible as error:
        return error


def student_of(name: str, share: float, method: ManiDP = METHOD) -> Gated:
    return cast(Gated, method.apply(case(name)[0], plan_for(name, share, method)))


def expected_macs(student: Gated, data: Tensor = CALIBRATION) -> float:
    return float(student.instance_macs(data).double().mean())


# Plans


@settings(max_examples=25)
@given(st.sampled_from(sorted(NETWORKS)), st.floats(0.02, 1.2), st.one_of(st.none(), st.floats(0.8, 1.5)))
def test_the_plan_says_what_its_student_costs(name: str, macs: float, params: float | None) -> None:
    teacher, rows, scores = case(name)
    limit = None if params is None else int(params * rows.params)
    budget = Budget("drawn", macs=int(macs * rows.macs), params=limit)
    plan = plan_or_why(rows, scores, budget)
    if isinstance(plan, Infeasible):
        assert plan.least.keys() == budget.limits().keys()
        assert any(plan.least[cost] > limit for cost, limit in budget.limits().items())
        raised = {cost: max(limit, plan.least[cost]) for cost, limit in budget.limits().items()}
        assert isinstance(plan_or_why(rows, scores, Budget("raised", **raised)), Plan)
        return
    student = METHOD.apply(teacher, Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert (count_macs(student, CALIBRATION), count_params(student)) == (plan.macs, plan.params)
    assert (plan.macs_expected or plan.macs) <= int(macs * rows.macs)
    assert isinstance(student, Gated) == (macs < 1)
    assert plan.loss == pytest.approx(max(0.0, 1 - int(macs * rows.macs) / rows.macs))


@networks
def test_the_teachers_own_cost_gives_the_teacher(name: str) -> None:
    teacher, rows, scores = case(name)
    for budget in (Budget("own", macs=rows.macs, params=rows.params), Budget("free"), Budget("p", params=rows.params)):
        plan = METHOD.allocate(scores, rows, budget, defaults(METHOD))
        assert (plan.macs, plan.params, plan.loss, plan.macs_expected) == (rows.macs, rows.params, 0, None)
        student = METHOD.apply(teacher, plan)
        with torch.no_grad():
            assert torch.equal(student(CALIBRATION), teacher(CALIBRATION))


def test_expected_and_static_limits_are_both_met_in_expectation() -> None:
    _, rows, scores = case("residual")
    budget = Budget("b", macs=int(0.8 * rows.macs), macs_expected=int(0.6 * rows.macs))
    assert METHOD.allocate(scores, rows, budget, {}).macs_expected == int(0.6 * rows.macs)


def test_what_is_out_of_reach_says_why() -> None:
    _, rows, scores = case("plain")
    told = r"manidp reaches no less than .* with one channel per gate \(\d+ layers have none, the largest .*\);"
    with pytest.raises(Infeasible, match=told) as caught:
        METHOD.allocate(scores, rows, Budget("tiny", macs=1000), {})
    gates = 24 * (16 + 24) + 32 * (24 + 32)
    assert caught.value.least == {"macs": rows.macs - 576 * 16 * 24 - 144 * 24 * 32 + gates + 576 * 16 + 144}
    with pytest.raises(Infeasible, match=f"its gates add parameters, {gates + 24 + 32:,}") as caught:
        METHOD.allocate(scores, rows, Budget("same", macs=rows.macs // 2, params=rows.params), {})
    assert caught.value.least["params"] == rows.params + gates + 24 + 32
    with pytest.raises(Infeasible, match="removes no parameter"):
        METHOD.allocate(scores, rows, Budget("small", params=rows.params - 1), {})


def test_networks_without_a_place_for_gates_are_refused() -> None:
    narrow = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))
    assert "gates ungrouped convolutions of at least 8" in str(METHOD.accepts(scored(narrow.eval())[0]))

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.stem(x))
            return cast(Tensor, self.head((x if x.sum() > 0 else -x).mean((2, 3))))

    for model, reason in ((narrow, "0: it is the stem"), (Branching(), "torch.fx cannot trace the network")):
        rows, scores = scored(model.eval())
        with pytest.raises(Infeasible, match=f"found no convolution to gate .*{reason}"):
            METHOD.allocate(scores, rows, Budget("b", macs=rows.macs // 2), {})
        assert METHOD.allocate(scores, rows, Budget("own", macs=rows.macs), {}).loss == 0
    assert all(METHOD.accepts(case(name)[1]) is None for name in NETWORKS)


def test_scores_merge_to_one() -> None:
    _, rows, scores = case("plain")
    assert all(not array.dtype.hasobject for array in scores.values())
    merged = METHOD.merge([scores, scores], rows)
    assert all(np.array_equal(merged[key], scores[key]) for key in scores)
    with pytest.raises(ScoreError, match="differ"):
        METHOD.merge([scores, case("flatten")[2]], rows)
    with pytest.raises(ScoreError, match="scores are missing"):
        METHOD.merge([], rows)


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'quantile' or 'mean_rank'"):
        ManiDP(thresholds="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="squeeze is 0"):
        ManiDP(squeeze=0)


# Budgets in expected MACs


@networks
@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
def test_a_settled_student_meets_its_target(name: str, share: float) -> None:
    try:
        plan = plan_for(name, share)
    except Infeasible:
        assert name in ("grouped", "flatten")
        return
    student = student_of(name, share)
    METHOD.settle(student, plan, CALIBRATION)
    assert plan.macs_expected is not None
    assert 0.995 * plan.macs_expected <= expected_macs(student) <= plan.macs_expected
    unseen = student.instance_macs(images(256, 1)).double()
    noise = float(unseen.std()) * (1 / len(unseen) + 1 / len(CALIBRATION)) ** 0.5
    assert float(unseen.mean()) == pytest.approx(plan.macs_expected, abs=4 * noise)
    thresholds = [mask.threshold.clone() for mask in student.masks]
    calibrate(student, CALIBRATION, plan.macs_expected)
    assert all(torch.equal(mask.threshold, old) for mask, old in zip(student.masks, thresholds, strict=True))


def test_saliencies_that_are_all_the_same_never_leave_a_student_above_its_target() -> None:
    student, plan = student_of("residual", 0.75), plan_for("residual", 0.75)
    for gate in student.gates:
        nn.init.zeros_(gate.expand.weight)
    assert plan.macs_expected is not None
    calibrate(student, CALIBRATION, plan.macs_expected)
    assert expected_macs(student) <= plan.macs_expected


def test_the_least_target_is_reached() -> None:
    _, rows, scores = case("plain")
    with pytest.raises(Infeasible) as caught:
        METHOD.allocate(scores, rows, Budget("tiny", macs=0), {})
    least = caught.value.least["macs"]
    plan = METHOD.allocate(scores, rows, Budget("least", macs=least), {})
    student = cast(Gated, METHOD.apply(case("plain")[0], plan))
    METHOD.settle(student, plan, CALIBRATION)
    assert student.instance_macs(CALIBRATION).tolist() == [least] * len(CALIBRATION)


@pytest.mark.parametrize("name", ["residual", "depthwise", "plain"])
def test_expected_macs_rise_with_the_remain_rate(name: str) -> None:
    spent = []
    for rate in np.linspace(0.05, 1, 12):
        student = student_of(name, 0.9)
        for _ in range(4):
            set_quantiles(student, saliencies(student, CALIBRATION), rate)
        spent.append(expected_macs(student))
    assert all(after >= 0.99 * before for before, after in pairwise(spent))
    assert spent[-1] > 2 * spent[0]


# Students


@networks
def test_fresh_gates_are_the_same_each_time_and_keep_every_channel(name: str) -> None:
    torch.manual_seed(1)
    once = student_of(name, 0.9)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    twice = student_of(name, 0.9)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, twice.state_dict()[key]) for key, value in once.state_dict().items())
    assert all(bool((found > 0).all()) for found in saliencies(once, CALIBRATION))
    assert expected_macs(once) == count_macs(once, CALIBRATION)


# Recovery


def blobs(count: int, seed: int) -> Arrays:
    """Three classes of `(3, 16, 16)` images, told apart by the bright rows: separable, with noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    data = random.normal(0, 1.0, (count, 3, 16, 16)).astype(np.float32)
    for row in range(3):
        data[labels == row, :, 4 * row : 4 * row + 4] += 0.7
    return Arrays(data, labels, mirror=True)


@cache
def learnt() -> tuple[nn.Module, Profile, Scores]:
    teacher = NETWORKS["residual"]()
    list(train(teacher, blobs(512, 0), Recipe(40, batch_size=64, learning_rate=0.05), 0))
    return teacher, *scored(teacher)


RECIPE = Recipe(12, batch_size=32, learning_rate=0.02, report_every=5)


def recovered(method: ManiDP = METHOD, recipe: Recipe = RECIPE, seed: int = 0, share: float = 0.5) -> Gated:
    teacher, rows, scores = learnt()
    plan = method.allocate(scores, rows, Budget("half", macs=int(share * rows.macs)), defaults(method))
    student = cast(Gated, method.apply(teacher, plan))
    assert list(method.recover(student, teacher, blobs(512, 0), recipe, seed)) == [5, 10, 12]
    return student


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("thresholds", ["quantile", "mean_rank"])
def test_one_seed_gives_one_student_bit_for_bit(thresholds: str) -> None:
    method = ManiDP(thresholds=thresholds)  # type: ignore[arg-type]
    once = weights(recovered(method))
    assert torch.equal(once, weights(recovered(method)))
    assert not torch.equal(once, weights(recovered(method, seed=1)))


def test_a_trial_ends_with_a_student_that_meets_its_target_and_has_learnt() -> None:
    teacher, rows, scores = learnt()
    inputs = WorkerInputs(teacher, blobs(512, 0), blobs(256, 1), blobs(128, 2).images, top1)
    plan = METHOD.allocate(scores, rows, Budget("half", macs=rows.macs // 2), defaults(METHOD))
    run = trial(inputs, METHOD, plan, replace(RECIPE, steps=40, report_every=40), 0)
    assert [next(run).step, next(run).step] == [0, 40]
    with pytest.raises(StopIteration) as ended:
        next(run)
    outcome = ended.value.value
    assert outcome.top1_validation > outcome.top1_bn
    assert outcome.top1_validation > 0.9 * evaluate(teacher, inputs.validation, top1)
    assert plan.macs_expected is not None
    assert 0.995 * plan.macs_expected <= outcome.macs_expected <= plan.macs_expected
    assert outcome.macs_expected <= outcome.macs_worst <= outcome.macs == plan.macs
    student = rebuild(teacher, METHOD, plan, outcome.state)
    assert evaluate(student, inputs.validation, top1) == outcome.top1_validation


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"labels": False}, {"distill": 0.0}])
def test_every_recipe_trains(change: dict[str, str | bool | float]) -> None:
    student = recovered(recipe=replace(RECIPE, **change))  # type: ignore[arg-type]
    assert weights(student).isfinite().all()


def objective_of(
    method: ManiDP = METHOD, steps: int = 40
) -> tuple[Gated, GatedObjective, Iterator[tuple[Tensor, Tensor]]]:
    teacher, rows, scores = learnt()
    plan = method.allocate(scores, rows, Budget("half", macs=rows.macs // 2), defaults(method))
    student = cast(Gated, method.apply(teacher, plan))
    METHOD.settle(student, plan, CALIBRATION)
    data = blobs(64 * steps, 3)
    batches = (data.batch(np.arange(64 * step, 64 * step + 64)) for step in range(steps))
    return student, GatedObjective(student, teacher, replace(RECIPE, steps=steps)), batches


def test_the_rate_starts_at_one_and_reaches_its_end_before_the_hold() -> None:
    student, objective, batches = objective_of()
    assert all(float(mask.threshold) == 0 for mask in student.masks)
    rates = []
    for images_, labels in batches:
        objective(images_, labels)
        rates.append(objective.rate)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.99
    assert rates[23] == pytest.approx(objective.final)  # 60 % of 40 steps
    assert rates[22] > rates[23] + 1e-4
    share = [
        float((found >= mask.threshold).double().mean())
        for found, mask in zip(objective.latest, student.masks, strict=True)
    ]
    assert share == pytest.approx([objective.final] * len(share), abs=0.1)


def test_thresholds_are_at_the_final_rate_only_while_progress_is_told() -> None:
    student, objective, batches = objective_of()
    for _ in range(5):
        objective(*next(batches))
    before = [mask.threshold.clone() for mask in student.masks]
    with objective.at_the_final_rate():
        for mask, found in zip(student.masks, objective.latest, strict=True):
            assert torch.equal(mask.threshold, quantile_threshold(found, objective.final))
    assert all(torch.equal(mask.threshold, old) for mask, old in zip(student.masks, before, strict=True))


def test_mean_ranks_are_renewed_at_the_end_of_a_round() -> None:
    student, objective, batches = objective_of(ManiDP(thresholds="mean_rank"))
    means = []
    for step in range(1, 5):
        objective(*next(batches))
        means.append(objective.latest[0].mean(0))
        if step == 2:
            kept = [float(value) for value in (means[0] + means[1]) / 2]
            assert float(student.masks[0].threshold) == pytest.approx(sorted(kept)[0], abs=1e-6)
        if step == 3:
            assert float(student.masks[0].threshold) == pytest.approx(sorted(kept)[0], abs=1e-6)


def test_a_dead_gate_is_brought_back() -> None:
    student, objective, batches = objective_of()
    with torch.no_grad():
        student.gates[1].expand.bias.fill_(-0.25)
        student.gates[1].expand.weight.zero_()
    alive = student.gates[0].expand.bias.clone()
    for _ in range(6):
        objective(*next(batches))
    torch.testing.assert_close(student.gates[1].expand.bias.detach(), torch.full((16,), 0.05))
    assert torch.equal(student.gates[0].expand.bias, alive)


def test_the_regularisers_weigh_what_the_knobs_say() -> None:
    losses = {}
    for sparsity, similarity in ((0.0, 0.0), (0.5, 0.0), (0.0, 2.0)):
        teacher, rows, scores = learnt()
        knobs = {"sparsity": sparsity, "similarity": similarity, "hold": 0.4}
        plan = METHOD.allocate(scores, rows, Budget("half", macs=rows.macs // 2), knobs)
        objective = GatedObjective(cast(Gated, METHOD.apply(teacher, plan)), teacher, RECIPE)
        data = blobs(64, 3)
        losses[sparsity, similarity] = float(objective(*data.batch(np.arange(64))).detach())
        saliency = objective.latest
    plain = losses[0.0, 0.0]
    assert 0 < losses[0.5, 0.0] - plain < 0.5 * sum(float(found.mean()) for found in saliency)
    assert 0 < losses[0.0, 2.0] - plain < 2 * 4 * len(saliency)


def test_a_student_without_gates_is_recovered_as_any_other() -> None:
    teacher, rows, scores = learnt()
    plan = METHOD.allocate(scores, rows, Budget("own", macs=rows.macs), {})
    ours, theirs = METHOD.apply(teacher, plan), copy.deepcopy(teacher)
    METHOD.settle(ours, plan, CALIBRATION)
    assert list(METHOD.recover(ours, teacher, blobs(128, 0), replace(RECIPE, steps=3), 0)) == [3]
    list(recover(theirs, teacher, blobs(128, 0), replace(RECIPE, steps=3), 0))
    assert torch.equal(weights(ours), weights(theirs))

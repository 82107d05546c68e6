"""The zoo's networks, and every method's whole trial on them: from scores to a student that was saved and rebuilt."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods import METHODS
from methods.base import Budget, Infeasible, Plan, Scores
from methods.network import Profile, count_macs, count_params, profile
from methods.pipeline import Outcome, PlanMismatch, Progress, WorkerInputs, look, rebuild, score, trial
from methods.protocol import defaults
from methods.training import Recipe, evaluate
from search.workload import zoo
from search.workload.data.samples import Arrays

NETWORKS = ("resnet14", "resnet20", "mobilenet-cifar")
RECIPE = Recipe(3, batch_size=16, learning_rate=0.01, report_every=2)
methods = pytest.mark.parametrize("method", METHODS)
pairs = pytest.mark.parametrize(
    ("name", "method"),
    [pair for pair in product(NETWORKS, METHODS) if pair != ("mobilenet-cifar", "practise")],  # it has no blocks
)


def likelihood(logits: Tensor, labels: Tensor) -> float:
    """A metric that tells networks apart more sharply than top-1 does on a few images."""
    return -float(F.cross_entropy(logits, labels))


@cache
def bench(name: str) -> WorkerInputs:
    """An untrained network with lifelike norms, and random images `(1, 8, 8)`."""
    random = np.random.default_rng(0)
    teacher = zoo.build(name, 1, 10, seed=0).eval()
    for norm in teacher.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    samples = Arrays(random.random((48, 1, 8, 8), dtype=np.float32), random.integers(0, 10, 48))
    return WorkerInputs(teacher, samples, samples, samples.images[:32], likelihood)


@cache
def rows(name: str) -> Profile:
    return profile(bench(name).teacher, torch.from_numpy(bench(name).calibration))


@cache
def scores(name: str, method: str) -> Scores:
    chosen = METHODS[method]
    shards = chosen.shards(rows(name), torch.from_numpy(bench(name).calibration))
    return chosen.merge([score(bench(name), chosen, shard, 0) for shard in shards], rows(name))


def plan_for(name: str, method: str, macs: float | None = None, params: float | None = None) -> Plan:
    limits = Budget(
        "b",
        None if macs is None else int(macs * rows(name).macs),
        None if params is None else int(params * rows(name).params),
        channels=2,
    )
    return METHODS[method].allocate(scores(name, method), rows(name), limits, defaults(METHODS[method]))


def ended(run: Generator[Progress, None, Outcome]) -> tuple[list[Progress], Outcome]:
    steps = []
    while True:
        try:
            steps.append(next(run))
        except StopIteration as stop:
            return steps, stop.value


# The networks


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_reads_small_images(name: str, channels: int) -> None:
    network = zoo.build(name, channels, 7, seed=0).eval()
    for side in (8, 32):
        with torch.no_grad():
            assert network(torch.zeros(2, channels, side, side)).shape == (2, 7)


def test_the_cost_of_resnet20_on_paper() -> None:
    """Option B of He et al. on 32 x 32: by stage, convolutions at 32, 16 and 8 squared positions."""
    stem = 3 * 16 * 9
    first = 6 * 16 * 16 * 9
    second = (16 * 32 + 5 * 32 * 32) * 9 + 16 * 32
    third = (32 * 64 + 5 * 64 * 64) * 9 + 32 * 64
    norms = 2 * (16 * 7 + 32 * 7 + 64 * 7)
    network = zoo.build("resnet20", 3, 10, seed=0).eval()
    assert count_params(network) == stem + first + second + third + norms + 65 * 10 == 272_474
    macs = (stem + first) * 32**2 + second * 16**2 + third * 8**2 + 64 * 10
    assert count_macs(network, torch.zeros(1, 3, 32, 32)) == macs == 40_813_184


def test_one_seed_gives_one_network_and_leaves_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (zoo.build("resnet8", 1, 10, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["0.weight"], other["0.weight"])


# Every method on them


@pairs
def test_a_trial_from_scores_to_a_student_that_survives_its_file(name: str, method: str, tmp_path: Path) -> None:
    plan = plan_for(name, method, 0.5)
    steps, outcome = ended(trial(bench(name), METHODS[method], plan, RECIPE, 7))
    assert (outcome.macs, outcome.params) == (plan.macs, plan.params)
    assert (plan.macs_expected or plan.macs) <= 0.5 * rows(name).macs
    assert [step.step for step in steps] == [0, 2, 3]
    assert {step.steps for step in steps} == {3}
    if plan.macs_expected is None:
        assert outcome.top1_validation == steps[-1].top1
        assert outcome.macs_expected is outcome.macs_worst is None
    else:  # its thresholds are set once more, so the last step is not the last word
        assert outcome.macs_expected is not None
        assert outcome.macs_worst is not None
        assert 0.98 * plan.macs_expected <= outcome.macs_expected <= plan.macs_expected
        assert outcome.macs_expected <= outcome.macs_worst <= plan.macs
    assert outcome.size_bytes == sum(value.nbytes for value in outcome.state.values())
    safetensors.numpy.save_file(dict(outcome.state), tmp_path / "student.safetensors")
    read = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    student = rebuild(
        bench(name).teacher, METHODS[method], read, safetensors.numpy.load_file(tmp_path / "student.safetensors")
    )
    assert not student.training
    again = evaluate(student, bench(name).validation, likelihood)
    assert again == pytest.approx(outcome.top1_validation, rel=1e-5)


@methods
def test_one_seed_gives_one_outcome(method: str) -> None:
    plan = plan_for("resnet14", method, 0.4)
    first, again, other = (
        ended(trial(bench("resnet14"), METHODS[method], plan, RECIPE, seed))[1] for seed in (1, 1, 2)
    )
    assert all(np.array_equal(value, again.state[key]) for key, value in first.state.items())
    assert first.top1_surgery == other.top1_surgery
    assert first.top1_bn == other.top1_bn
    assert first.top1_validation != other.top1_validation


@methods
def test_without_recovery_the_norms_have_the_last_word(method: str) -> None:
    """Where no refit has set them."""
    plan = plan_for("resnet14", method, 0.4)
    as_cut = replace(bench("resnet14"), refit=False)
    steps, outcome = ended(trial(as_cut, METHODS[method], plan, replace(RECIPE, steps=0), 0))
    assert steps == []
    assert outcome.top1_validation == outcome.top1_bn
    assert outcome.top1_bn != outcome.top1_surgery


@methods
def test_who_only_looks_finds_what_a_trial_begins_with(method: str) -> None:
    plan, inputs = plan_for("resnet14", method, 0.4), bench("resnet14")
    _, outcome = ended(trial(inputs, METHODS[method], plan, replace(RECIPE, steps=0), 0))
    found = look(inputs, METHODS[method], plan)
    assert (found.top1_bn, found.top1_validation) == (outcome.top1_bn, outcome.top1_validation)
    assert (found.top1_surgery, found.state) == (None, {})
    assert (outcome.top1_bn == outcome.top1_surgery) is (method != "manidp")


def test_a_plan_that_misstates_its_cost_is_caught() -> None:
    plan = plan_for("resnet8", "uniform", 0.5)
    false = replace(plan, macs=plan.macs - 1)
    with pytest.raises(PlanMismatch, match=f"planned {plan.macs - 1} MACs .* but the student has {plan.macs}"):
        ended(trial(bench("resnet8"), METHODS["uniform"], false, RECIPE, 0))


@pairs
def test_a_larger_budget_never_gets_a_worse_plan(name: str, method: str) -> None:
    for grow in ("macs", "params"):
        losses = []
        for share in (0.02, 0.1, 0.25, 0.4, 0.6, 0.8, 0.95, 1.0):
            try:
                losses.append(plan_for(name, method, **{grow: share}).loss)
            except Infeasible:
                losses.append(np.inf)
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] == 0
        is_cut = method != "manidp" or grow == "macs"  # gates remove no parameter
        assert (losses[-2] < np.inf) == is_cut


@pairs
def test_at_the_teachers_own_cost_the_student_is_the_teacher(name: str, method: str) -> None:
    plan = plan_for(name, method, 1.0, 1.0)
    assert (plan.macs, plan.params) == (rows(name).macs, rows(name).params)
    images = torch.from_numpy(bench(name).calibration)
    teacher = bench(name).teacher
    with torch.no_grad():
        assert torch.equal(METHODS[method].apply(teacher, plan).eval()(images), teacher(images))


def test_wide_plain_networks_are_cut_as_well() -> None:
    """By their weights' norms, which need no scores: those of 4,608 columns take a minute."""
    costs, uniform = rows("vgg16-cifar"), METHODS["uniform"]
    plan = uniform.allocate({}, costs, Budget("b", int(0.3 * costs.macs), channels=2), {"criterion": "l1"})
    _, outcome = ended(trial(bench("vgg16-cifar"), uniform, plan, replace(RECIPE, steps=1), 0))
    assert outcome.macs == plan.macs <= 0.3 * costs.macs

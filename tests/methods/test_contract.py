"""The laws every method and chain obeys, on every wiring: the student has the cost of its plan."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from functools import cache, lru_cache

import pytest
import torch
from torch import Tensor, nn

from methods import METHODS, named
from methods.base import Budget, Infeasible, Plan, Scores
from methods.chain import Scored, plan_of, student_of
from methods.manidp.gates import Gated
from methods.network import Profile, count_macs, count_params, profile
from methods.pipeline import rebuild
from methods.protocol import Method, defaults
from tests.support.networks import NETWORKS

CHAINS = ("practise+alds", "channels+alds", "itpruner+manidp")
WITHOUT_BLOCKS = ("plain", "concat", "flatten")
REFUSED = [(method, network) for method in (*METHODS, *CHAINS) if "practise" in method for network in WITHOUT_BLOCKS]
EVERY = [pair for pair in itertools.product((*METHODS, *CHAINS), NETWORKS) if pair not in REFUSED]
SHARES = (0.9, 0.7, 0.5)

every = pytest.mark.parametrize(("method", "network"), EVERY)
every_link = pytest.mark.parametrize(("method", "network"), [pair for pair in EVERY if pair[0] in METHODS])


def images() -> Tensor:
    """Images `(24, 3, 16, 16)` with structure: smooth, and different from each other."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(24, 3, 4, 4, generator=generator)
    fine = torch.randn(24, 3, 16, 16, generator=generator)
    return nn.functional.interpolate(coarse, 16, mode="bilinear") + 0.3 * fine


def partials(method: Method, network: nn.Module, found: Profile) -> list[Scores]:
    return [method.score(shard, network, images(), 0) for shard in method.shards(found, images())]


def scored_on(teacher: nn.Module) -> Scored:
    """Score as the driver of a search does, without a cluster."""

    @lru_cache(maxsize=4)
    def profile_after(plans: str) -> tuple[nn.Module, Profile]:
        steps = [Plan.from_json(plan) for plan in json.loads(plans)]
        student = student_of(teacher, [(METHODS[plan.method], plan) for plan in steps], images())
        return student, profile(student, images())

    def scored(method: Method, plans: Sequence[Plan]) -> tuple[Scores, Profile]:
        student, found = profile_after(json.dumps([plan.to_json() for plan in plans]))
        if method.accepts(found):
            return {}, found
        return method.merge(partials(method, student, found), found), found

    return scored


@cache
def case(method: str, network: str) -> tuple[nn.Module, Profile, dict[float, Plan | Infeasible]]:
    """A teacher, its profile, and for each share of its MACs the plan, or the error if none fits."""
    teacher = NETWORKS[network]()
    found = profile(teacher, images())
    scored = lru_cache(maxsize=1)(scored_on(teacher)) if "+" not in method else scored_on(teacher)
    plans: dict[float, Plan | Infeasible] = {}
    for share in (*SHARES, 1.0):
        try:
            budget = Budget(f"{share:.0%}", macs=int(share * found.macs))
            plans[share] = plan_of(named(method), scored, budget, defaults(named(method)))
        except Infeasible as error:
            plans[share] = error
    return teacher, found, plans


@every
def test_the_student_costs_what_its_plan_says(method: str, network: str) -> None:
    teacher, found, plans = case(method, network)
    before = copy.deepcopy(teacher.state_dict())
    for share in SHARES:
        plan = plans[share]
        if isinstance(plan, Infeasible):
            assert plan.least["macs"] > int(share * found.macs)
            continue
        student = named(method).apply(teacher, plan, images())
        assert (count_macs(student, images()), count_params(student)) == (plan.macs, plan.params)
        assert (plan.macs if plan.macs_expected is None else plan.macs_expected) <= share * found.macs
        assert student(images()).isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@every
def test_the_teachers_own_cost_leaves_it_as_it_is(method: str, network: str) -> None:
    teacher, _, plans = case(method, network)
    plan = plans[1.0]
    assert isinstance(plan, Plan)
    assert plan.loss == 0
    student = named(method).apply(teacher, plan, images())
    torch.testing.assert_close(student(images()), teacher(images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "network"), REFUSED)
def test_a_network_it_cannot_handle_is_refused_with_a_reason(method: str, network: str) -> None:
    reason = named(method).accepts(profile(NETWORKS[network](), images()))
    assert reason is not None
    assert "block" in reason


@every_link
def test_a_larger_budget_is_never_worse(method: str, network: str) -> None:
    losses = [plan.loss for plan in case(method, network)[2].values() if isinstance(plan, Plan)]
    assert losses[:-1] == sorted(losses[:-1])


@every
def test_a_student_is_rebuilt_from_its_plan_and_its_state(method: str, network: str) -> None:
    teacher, _, plans = case(method, network)
    plan = next(plan for plan in plans.values() if isinstance(plan, Plan))
    student = named(method).apply(teacher, plan, images())
    named(method).settle(student, plan, images())
    state = {name: value.numpy() for name, value in student.state_dict().items()}
    restored = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    again = rebuild(teacher, named(method), restored, state)
    torch.testing.assert_close(again(images()), student(images()), rtol=0, atol=0)


@pytest.mark.parametrize(("method", "network"), [pair for pair in EVERY if pair[0].endswith("manidp")])
def test_a_gated_student_meets_its_budget_on_average(method: str, network: str) -> None:
    teacher, _, plans = case(method, network)
    for plan in plans.values():
        if isinstance(plan, Plan) and plan.macs_expected is not None:
            student = named(method).apply(teacher, plan, images())
            named(method).settle(student, plan, images())
            assert isinstance(student, Gated)
            spent = student.instance_macs(images()).double()
            assert 0.98 * plan.macs_expected <= spent.mean() <= plan.macs_expected
            assert spent.max() <= plan.macs == count_macs(student, images())


@every
def test_the_same_plan_gives_the_same_student(method: str, network: str) -> None:
    teacher, _, plans = case(method, network)
    plan = next(plan for plan in plans.values() if isinstance(plan, Plan))
    once, twice = (named(method).apply(teacher, plan, images()).state_dict() for _ in range(2))
    assert all(torch.equal(value, twice[name]) for name, value in once.items())


@every_link
def test_scores_do_not_depend_on_the_order_of_their_parts(method: str, network: str) -> None:
    teacher, found, _ = case(method, network)
    parts = partials(METHODS[method], teacher, found)
    merged, reverse = (METHODS[method].merge(some, found) for some in (parts, parts[::-1]))
    assert merged.keys() == reverse.keys()
    assert all(merged[name].tobytes() == reverse[name].tobytes() for name in merged)

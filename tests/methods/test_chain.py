"""Chains: shares of the cut, links that cannot take theirs, and plans of plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from methods import METHODS, named
from methods.alds import ALDS
from methods.base import Budget, Infeasible, Plan, Scores
from methods.chain import Chain, plan_of, student_of
from methods.names import NAMES
from methods.network import Profile, count_macs, count_params, profile
from methods.protocol import Method, defaults
from methods.uniform import Uniform
from tests.support.networks import fits, residual

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEACHER = residual()
FOUND = profile(TEACHER, IMAGES)


def scored(method: Method, plans: Sequence[Plan]) -> tuple[Scores, Profile]:
    student = student_of(TEACHER, [(METHODS[plan.method], plan) for plan in plans], IMAGES)
    found = profile(student, IMAGES)
    parts = [method.score(shard, student, IMAGES, 0) for shard in method.shards(found, IMAGES)]
    return method.merge(parts, found), found


def planned(chain: Chain, budget: Budget, **knobs: float) -> Plan:
    return plan_of(chain, scored, budget, {**defaults(chain), **knobs})


def links(plan: Plan) -> list[Plan]:
    return [Plan.from_json(values) for values in plan.choices["links"]]


CHAIN = Chain((Uniform(), ALDS()))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_link_takes_its_share_and_the_last_one_the_rest(share: float) -> None:
    budget = Budget("half", macs=FOUND.macs // 2)
    plan = planned(CHAIN, budget, **{"share.uniform": share})
    first, last = links(plan)
    wanted = FOUND.macs - share * (FOUND.macs - FOUND.macs // 2)
    fewer = planned(CHAIN, budget, **{"share.uniform": min(share + 0.4, 0.9)})
    assert first.macs <= wanted + 1
    assert last.macs == plan.macs <= FOUND.macs // 2
    assert links(fewer)[0].macs <= first.macs
    student = CHAIN.apply(TEACHER, plan, IMAGES)
    assert (count_macs(student, IMAGES), count_params(student)) == (plan.macs, plan.params)


def test_both_limits_are_shared_out() -> None:
    budget = Budget("both", macs=FOUND.macs // 2, params=FOUND.params // 2)
    first, last = links(planned(CHAIN, budget))
    assert first.macs <= 0.75 * FOUND.macs + 1
    assert first.params <= 0.75 * FOUND.params + 1
    assert fits(budget, last.macs, last.params)


def test_a_link_that_cannot_take_its_share_does_what_it_can() -> None:
    only_head = replace(ALDS(), skip=tuple(layer.name for layer in FOUND.layers if layer.kind == "conv"))
    chain = Chain((only_head, Uniform()))

    def with_skips(method: Method, plans: Sequence[Plan]) -> tuple[Scores, Profile]:
        student = student_of(TEACHER, list(zip(chain.links, plans, strict=False)), IMAGES)
        found = profile(student, IMAGES)
        parts = [method.score(shard, student, IMAGES, 0) for shard in method.shards(found, IMAGES)]
        return method.merge(parts, found), found

    plan = plan_of(chain, with_skips, Budget("half", macs=FOUND.macs // 2), defaults(chain))
    first, last = links(plan)
    with pytest.raises(Infeasible) as least:
        only_head.allocate(with_skips(only_head, ())[0], FOUND, Budget("none", macs=1), defaults(only_head))
    assert first.macs == least.value.least["macs"]
    assert last.macs <= FOUND.macs // 2


def test_a_budget_out_of_reach_names_what_the_last_link_can_reach() -> None:
    told = r"^at the last link of uniform\+alds, .*: .*alds reaches no less than"
    with pytest.raises(Infeasible, match=told) as raised:
        planned(CHAIN, Budget("none", macs=1))
    assert 1 < raised.value.least["macs"] < FOUND.macs // 4


def test_names_and_knobs() -> None:
    assert named("uniform+alds").name == "uniform+alds"
    assert CHAIN.knobs.keys() == {"share.uniform", "uniform.criterion", "alds.measure", "alds.schemes"}
    assert CHAIN.links[0].knobs["criterion"] == CHAIN.knobs["uniform.criterion"]
    for wrong, told in {
        "magic": "'magic' is not a method",
        "alds+magic": "'magic' is not a method",
        "alds+alds": "name each once",
        "manidp+alds": "expected 'manidp' at its end",
    }.items():
        with pytest.raises(ValueError, match=told):
            named(wrong)


def test_the_names_that_specs_are_checked_by_are_those_of_the_methods() -> None:
    assert list(NAMES.items()) == [(name, method.is_last) for name, method in METHODS.items()]

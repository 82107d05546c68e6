"""Tried shares: the student nearest to the teacher is taken, once per chain and limit, whoever asks and when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster import InlineCluster
from methods import named
from methods.base import Budget, Infeasible, KnobValue, Plan
from methods.chain import AUTO, Chain
from methods.network import profile
from methods.pipeline import distance
from methods.protocol import defaults
from search.driver.planning.planner import Planner
from search.driver.planning.shares import GRID, SHARES, TriedShares, _near
from search.workload import Workload, load
from tests.support.searches import parsed, place, quiet

TEXT = """
name: digits
model: {source: zoo, name: resnet8, weights: teacher.safetensors}
data: {source: digits, validation: 0.2, calibration: 128}
methods: [[channels, alds]]
budgets: [{name: half, macs: 50%}]
"""


def a_planner(workload: Workload) -> Planner:
    found = profile(workload.teacher, workload.example)
    return Planner(workload, found, InlineCluster(workload.worker_inputs()), quiet)


@pytest.fixture(scope="module")
def workload(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = place(tmp_path_factory.mktemp("shares"), teacher, TEXT)
    return load(parsed(folder, TEXT), quiet)


def test_the_share_whose_student_is_nearest_is_taken_and_kept(workload: Workload) -> None:
    chain, planner = named("channels+alds"), a_planner(workload)
    assert isinstance(chain, Chain)
    usual = defaults(chain)
    assert usual["share.channels"] == AUTO
    limit = Budget("third", macs=round(planner.macs * GRID**5))
    found = planner.plan(chain.name, limit, usual)

    inputs, far = workload.worker_inputs(), {}
    for share in SHARES:
        plan = planner.plan(chain.name, limit, usual | {"share.channels": share})
        far[share] = distance(inputs, chain, plan), plan
    nearest = min(far.values(), key=lambda one: one[0])[1]
    assert len({plan.macs for _, plan in far.values()}) > 1
    assert found.identity() == nearest.identity()

    spent = planner.spent()
    assert spent["scoring_s"] > 0
    again = a_planner(workload)
    assert again.plan(chain.name, limit, usual).identity() == found.identity()
    assert again.spent() == {"scoring_shards": 0, "scoring_s": 0}  # all of it is in the cache


def test_what_has_no_plan_comes_last_and_a_given_share_stays(workload: Workload) -> None:
    chain = named("channels+alds")
    assert isinstance(chain, Chain)
    planner = a_planner(workload)
    refused = SHARES[1:3]

    def plan(one: Chain, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        if knobs["share.channels"] in refused:
            raise Infeasible("out of reach", {"macs": 1})
        return planner.plan(one.name, budget, knobs)

    tried = TriedShares(workload, InlineCluster(workload.worker_inputs()), plan, quiet)
    limit = Budget("half", macs=planner.macs // 2)
    ranked = tried.ranked(chain, limit, {"macs": planner.macs})
    assert tuple(one["share.channels"] for one in ranked[-2:]) == refused
    given = planner.plan(chain.name, limit, defaults(chain) | {"share.channels": 0.1})
    first = given.choices["links"][0]
    assert first["macs"] >= 0.9 * planner.macs


@pytest.mark.parametrize("macs", [1000, 999, 800, 641, 640, 512, 100, 1])
def test_limits_that_are_alike_share_what_is_tried(macs: int) -> None:
    near = _near(Budget("any", macs=macs, params=50, channels=8), {"macs": 1000, "params": 40})
    assert near.macs is not None
    assert macs <= near.macs <= macs / GRID + 1
    assert near == _near(Budget("other", macs=near.macs, params=70, channels=8), {"macs": 1000, "params": 40})
    assert near.channels == 8

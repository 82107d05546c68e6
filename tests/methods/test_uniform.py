"""Uniform width: the largest common remain rate that fits, on the grid, and the student it makes."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from methods.base import Budget, Infeasible, Plan
from methods.network import Profile, count_macs, count_params, profile
from methods.network.widths import chosen_channels, levels, width_costs
from methods.protocol import defaults
from methods.uniform import Uniform
from tests.support.networks import NETWORKS

EXAMPLE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
UNIFORM = Uniform()
KNOBS = {"criterion": "l1"}
networks = pytest.mark.parametrize("name", NETWORKS)


@cache
def teacher(name: str) -> tuple[nn.Module, Profile]:
    model = NETWORKS[name]()
    return model, profile(model, EXAMPLE)


def plan_for(rows: Profile, macs: float, params: float = 1.0, channels: int = 2) -> Plan | None:
    budget = Budget("b", macs=round(macs * rows.macs), params=round(params * rows.params), channels=channels)
    try:
        return UNIFORM.allocate({}, rows, budget, KNOBS)
    except Infeasible:
        return None


@networks
@settings(max_examples=10, deadline=None, derandomize=True)
@given(macs=st.floats(0.02, 1.1), params=st.floats(0.02, 1.1), channels=st.sampled_from((1, 2, 8)))
def test_students_meet_the_budget_at_the_predicted_cost(name: str, macs: float, params: float, channels: int) -> None:
    model, rows = teacher(name)
    plan = plan_for(rows, macs, params, channels)
    if plan is None:
        costs, groups = width_costs(rows)
        least = np.array([levels(group, channels)[0] for group in groups])
        assert costs["macs"](least) > round(macs * rows.macs) or costs["params"](least) > round(params * rows.params)
        return
    assert plan.macs <= round(macs * rows.macs)
    assert plan.params <= round(params * rows.params)
    student = UNIFORM.apply(model, Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert (count_macs(student, EXAMPLE), count_params(student)) == (plan.macs, plan.params)


@networks
def test_a_larger_budget_never_gets_a_worse_loss(name: str) -> None:
    rows = teacher(name)[1]
    for costs in ([(share, 1.0) for share in np.linspace(0, 1, 40)], [(1.0, share) for share in np.linspace(0, 1, 40)]):
        plans = [plan_for(rows, *cost) for cost in costs]
        losses = [np.inf if plan is None else plan.loss for plan in plans]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] == np.inf
        assert losses[-1] == 0


@networks
def test_no_larger_rate_fits(name: str) -> None:
    """Against a slow oracle: every rate in steps of 1/960, from the top; what is left buys a step more for some."""
    rows = teacher(name)[1]
    costs, groups = width_costs(rows)
    for share in (0.2, 0.35, 0.5, 0.8):
        plan = plan_for(rows, share)
        best: np.ndarray | None = None
        for rate in range(960, 0, -1):
            legal = [(levels(group, 2), group.width) for group in groups]
            widths = np.array([max([w for w in row if w * 960 <= rate * base] or row[:1]) for row, base in legal])
            if costs["macs"](widths) <= round(share * rows.macs):
                best = widths
                break
        assert (best is None) == (plan is None)
        if best is None or plan is None:
            continue
        found = np.array([width for _, width, *_ in plan.choices["groups"]])
        rows_of = [levels(group, 2) for group in groups]
        steps = [row.index(new) - row.index(old) for row, old, new in zip(rows_of, best, found, strict=True)]
        assert set(steps) <= {0, 1}
        for place, row in enumerate(rows_of):
            if steps[place] == 0 and best[place] < row[-1]:
                wider = found.copy()
                wider[place] = row[row.index(best[place]) + 1]
                assert costs["macs"](wider) > round(share * rows.macs)


@networks
def test_the_teachers_own_cost_gives_the_teacher(name: str) -> None:
    model, rows = teacher(name)
    plan = plan_for(rows, 1.0)
    assert plan is not None
    assert (plan.loss, plan.macs, plan.params) == (0.0, rows.macs, rows.params)
    with torch.no_grad():
        assert torch.equal(UNIFORM.apply(model, plan)(EXAMPLE), model(EXAMPLE))


def test_infeasible_budgets_say_what_is_reachable() -> None:
    rows = teacher("plain")[1]
    with pytest.raises(Infeasible) as caught:
        UNIFORM.allocate({}, rows, Budget("tiny", macs=1000, channels=8), KNOBS)
    a, b, c = 2, 3, 4
    least = 64 * 27 * a + 64 * 9 * a * b + 16 * 9 * b * c + 10 * c
    assert caught.value.least == {"macs": least}
    assert f"{least:,} ({least / rows.macs:.1%})" in str(caught.value)


def test_networks_without_free_channels_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    reason = UNIFORM.accepts(profile(model, EXAMPLE))
    assert reason is not None
    assert "only the network's output reads its channels" in reason
    assert UNIFORM.accepts(teacher("plain")[1]) is None


def test_channels_chosen_by_images_are_named_in_the_plan() -> None:
    model, rows = teacher("plain")
    scores = UNIFORM.merge([UNIFORM.score(one, model, EXAMPLE, 0) for one in UNIFORM.shards(rows, EXAMPLE)], rows)
    plan = UNIFORM.allocate(scores, rows, Budget("b", macs=rows.macs // 2, channels=2), defaults(UNIFORM))
    widths = {name: width for name, width, base, *_ in plan.choices["groups"] if width < base}
    assert widths
    assert {name: len(set(channels)) for name, channels in chosen_channels(plan.choices).items()} == widths
    student = UNIFORM.apply(model, Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert (count_macs(student, EXAMPLE), count_params(student)) == (plan.macs, plan.params)

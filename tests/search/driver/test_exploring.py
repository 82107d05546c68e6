"""Rung 0: more candidates are judged than trained, the best go on, and those that do not are models all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from methods.base import Plan
from methods.pipeline import Outcome
from methods.training import Recipe, evaluate
from search.driver import loop
from search.driver.exploring import promising
from search.driver.runner import Judged, Planned
from search.driver.study import storage
from search.driver.winners import student
from search.limits import Limits
from search.record.changes import changes
from search.record.searches import find_search
from search.results import SearchResult
from search.trials import Fitted, Proposal
from search.workload import load
from tests.support.searches import SPEC, inline, parsed, place, quiet

TEXT = SPEC.replace("explore: 1", "explore: 3")


@pytest.fixture(scope="module")
def here(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("explored"), teacher, TEXT)


@pytest.fixture(scope="module")
def result(here: Path) -> SearchResult:
    """One round of two methods and the baseline: nine candidates, of which three are trained."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        return loop.search(parsed(here, TEXT), inline, quiet)


@pytest.fixture(autouse=True)
def _in_its_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)


def test_a_third_is_trained_and_the_rest_is_told_at_step_0(result: SearchResult) -> None:
    trained = [one for one in result.candidates if one.state == "complete"]
    passed = [one for one in result.candidates if one.state == "stopped"]
    assert (len(trained), len(passed)) == (3, 6)
    for one in passed:
        assert one.stop is not None
        assert one.stop.step == 0
        assert one.top1 is not None
        assert one.top1.validation == one.top1.bn == one.stop.top1
        assert one.device_s >= 0
    assert any(one.device_s > 0 for one in passed)
    record = find_search("sqlite:///paredown.db", "digits")
    told = optuna.load_study(study_name=f"{record.search.run_id}/half", storage=storage("paredown.studies"))
    states = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
    assert [trial.state for trial in told.trials] == [states[one.state] for one in result.candidates]
    for one in passed:
        assert told.trials[one.trial].intermediate_values == {0: one.top1_validation}
    assert sorted(told.user_attrs["chosen in round 0"]) == [one.trial for one in trained]


def test_those_go_on_that_are_best_after_refit_one_per_plan(result: SearchResult) -> None:
    trained = [one for one in result.candidates if one.state == "complete"]
    first = min(one.top1.bn for one in trained if one.top1 is not None and one.top1.bn is not None)
    record = find_search("sqlite:///paredown.db", "digits")
    plans = {one.run_id: record.read.plan(one.run_id).identity() for one in result.candidates}
    assert len({str(plans[one.run_id]) for one in trained}) == 3
    for one in result.candidates:
        if one.state == "stopped" and plans[one.run_id] not in [plans[other.run_id] for other in trained]:
            assert one.top1_validation is not None
            assert one.top1_validation <= first


def test_what_was_passed_over_stands_on_the_frontier_and_can_be_loaded(result: SearchResult, here: Path) -> None:
    """After five steps at a high learning rate some students are worse than before, and one of those wins."""
    record = find_search("sqlite:///paredown.db", "digits")
    members = {point["run_id"] for axis in result.to_json()["frontier"].values() for point in axis} - {None}
    untrained = [one for one in result.candidates if one.state == "stopped" and one.run_id in members]
    workload = load(parsed(here, TEXT), quiet)
    for one in untrained:
        assert record.read.has_weights(one.run_id)
        found = evaluate(student(workload, record, one.run_id), workload.splits.validation, workload.metric)
        assert found == one.top1_validation
    assert all(one.fits(Limits(macs=result.teacher.macs)) for one in result.candidates if one.is_model)


def test_the_same_command_finds_nothing_to_do(result: SearchResult, here: Path) -> None:
    assert loop.search(parsed(here, TEXT), inline, quiet) == result


def judged(number: int, top1: float, plan: str, macs: int = 10) -> Judged:
    found = Plan("uniform", macs, 1, {"name": plan}, 0.0)
    planned = Planned(Proposal("half", number, "uniform", {}, {}), "", Fitted(found, {}, 0), Recipe(1))
    outcome = Outcome(top1, top1, top1, macs, 1, 4, 0.0, {"weight": np.zeros(1)})
    return Judged(planned, outcome)


def test_limits_come_before_twins_and_twins_before_top1() -> None:
    found = [judged(0, 0.5, "a"), judged(1, 0.9, "b"), judged(2, 0.9, "b"), judged(3, 0.99, "c", macs=11)]
    ranked = promising(found, Limits(macs=10, top1_drop=0.01))
    assert [one.planned.proposal.number for one in ranked] == [1, 0, 2, 3]


def test_a_search_that_was_begun_without_trains_everything(result: SearchResult) -> None:
    record = find_search("sqlite:///paredown.db", "digits")
    assert record.search.settle_explore(7, is_new=False) == 3
    record.client.delete_tag(record.search.run_id, "paredown.explore")
    assert record.search.settle_explore(7, is_new=False) == 1
    assert changes({"search": {}}, {"search": {"explore": 3}}) == []

"""A search spends no second twice: nothing is scored or trained again, and a trial that falls behind is stopped
early."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from search.devices.device import LatencyError
from search.devices.stopwatch import Stopwatch
from search.driver import loop
from search.driver.study import storage
from search.record.changes import SpecChanged
from search.record.record import Record
from search.record.searches import find_search
from search.results import SearchResult
from search.spec import SearchSpec
from search.spec.reading import renamed
from tests.support.searches import SPEC, inline, parsed, place, quiet

SHORT = SPEC.replace("[itpruner, alds]", "[itpruner]").replace("trials: 3", "trials: 2")
MORE = """
  - {name: twin, macs: 50%}
  - {name: small, params: 30%}
  - {name: edge, latency: 60%, size_bytes: 60%, top1_drop: 0.5}
search:"""


@pytest.fixture
def here(teacher: Path, tmp_path: Path) -> Path:
    return place(tmp_path, teacher)


def search(folder: Path, text: str = SPEC) -> SearchResult:
    return loop.search(parsed(folder, text), inline, quiet)


def record(name: str = "digits") -> Record:
    return find_search("sqlite:///paredown.db", name)


def shards(record: Record) -> float:
    """Count the scoring shards that have run for this search."""
    found: float = record.client.get_run(record.search.run_id).data.metrics["scoring_shards"]
    return found


def test_budgets_and_trials_added_to_a_finished_search_reuse_every_score(here: Path) -> None:
    first = search(here, SHORT)
    ran = shards(record())
    assert ran > 0
    more = search(here, SHORT.replace("\nsearch:", MORE).replace("trials: 2", "trials: 3"))
    assert shards(record()) == ran
    assert [budget.name for budget in more.budgets] == ["half", "twin", "small", "edge"]
    assert [one for one in more.candidates if one.budget == "half"][:2] == list(first.candidates)
    assert len(more.candidates) == 12
    edge = more.budgets[3]
    assert edge.limits.keys() == {"latency_ms/rock", "size_bytes", "top1_drop"}
    for one in more.candidates:
        if one.budget == "edge" and one.state == "complete":
            assert edge.limits.excess(one.costs)["latency_ms/rock"] <= 0
            assert edge.limits.excess(one.costs)["size_bytes"] <= 0
    with pytest.raises(SpecChanged, match=r"budgets.edge: .*, now gone"):
        search(here, SHORT)


def unnamed(folder: Path, text: str = SPEC) -> SearchSpec:
    """The spec as if its device were the one of a spec that names none."""
    spec = parsed(folder, text)
    spec.model_fields_set.discard("devices")
    return spec


def test_latency_that_nobody_asked_for_is_that_of_what_is_registered(here: Path) -> None:
    spec = unnamed(here, SPEC.replace("trials: 3", "trials: 6"))
    result = loop.search(spec, inline, quiet)
    (best,) = (budget.winner for budget in result.budgets)
    assert best is not None
    found = result.to_json()
    members = {point["run_id"] for axis in found["frontier"].values() for point in axis} | {best.run_id}
    timed = {one.run_id for one in result.candidates if one.timings}
    assert members - {None} <= timed < {one.run_id for one in result.candidates}
    assert result.teacher.latency_ms["rock"]["p50"] > best.latency_ms["rock"]["p50"] > 0
    assert found["budgets"][0]["winner"]["latency_ms"] == best.latency_ms
    version = record().registry.version_of(best.run_id, "half")
    assert version is not None
    assert float(version.tags["latency_ms/rock/p50"]) == best.latency_ms["rock"]["p50"]
    assert loop.search(spec, inline, quiet) == result  # nothing is left to time


def test_a_search_that_timed_every_student_goes_on_without(here: Path) -> None:
    first = search(here, SHORT)
    assert all(one.timings for one in first.candidates)
    more = loop.search(unnamed(here, SHORT.replace("trials: 2", "trials: 4")), inline, quiet)
    assert list(more.candidates[:2]) == list(first.candidates)
    assert more.teacher.latency_ms == first.teacher.latency_ms
    assert more.devices == first.devices
    assert more.budgets[0].winner is not None
    assert more.budgets[0].winner.timings
    assert "latency_ms/rock" in more.axes


def test_a_device_that_nobody_named_and_that_cannot_run_the_teacher_costs_its_latency_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: object) -> None:
        raise LatencyError("rock cannot run it")

    monkeypatch.setattr(Stopwatch, "teacher", refuse)
    result = loop.search(unnamed(here, SHORT), inline, quiet)
    assert "rock cannot run it" in caplog.text
    assert result.budgets[0].model_uri == "models:/digits@half"
    assert result.axes == ("macs", "params")
    assert result.to_json()["budgets"][0]["winner"]["latency_ms"] == {}


def test_a_plan_and_recipe_are_trained_once(here: Path) -> None:
    """Two budgets that ask the same plan the same twice; whoever comes later takes what came of it."""
    text = SPEC.replace("\nsearch:", "\n  - {name: twin, macs: 50%}\n  - {name: other, macs: 50%}\nsearch:")
    result = search(here, text)
    trained = {one.run_id: one for one in result.candidates if one.same_as is None}
    assert {one.method for one in trained.values()} == {"itpruner", "alds", "uniform"}
    assert len(trained) == 3
    for one in result.candidates:
        if one.same_as is not None:
            source = trained[one.same_as]
            assert one.device_s == 0 < source.device_s
            assert (one.method, one.macs, one.top1_validation) == (source.method, source.macs, source.top1_validation)
    uris = {budget.model_uri for budget in result.budgets}
    assert uris == {"models:/digits@half", "models:/digits@twin", "models:/digits@other"}
    assert len({budget.top1_test for budget in result.budgets}) == 1


def test_a_changed_spec_is_refused_and_forked(here: Path) -> None:
    first = search(here, SHORT)
    changed = SHORT.replace("steps: 5", "steps: 6")
    with pytest.raises(SpecChanged, match=r"(?s)recovery.steps: 5, now 6.*--fork"):
        search(here, changed)
    assert record().read.result() == first
    forked = loop.search(renamed(parsed(here, changed), "digits-2"), inline, quiet)
    assert forked.name == "digits-2"
    assert forked.budgets[0].model_uri == "models:/digits-2@half"
    assert record().read.result() == first


def test_what_falls_behind_is_given_up_and_costs_are_told(here: Path) -> None:
    result = search(here, SPEC.replace("trials: 3", "trials: 26").replace("steps: 5", "steps: 20"))
    stopped = [one for one in result.candidates if one.state == "stopped"]
    assert stopped
    assert result.cost.stopped == len(stopped)
    for one in stopped:
        assert one.stop is not None
        assert one.stop.step in (8, 12, 16)
        assert one.top1_validation is None
        assert one.device_s > 0
        assert one.macs is not None
    told = optuna.load_study(study_name=f"{record().search.run_id}/half", storage=storage("paredown.studies")).trials
    assert {trial.number for trial in told if trial.state == TrialState.PRUNED} == {one.trial for one in stopped}
    for trial, one in zip(told, result.candidates, strict=True):
        rungs = record().client.get_metric_history(one.run_id, "top1")
        assert {rung.step: rung.value for rung in rungs if rung.step < 20} == trial.intermediate_values
    assert result.importance["half"]


def test_an_asynchronous_search_ends_every_trial_once(here: Path) -> None:
    text = SPEC.replace("\nsearch:", MORE).replace("trials: 3", "trials: 4, asynchronous: true")
    result = search(here, text)
    for budget in ("half", "twin", "small", "edge"):
        assert [one.trial for one in result.candidates if one.budget == budget] == [0, 1, 2, 3]
    assert search(here, text) == result

"""Progress is read from the record while a search runs, after it was stopped, and if there is none."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cluster import Cluster, Job
from search.base import Report, TrackingError
from search.cli import console, jobs
from search.driver import loop
from search.record.progress import Progress, progress
from search.service import watching
from search.service.metadata import NAME, URI
from search.units import Scale
from search.workload import Workload
from tests.support.searches import SPEC, inline, parsed, place, quiet

STORE = "sqlite:///paredown.db"
RECORDED = Job("digits-1", "succeeded", "", 0, {NAME: "digits", URI: STORE}, started=1.0, ended=2.0)
TEXT = SPEC.replace("  - {name: half, macs: 50%}\n", "  - {name: half, macs: 50%}\n  - {name: dust, macs: 1}\n")


def watched(seen: dict[str, Progress]) -> Report:
    """A report that looks at the record whenever it is told anything of a search that has begun one."""

    def report(stage: str, done: int, total: int, note: str) -> None:
        if stage in ("scoring", "trials", "storing models"):
            seen[f"{stage} {done}"] = progress(STORE, "digits")

    return report


def test_every_phase_is_on_record_while_it_lasts(teacher: Path, tmp_path: Path) -> None:
    os.chdir(place(tmp_path / "here", teacher))
    seen: dict[str, Progress] = {}
    begun: list[Progress] = []

    def starting(made: Workload) -> Cluster:
        begun.append(progress(STORE, "digits"))
        return inline(made)

    result = loop.search(parsed(Path(), TEXT), starting, watched(seen))

    assert begun == [Progress("digits", "starting", 0, 0, 0, 0.0, {})]
    assert {found.phase for told, found in seen.items() if told.startswith("scoring")} == {"scoring"}
    assert {found.phase for told, found in seen.items() if told.startswith("storing")} == {"registering"}
    rounds = [seen[f"trials {count}"] for count in (1, 2, 3)]
    assert [(one.phase, one.trials, one.expected) for one in rounds] == [("trials", count, 3) for count in (1, 2, 3)]
    after = progress(STORE, "digits")
    assert (after.phase, after.trials, after.expected, after.stopped) == ("done", 3, 3, 0)
    assert after.wall_s == result.cost.wall_s
    best = {budget.name: budget.winner and budget.winner.run_id for budget in result.budgets}
    assert best["half"]
    assert {name: found and found.winner and found.winner.run_id for name, found in after.best.items()} == best
    told = json.loads(json.dumps(after.to_json()))
    assert told["best"]["dust"] is None
    assert told["best"]["half"]["top1_validation"] == result.budgets[0].to_json()["winner"]["top1_validation"]


def test_a_metric_of_the_users_own_is_told_by_its_name_and_values(teacher: Path, tmp_path: Path) -> None:
    os.chdir(place(tmp_path / "here", teacher))
    Path("loss.py").write_text("from torch.nn.functional import cross_entropy\n")
    loss = Scale("CE", worst=2.5, best=0.0)
    metric = "metric: {function: './loss.py:cross_entropy', name: CE, direction: minimize, range: [0, 2.5]}\n"
    loop.search(parsed(Path(), SPEC + metric), inline, quiet)
    found = progress(STORE, "digits")
    best = found.best["half"]
    assert best is not None
    assert found.metric == loss
    winner = found.to_json()["best"]["half"]
    value = winner["value"]
    assert value == loss.value(winner["top1_validation"])
    assert 0 < value < 2.5
    assert jobs._winner_text(best, found.metric).startswith(f"{winner['method']}, validation CE {value:.4g}, ")
    seen = watching.take_snapshot(RECORDED, STORE)
    assert seen.points is not None
    assert seen.view.metric == seen.points["metric"] == {"name": "CE", "worst": 2.5, "best": 0.0}
    assert seen.view.best["half"]["value"] == value


@pytest.mark.parametrize(("error", "phase"), [(KeyboardInterrupt, "stopped"), (RuntimeError, "failed")])
def test_a_search_that_ended_early_says_how(
    teacher: Path, tmp_path: Path, error: type[BaseException], phase: str
) -> None:
    os.chdir(place(tmp_path / "here", teacher))

    def breaks(stage: str, done: int, total: int, note: str) -> None:
        if (stage, done) == ("trials", 2):
            raise error

    with pytest.raises(error):
        loop.search(parsed(Path()), inline, breaks)
    found = progress(STORE, "digits")
    assert (found.phase, found.trials, found.expected) == (phase, 2, 3)


def test_no_search_no_progress(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"no MLflow store at .*; expected the file"):
        progress(STORE, "digits")
    os.chdir(place(tmp_path / "here", teacher))
    with pytest.raises(KeyboardInterrupt):
        loop.search(parsed(Path()), interrupted, quiet)
    assert progress(STORE, "digits").phase == "stopped"
    with pytest.raises(TrackingError, match=r"no search 'other' in .*; it holds digits"):
        progress(STORE, "other")


def interrupted(made: Workload) -> Cluster:
    """Workers that Ctrl-C keeps from starting."""
    raise KeyboardInterrupt


def test_a_log_is_not_silent_for_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "SILENCE_S", 0.01)
    told, until = "", time.monotonic() + 30
    with console.bars(hidden=False) as report:
        report("profile", 0, 1, "")
        while "trial cuts" not in told and time.monotonic() < until:
            report("profile", 3, 256, "trial cuts")
            told += capsys.readouterr().err
    assert "profile 3/256 trial cuts" in told


def test_a_log_gets_a_line_per_trial(capsys: pytest.CaptureFixture[str]) -> None:
    with console.bars(hidden=False) as report:
        for done, total in ((0, 4), (1, 4), (4, 4), (0, 4), (4, 4)):
            report("scoring", done, total, "alds")
        for done, note in ((0, "step 1/2"), (0, "step 2/2"), (1, "top-1 0.9"), (1, "step 1/2"), (2, "top-1 0.8")):
            report("trials", done, 2, note)
    told = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    scoring = ["scoring 0/4 alds", "scoring 4/4 alds"]
    assert told == [*scoring, "trials 0/2 step 1/2", "trials 1/2 top-1 0.9", "trials 2/2 top-1 0.8"]

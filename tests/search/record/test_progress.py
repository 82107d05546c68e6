"""Progress is read from the record while a search runs, after it was stopped, and if there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster import Cluster
from search.base import Report, TrackingError
from search.cli import console
from search.driver import loop
from search.record.progress import Progress, progress
from search.workload import Workload
from tests.support.searches import SPEC, inline, parsed, place, quiet

STORE = "sqlite:///paredown.db"
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


def test_a_log_gets_a_line_per_trial(capsys: pytest.CaptureFixture[str]) -> None:
    with console.bars(hidden=False) as report:
        for done, total in ((0, 4), (1, 4), (4, 4), (0, 4), (4, 4)):
            report("scoring", done, total, "alds")
        for done, note in ((0, "step 1/2"), (0, "step 2/2"), (1, "top-1 0.9"), (1, "step 1/2"), (2, "top-1 0.8")):
            report("trials", done, 2, note)
    told = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    scoring = ["scoring 0/4 alds", "scoring 4/4 alds"]
    assert told == [*scoring, "trials 0/2 step 1/2", "trials 1/2 top-1 0.9", "trials 2/2 top-1 0.8"]

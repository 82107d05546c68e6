"""Kills: a search that was killed at any moment, by any means, ends as an undisturbed one and runs nothing twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState

from search.driver import loop
from search.driver.study import storage
from search.record.searches import find_search
from search.spec import reading
from tests.support.searches import SPEC, inline, place, quiet

BUDGETS = """budgets:
  - {name: small, params: 30%, macs: 60%}
  - {name: edge, latency: 70%}
search: {trials: 3, explore: 2}
"""
TEXT = SPEC.replace("budgets:\n  - {name: half, macs: 50%}\nsearch: {trials: 3, explore: 1}\n", BUDGETS).replace(
    "steps: 5", "steps: 10"
)
KILLS = 10

pytestmark = pytest.mark.timeout(900)


def drive(folder: Path, cache: Path) -> None:
    """The driver, in a process of its own: the search of the spec in `folder`, with this process as the cluster."""
    os.chdir(folder)
    os.environ["PAREDOWN_CACHE"] = str(cache)
    loop.search(reading.load(Path("spec.yaml")), inline, quiet)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that begin with everything imported: a killed driver's next life starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.driver.loop"])
    return context


def driver(context: multiprocessing.context.ForkServerContext, folder: Path, cache: Path) -> BaseProcess:
    made = context.Process(target=drive, args=(folder, cache))
    made.start()
    return made


def runs(folder: Path, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """The runs of all trials on record."""
    client = MlflowClient(f"sqlite:///{folder / 'paredown.db'}")
    found = client.search_runs(["1"], "", view, max_results=1000)
    return [run for run in found if "mlflow.parentRunId" in run.data.tags]


def table(folder: Path) -> list[tuple[Any, ...]]:
    """Return what must not depend on kills: every trial with its plan and its end."""
    record = find_search(f"sqlite:///{folder / 'paredown.db'}", "digits")
    return [
        (one.budget, one.trial, one.method, one.knobs, one.state, one.top1_validation, one.stop,
         one.macs, one.params, record.read.plan(one.run_id).choices if one.macs else None)
        for one in record.read.trials()
    ]  # fmt: skip


def check_records(folder: Path) -> None:
    """Every trial ended once, MLflow and Optuna say the same of it, and nothing was registered twice."""
    kept = runs(folder)
    assert {run.info.status for run in kept} <= {"FINISHED", "FAILED"}
    ended = [run for run in runs(folder, ViewType.ALL) if "paredown.state" in run.data.tags]
    assert set(Counter((run.data.params["budget"], run.data.params["trial"]) for run in ended).values()) == {1}
    assert {run.info.run_id for run in ended} == {run.info.run_id for run in kept}

    record = find_search(f"sqlite:///{folder / 'paredown.db'}", "digits")
    kept_at = storage(str(folder / "paredown.studies"))
    states = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
    for name in ("small", "edge"):
        told = optuna.load_study(study_name=f"{record.search.run_id}/{name}", storage=kept_at).trials
        recorded = [one for one in record.read.trials() if one.budget == name]
        assert [trial.state for trial in told] == [states[one.state] for one in recorded]
        assert [trial.value for trial in told if trial.state == TrialState.COMPLETE] == [
            one.top1_validation for one in recorded if one.state == "complete"
        ]
    versions = record.client.search_model_versions("name='digits'")
    assert Counter(found.tags["budget"] for found in versions) == {
        budget.name: 1 for budget in record.read.result().budgets if budget.winner is not None
    }
    assert record.client.get_run(record.search.run_id).info.status == "FINISHED"


@dataclass(frozen=True)
class Undisturbed:
    """A search that nothing disturbs: its folder, its cache of scores, and the seconds it took."""

    folder: Path
    cache: Path
    seconds: float


@pytest.fixture(scope="module")
def calm(
    teacher: Path, tmp_path_factory: pytest.TempPathFactory, processes: multiprocessing.context.ForkServerContext
) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    here, cache = place(folder / "calm", teacher, TEXT), folder / "cache"
    began = time.monotonic()
    undisturbed = driver(processes, here, cache)
    undisturbed.join(600)
    assert undisturbed.exitcode == 0
    return Undisturbed(here, cache, time.monotonic() - began)


def test_a_driver_killed_at_ten_random_moments(
    calm: Undisturbed, teacher: Path, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    killed = place(tmp_path / "killed", teacher, TEXT, has_store=False)

    moments = np.random.default_rng(0)
    landed = 0
    for _ in range(10 * KILLS):
        life = driver(processes, killed, calm.cache)
        life.join(moments.uniform(0, 0.25 * calm.seconds))
        if life.is_alive():
            assert life.pid is not None
            os.kill(life.pid, signal.SIGKILL)
            landed += 1
        life.join()
        if landed == KILLS:
            break
    assert landed == KILLS

    last = driver(processes, killed, calm.cache)
    last.join(600)
    assert last.exitcode == 0
    assert table(killed) == table(calm.folder)
    check_records(calm.folder)
    check_records(killed)


def start(folder: Path) -> subprocess.Popen[str]:
    """The command itself, on a Ray of its own, by a user who has never heard of Ray's tokens."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return subprocess.Popen(
        [sys.executable, "-m", "search.cli", "search", "spec.yaml", "--json"],
        cwd=folder,
        env=environment | {"PYTHONPATH": root, "PAREDOWN_CACHE": str(folder / "cache"), "HOME": str(folder)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_trials(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    """Waits until that many trials have ended; the command must still be at work then."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (folder / "paredown.reports").exists() and ended(folder) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{count} trials did not end in time")


def ended(folder: Path) -> int:
    """Count the trials on record; none while the store is being made."""
    try:
        return sum("paredown.state" in run.data.tags for run in runs(folder))
    except MlflowException:
        return 0


@pytest.mark.ray
def test_an_interrupted_command_and_a_killed_ray(calm: Undisturbed, teacher: Path, tmp_path: Path) -> None:
    here = place(tmp_path / "here", teacher, TEXT)
    process = start(here)
    wait_for_trials(here, process, 2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "To go on:  paredown search spec.yaml" in told
    kept = ended(here)
    assert kept >= 2
    assert {run.info.status for run in runs(here)} <= {"FINISHED", "KILLED"}

    process = start(here)
    wait_for_trials(here, process, kept + 2)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name() == "raylet":
            assert child.environ()["RAY_AUTH_MODE"] == "token"
            child.kill()
    process.communicate(timeout=120)
    assert process.returncode != 0

    process = start(here)
    out, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert [budget["winner"] is not None for budget in json.loads(out)["budgets"]] == [True] * 2
    check_records(here)
    assert (here / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600  # Ray itself would let all read it
    assert table(here) == table(calm.folder)

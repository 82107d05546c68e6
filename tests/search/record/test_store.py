"""The MLflow store: what cannot be used is told before anything costs time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy import Engine, event

from methods.base import Plan
from methods.pipeline import Outcome
from search.base import TrackingError
from search.record import store
from search.record.record import Record
from search.record.searches import find_begun, find_search, open_search
from search.record.store import check_store, connect
from search.trials import Fitted, Proposal, Teacher
from search.units import Scale
from tests.support.searches import empty_store


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    Path("notes.txt").write_text("not a database, but long enough to be looked at as one. " * 50)
    with pytest.raises(TrackingError, match="cannot use the MLflow store"):
        check_store("sqlite:///notes.txt")


def test_a_missing_driver_is_told_without_the_password() -> None:
    with pytest.raises(TrackingError) as caught:
        check_store("nosuchdatabase://user:secret@localhost/db")
    assert "secret" not in str(caught.value)
    with pytest.raises(TrackingError, match=r"cannot use the MLflow store .*No module named 'pymssql'") as caught:
        find_search("mssql+pymssql://user:secret@localhost/db", "digits")
    assert "secret" not in str(caught.value)


def begun() -> Record:
    """A search that has begun, in a store of the current folder."""
    Path("paredown.db").write_bytes(empty_store())
    return open_search("sqlite:///paredown.db", "digits", decisive={}, spec="", model="digits")


@contextmanager
def interrupted(start: str) -> Iterator[None]:
    """Expect the block to be interrupted by a signal that falls into the first statement that begins with `start`."""
    fallen: list[str] = []

    def interrupt(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith(start) and not fallen:
            fallen.append(statement)
            signal.raise_signal(signal.SIGINT)

    event.listen(Engine, "before_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        event.remove(Engine, "before_cursor_execute", interrupt)
    assert fallen


def statuses(record: Record) -> list[str]:
    """MLflow's word for every run of a search and for its own."""
    runs = record.client.search_runs([record.client.get_experiment_by_name("digits").experiment_id])
    return sorted(run.info.status for run in runs)


def test_an_interrupt_waits_for_the_write_it_falls_into() -> None:
    """Cut short, SQLAlchemy would keep the database locked, and no run could be ended."""
    record = begun()
    with interrupted("INSERT INTO runs"):
        record.trials.start(Proposal("half", 0, "alds", {}, {"learning_rate": 0.1}))
    record.halt("KILLED")
    assert statuses(record) == ["KILLED", "KILLED"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_between_the_two_writes_that_end_a_trial() -> None:
    """What is on record as a failed trial is no killed one for MLflow, whenever it is halted or opened again."""
    record = begun()
    run_id = record.trials.start(Proposal("half", 0, "alds", {}, {"learning_rate": 0.1}))
    with interrupted("INSERT INTO tags"):
        record.trials.fail(run_id, "failed", "no reason", 1.0)
    assert statuses(record) == ["RUNNING", "RUNNING"]
    record.halt("KILLED")
    assert statuses(record) == ["FAILED", "KILLED"]
    record.client.set_terminated(run_id, "KILLED")  # as it was left once
    record.trials.remove_unfinished()
    assert statuses(record) == ["FAILED", "KILLED"]


def test_a_trial_that_is_just_being_ended_is_none_yet() -> None:
    """MLflow reads a run's row, and then its tags, params and metrics in any order: the last may be there alone."""
    record = begun()
    run_id = record.trials.start(Proposal("half", 0, "alds", {}, {"learning_rate": 0.1}))
    record.client.set_tag(run_id, "paredown.state", "failed")
    assert not record.read.trials()
    found = record.trials.fail(run_id, "failed", "no reason", 1.0)
    assert record.read.trials() == [found]


def test_a_trial_is_written_in_few_transactions() -> None:
    """Each waits for the disk; a driver with many workers is held up by nothing else as long."""
    record = begun()
    plan = Plan("uniform", macs=9, params=9, choices={}, loss=0.1)
    outcome = Outcome(0.1, 0.2, 0.9, macs=9, params=9, size_bytes=36, seconds=60.0, state={"weights": np.zeros(9)})
    commits: list[object] = []

    def count(connection: object) -> None:
        commits.append(connection)

    event.listen(Engine, "commit", count)
    try:
        run_id = record.trials.start(Proposal("half", 0, "uniform", {"criterion": "l1"}, {"learning_rate": 0.1}))
        record.trials.planned(run_id, Fitted(plan, {}, 0), "work")
        for step in range(1, 6):
            record.trials.progress(run_id, step, step / 10)
        assert not record.client.get_metric_history(run_id, "top1")
        found = record.trials.complete(run_id, outcome, 60.0, top1_drop=0.05, keep_weights=True)
    finally:
        event.remove(Engine, "commit", count)
    assert len(commits) <= 9
    assert record.read.trials() == [found]
    assert (found.state, found.top1_validation, found.device_s) == ("complete", 0.9, 60.0)
    rungs = record.client.get_metric_history(run_id, "top1")
    assert {rung.step: rung.value for rung in rungs} == {step: step / 10 for step in range(1, 6)}


def test_what_was_taken_adds_up_over_sittings() -> None:
    begun()
    for wall_s in (1.5, 2.0):
        record = find_begun("sqlite:///paredown.db", "digits")
        record.search.add(wall_s=wall_s, scoring_shards=3.0)
        record.search.add(wall_s=1.0)
    taken = record.client.get_run(record.search.run_id).data.metrics
    assert (taken["wall_s"], taken["scoring_shards"]) == (5.5, 6.0)


def test_the_scale_of_a_metric_is_on_record() -> None:
    record = begun()
    record.search.write_teacher(Teacher(0.9, None, 100, 10, 40))
    record.search.write_metric(Scale())
    assert record.read.result().metric == Scale()
    record.search.write_metric(Scale("loss", worst=2.5, best=0.0))
    assert record.read.result().metric == Scale("loss", worst=2.5, best=0.0)


def test_a_search_nobody_ran() -> None:
    with pytest.raises(TrackingError, match="run a search first"):
        find_search("sqlite:///paredown.db", "digits")
    check_store("sqlite:///paredown.db")
    with pytest.raises(TrackingError, match="no search 'digits'"):
        find_search("sqlite:///paredown.db", "digits")


def make_store(folder: Path) -> None:
    """Makes a store in `folder`, in a process of its own."""
    os.chdir(folder)
    check_store("sqlite:///paredown.db")


def test_a_process_killed_while_it_makes_the_store(tmp_path: Path) -> None:
    """MLflow could not use a database that a kill left half made; here none is left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.record.store"])
    process = context.Process(target=make_store, args=(tmp_path,))
    process.start()
    while not any(file.stat().st_size for file in tmp_path.glob("*.db")):
        assert process.is_alive()
    process.kill()
    process.join()
    assert not Path("paredown.db").exists()
    check_store("sqlite:///paredown.db")


def test_who_makes_the_store_last_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first searches in a new folder would destroy each other's records."""
    create = store._create

    def beside_another(path: Path) -> None:
        create(path)
        if not Path("paredown.db").exists():
            with monkeypatch.context() as patch:
                patch.setattr(store, "_create", create)
                check_store("sqlite:///paredown.db")
            connect("sqlite:///paredown.db").create_experiment("first")

    monkeypatch.setattr(store, "_create", beside_another)
    check_store("sqlite:///paredown.db")
    assert connect("sqlite:///paredown.db").get_experiment_by_name("first") is not None
    assert not [file for file in Path().iterdir() if file.suffix == ".db" and file.name != "paredown.db"]


def begin(folder: Path, name: str, delay_s: float) -> None:
    """Begins a search in a store that there may not be yet, in a process of its own."""
    os.chdir(folder)
    time.sleep(delay_s)
    check_store("sqlite:///paredown.db")
    open_search("sqlite:///paredown.db", name, decisive={}, spec="", model=name)


@pytest.mark.slow
def test_two_first_searches_at_several_delays_both_end_well(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.record.searches"])
    folders = [tmp_path / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        pair = [context.Process(target=begin, args=(folder, f"s{one}", one * number * 0.1)) for one in (0, 1)]
        for process in pair:
            process.start()
        for process in pair:
            process.join()
        assert [process.exitcode for process in pair] == [0, 0]
        uri = f"sqlite:///{folder / 'paredown.db'}"
        assert {find_begun(uri, name).search.registered_model for name in ("s0", "s1")} == {"s0", "s1"}


def test_a_database_that_somebody_holds_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "TELL_S", 0.01)
    tries: list[int] = []

    def call() -> str:
        tries.append(len(tries))
        time.sleep(0.05)
        if len(tries) < 3:
            raise MlflowException("(sqlite3.OperationalError) database is locked")
        return "done"

    assert store._wholly(call)() == "done"
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for the MLflow store, up to 120 s if it is held"
    ]
    monkeypatch.setattr(store, "HELD_S", 0.0)
    tries.clear()
    with pytest.raises(MlflowException, match="locked"):
        store._wholly(call)()


def test_a_server_that_nobody_answers_for_is_refused_at_once() -> None:
    for uri in ("http://127.0.0.1:1", "http://", "http://ada:secret@127.0.0.1:1"):
        with pytest.raises(TrackingError, match=r"no MLflow server at .*: nobody answered within 3 s") as caught:
            check_store(uri)
        assert "secret" not in str(caught.value)


def test_nothing_reports_home() -> None:
    """MLflow makes its telemetry client while it is imported, whoever imports it first."""
    program = "import search.driver.loop; from mlflow.telemetry import get_telemetry_client as get; print(get())"
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_DISABLE_TELEMETRY"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "None"

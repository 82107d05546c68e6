"""The MLflow store: what cannot be used is told before anything costs time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from search.base import SearchError, TrackingError
from search.records import find_search, open_search
from search.store import check_store, locked
from search.study import Proposal


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    Path("notes.txt").write_text("not a database, but long enough to be looked at as one. " * 50)
    with pytest.raises(TrackingError, match="cannot use the MLflow store"):
        check_store("sqlite:///notes.txt")


def test_a_missing_driver_is_told_without_the_password() -> None:
    with pytest.raises(TrackingError) as caught:
        check_store("nosuchdatabase://user:secret@localhost/db")
    assert "secret" not in str(caught.value)


def test_an_interrupt_waits_for_the_write_it_falls_into() -> None:
    """Cut short, SQLAlchemy would keep the database locked, and no run could be ended."""
    tracker = open_search("sqlite:///paredown.db", "digits", decisive={}, spec="", model="digits")
    proposal = Proposal("half", 0, "alds", {}, {"learning_rate": 0.1})
    fallen: list[str] = []

    def interrupt(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT") and not fallen:
            fallen.append(statement)
            signal.raise_signal(signal.SIGINT)

    event.listen(Engine, "before_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            tracker.start_trial(proposal)
    finally:
        event.remove(Engine, "before_cursor_execute", interrupt)
    assert "INTO runs" in fallen[0]
    tracker.halt("KILLED")
    runs = tracker.client.search_runs([tracker.client.get_experiment_by_name("digits").experiment_id])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_search_nobody_ran() -> None:
    with pytest.raises(TrackingError, match="run a search first"):
        find_search("sqlite:///paredown.db", "digits")
    check_store("sqlite:///paredown.db")
    with pytest.raises(TrackingError, match="no search 'digits'"):
        find_search("sqlite:///paredown.db", "digits")


def test_one_driver_per_search() -> None:
    with (
        locked("sqlite:///paredown.db", "digits"),
        pytest.raises(SearchError, match="running already"),
        locked(f"sqlite:///{Path.cwd() / 'paredown.db'}", "digits"),
    ):
        pass
    with locked("sqlite:///paredown.db", "digits"), locked("sqlite:///paredown.db", "other"):
        pass


def make_store(folder: Path) -> None:
    """Makes a store in `folder`, in a process of its own."""
    os.chdir(folder)
    check_store("sqlite:///paredown.db")


def test_a_process_killed_while_it_makes_the_store(tmp_path: Path) -> None:
    """MLflow could not use a database that a kill left half made; here none is left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.store"])
    process = context.Process(target=make_store, args=(tmp_path,))
    process.start()
    while not any(file.stat().st_size for file in tmp_path.glob("*.db")):
        assert process.is_alive()
    process.kill()
    process.join()
    assert not Path("paredown.db").exists()
    check_store("sqlite:///paredown.db")


def test_nothing_reports_home() -> None:
    """MLflow makes its telemetry client while it is imported, whoever imports it first."""
    program = "import search.loop; from mlflow.telemetry import get_telemetry_client as get; print(get())"
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_DISABLE_TELEMETRY"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "None"

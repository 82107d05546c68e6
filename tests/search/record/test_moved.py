"""A store whose folder was moved, whose parts were deleted by hand, or whose path is odd."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from methods.base import Plan
from methods.pipeline import Outcome
from search.base import TrackingError
from search.record.record import Record
from search.record.searches import find_begun, open_search
from search.record.store import check_store, connect, unwritable
from search.trials import Fitted, Proposal

DECISIVE = {"seed": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an odd name and a search of one trial, which every test copies or moves."""
    folder = tmp_path_factory.mktemp("made") / "wörk #1 50%20 (it?)"
    uri = f"sqlite:///{folder / 'paredown.db'}"
    check_store(uri)
    record = open_search(uri, "tiny", decisive=DECISIVE, spec="", model="tiny")
    run_id = record.trials.start(Proposal("half", 0, "uniform", {}, {}))
    record.trials.planned(run_id, Fitted(Plan("uniform", macs=9, params=9, choices={}, loss=0.1), {}, 0), "work")
    outcome = Outcome(0.1, 0.2, 0.9, macs=9, params=9, size_bytes=36, seconds=1.0, state={})
    record.trials.complete(run_id, outcome, 1.0, top1_drop=0.05, keep_weights=False)
    assert sorted(one.name for one in folder.iterdir()) == ["paredown.artifacts", "paredown.db"]
    assert list(folder.parent.iterdir()) == [folder]
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder, moved: its old place is empty until the test is over."""
    place = tmp_path / "b"
    shutil.copytree(made, place)
    made.rename(made.with_name("hidden"))
    _artifact_repos_cache.clear()  # a process of its own would have none
    try:
        yield place
    finally:
        made.with_name("hidden").rename(made)


def uri_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'paredown.db'}"


def opened(folder: Path) -> Record:
    return open_search(uri_of(folder), "tiny", decisive=DECISIVE, spec="", model="tiny")


def test_files_that_were_moved_with_their_store_are_found(
    folder: Path, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        record = find_begun(uri_of(folder), "tiny")
    assert "was moved: its files are those in" in caplog.text
    (trial,) = record.read.trials()
    assert record.read.plan(trial.run_id).macs == 9
    again = opened(folder)
    again.resume()
    run_id = again.trials.start(Proposal("half", 1, "uniform", {}, {}))
    again.trials.planned(run_id, Fitted(Plan("uniform", macs=9, params=9, choices={}, loss=0.1), {}, 0), "other")
    assert (folder / "paredown.artifacts" / "tiny" / run_id / "artifacts" / "plan.json").is_file()
    assert not made.exists()
    caplog.clear()
    find_begun(uri_of(folder), "tiny")
    assert not caplog.text


def test_files_that_were_left_behind_are_told_and_none_are_made_at_the_old_place(folder: Path, made: Path) -> None:
    shutil.rmtree(folder / "paredown.artifacts")
    record = find_begun(uri_of(folder), "tiny")
    with pytest.raises(TrackingError, match=r"wörk.* is gone, .*plan.json lies; expected .*beside the database; put"):
        record.read.plan(record.read.trials()[0].run_id)
    with pytest.raises(TrackingError, match=r"is gone, .*; expected .*move that folder there, or begin a new search"):
        opened(folder)
    assert not made.exists()


def test_a_deleted_trial_comes_back(folder: Path) -> None:
    record = opened(folder)
    (trial,) = record.read.trials()
    record.client.delete_run(trial.run_id)
    assert not record.read.trials()
    record.resume()
    assert record.read.trials() == [trial]


def test_a_deleted_experiment_is_told_with_the_command_that_restores_it(folder: Path) -> None:
    client = connect(uri_of(folder))
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    for look in (lambda: opened(folder), lambda: find_begun(uri_of(folder), "tiny")):
        with pytest.raises(TrackingError, match=r"'tiny' of .* was deleted; .*mlflow experiments restore --exp.* 1"):
            look()
    client.restore_experiment("1")
    opened(folder)


def test_an_older_schema_is_told_with_the_command_that_mends_it(folder: Path) -> None:
    with sqlite3.connect(folder / "paredown.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    shutil.copy(folder / "paredown.db", folder / "old.db")  # MLflow looks at each database once
    with pytest.raises(TrackingError, match=r"was made by an older MLflow; .*then run: mlflow db upgrade sqlite:"):
        check_store(f"sqlite:///{folder / 'old.db'}")


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///.", "sqlite:///:memory:", "sqlite:////"])
def test_a_store_that_is_no_file_is_refused(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.uri is sqlite:.*, which is no file; expected sqlite:///FILE"):
        check_store(uri)


def test_no_statement_stands_in_a_message() -> None:
    reason = (
        "(sqlite3.OperationalError) disk is full\n[SQL: INSERT INTO runs]\n[parameters: (1,)]\n(Background on this)"
    )
    assert unwritable("sqlite:///x.db", reason).startswith(
        "cannot use the MLflow store sqlite:///x.db: (sqlite3.OperationalError) disk is full; expected"
    )

"""Reach the MLflow store, and check that it can be used; every other file gets its client here."""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from cluster.reach import REACH_S, answers
from search import cache
from search.base import TrackingError, masked, shortened
from search.record.moved import local_path, reroot

log = logging.getLogger(__name__)

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
PATIENCE = {RETRIES: "5", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""The patience of MLflow's client with a server that is gone: about a minute, so that the server may restart. Its own
defaults take four, and Ctrl-C has to wait for as long. Set these variables yourself to decide otherwise."""

HELD_S, TELL_S, AGAIN_S = 120.0, 5.0, 0.2
"""Seconds to wait for an SQLite database that somebody else holds, until that is said, and between two tries of ours.
MLflow's own try waits for 20."""

FAULTS = (MlflowException, SQLAlchemyError, OSError, ImportError)
"""The errors of a store that cannot be used: a server, a database, a file, a driver that is not installed."""


def check_store(uri: str) -> None:
    """Check that the MLflow store can be read and written, before anything costs time.

    Raises:
        TrackingError: it cannot.
    """
    check_sqlite("tracking.uri", uri)
    if not answers(uri):
        reason = f"nobody answered within {REACH_S:g} s"
        raise TrackingError(
            masked(f"no MLflow server at {uri}: {reason}; expected one that runs; correct tracking.uri")
        )
    path = sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise TrackingError(unwritable(uri, "permission denied"))
    try:
        if path is not None and not path.exists():
            cache.keep(path, _create, once=True)  # MLflow could not go on with one that a kill left half made
        connect(uri).search_experiments(max_results=1)
    except FAULTS as error:
        raise TrackingError(unwritable(uri, str(error))) from error


def check_sqlite(key: str, place: str) -> None:
    """Refuse an SQLite address that names no file: a search in memory is gone with its process.

    Raises:
        TrackingError: it names none.
    """
    if not place.startswith("sqlite:"):
        return
    path = sqlite_path(place)
    if path is None or str(path) in (".", ":memory:") or path.is_dir():
        raise TrackingError(
            f"{key} is {place}, which is no file; expected sqlite:///FILE, such as sqlite:///paredown.db; give "
            "a file's name, or leave it out"
        )


def check_artifacts(uri: str, name: str) -> None:
    """Check that files can be kept in the MLflow store, in the experiment of search `name`, and read again.

    Raises:
        TrackingError: they cannot; a server may well be reached and its files not be.
    """
    client = connect(uri)
    try:
        run_id = client.create_run(experiment_of(client, uri, name), run_name="check").info.run_id
        try:
            client.log_text(run_id, name, "check.txt")
            artifact(client, run_id, "check.txt")
        finally:
            client.delete_run(run_id)
    except FAULTS as error:
        raise TrackingError(unwritable(uri, str(error))) from error


def _quiet() -> None:
    """Silence MLflow's own log and prints, and keep it from making a database's folder by its name in the address.

    Where signs of that name are escaped, it would be another folder, perhaps in a place that nobody may write.
    """
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # a server's, with the password in it
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    database: Any = importlib.import_module("mlflow.store.db.utils")
    database._make_parent_dirs_if_sqlite = lambda address: None


def unwritable(uri: str, reason: str) -> str:
    """Build the message about a store that cannot be used, without its password and SQL statements."""
    if "out-of-date database schema" in reason:
        return masked(
            f"the MLflow store {uri} was made by an older MLflow; expected the schema of MLflow {mlflow.__version__}; "
            f"copy the database, then run: mlflow db upgrade {shlex.quote(uri)}"
        )
    return masked(
        f"cannot use the MLflow store {uri}: {shortened(without_sql(reason), 300)}; expected a store this "
        "process may read and write; correct tracking.uri, or the permissions of its folder"
    )


def without_sql(reason: str) -> str:
    """Return SQLAlchemy's message without the statement, its parameters and the address of a manual.

    >>> without_sql("(sqlite3.OperationalError) disk is full\\n[SQL: INSERT INTO runs]\\n[parameters: (1,)]")
    '(sqlite3.OperationalError) disk is full'
    """
    return re.split(r"\s*(?:\[SQL: |\[parameters: |\(Background on this error)", reason, maxsplit=1)[0]


def is_store_fault(error: Exception) -> bool:
    """Whether this is MLflow or its database failing while it is used."""
    return isinstance(error, MlflowException | SQLAlchemyError)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done.

    If an interrupt cuts SQLAlchemy short, the database stays locked for as long as this process lives.
    """
    came: list[int] = []
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def failing_fast() -> Iterator[None]:
    """Let calls of a server fail at the first try, for what is written when the server may be gone already."""
    before = os.environ.get(RETRIES, PATIENCE[RETRIES])
    os.environ[RETRIES] = "0"
    try:
        yield
    finally:
        os.environ[RETRIES] = before


class _Client(MlflowClient):
    """MLflow's client, no call of which is cut short by Ctrl-C."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found if name.startswith("_") or not callable(found) else _wholly(found)


def _wholly(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call, with signals held back; it waits while somebody else holds an SQLite database."""

    @wraps(call)
    def held(*args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        with _telling_of_a_wait():
            while True:
                try:
                    with holding_signals():
                        return call(*args, **kwargs)
                except FAULTS as error:
                    if "database is locked" not in str(error) or time.monotonic() - started > HELD_S:
                        raise
                time.sleep(AGAIN_S)  # SQLite refuses at once where waiting cannot help

    return held


@contextmanager
def _telling_of_a_wait() -> Iterator[None]:
    """Say so once if the block takes long."""
    timer = threading.Timer(TELL_S, log.warning, ("waiting for the MLflow store, up to %g s if it is held", HELD_S))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def artifact(client: MlflowClient, run_id: str, name: str) -> bytes:
    """Return the content of a file that a run keeps; MLflow would never remove a folder of its own choice.

    Raises:
        TrackingError: the file is gone, by itself or with its folder.
    """
    place = local_path(client.get_run(run_id).info.artifact_uri)
    if place is not None and not (place / name).exists():
        raise TrackingError(_gone(place / name))
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()


def _gone(path: Path) -> str:
    """Build the message about a file that the record names and nobody has."""
    gone = next((one for one in reversed(path.parents) if not one.exists()), path)
    return (
        f"{gone} is gone, where the record says that {path.name} lies; expected the files of a store where they were "
        "written, or their folder NAME.artifacts beside the database; put them back, move that folder there, or begin "
        "a new search with --fork NEW-NAME"
    )


def _create(path: Path) -> None:
    """Make an empty MLflow database."""
    _quiet()
    MlflowClient(tracking_uri=sqlite_address(path)).search_experiments(max_results=1)


def connect(uri: str) -> MlflowClient:
    """Return a client of the store at `uri`, which becomes this process's own; a local path is made absolute.

    A local store that was moved together with its files is told where they are now.
    """
    _quiet()
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    path = sqlite_path(uri)
    if path is not None:
        reroot(path.resolve())
    absolute = uri if path is None else sqlite_address(path)
    mlflow.set_tracking_uri(absolute)
    return _Client(tracking_uri=absolute)


def connect_existing(uri: str) -> MlflowClient:
    """Return a client of a store that was made before: MLflow would make a new one beside whoever asks.

    Raises:
        TrackingError: there is no such file, or no driver for such a database.
    """
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise TrackingError(f"no MLflow store at {uri}; expected the file {path}; run a search first or give --uri")
    try:
        return connect(uri)
    except FAULTS as error:
        raise TrackingError(unwritable(uri, str(error))) from error


def sqlite_path(uri: str) -> Path | None:
    """The file of a local database; None for a server or a database elsewhere."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def sqlite_address(path: Path) -> str:
    """The address of a local database for SQLAlchemy, to which `%`, `?`, `#` and spaces of a folder's name are marks.

    >>> sqlite_address(Path("/data/50% #1/paredown.db"))
    'sqlite:////data/50%25%20%231/paredown.db'
    """
    return f"sqlite:///{quote(str(path.resolve()))}"


def experiment_of(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of search `name`'s experiment, made if there is none; its files lie beside a local database.

    Raises:
        TrackingError: it was deleted by hand, or its files are gone with their folder.
    """
    found = known_experiment(client, uri, name)
    path = sqlite_path(uri)
    if found is not None:
        files = local_path(found.artifact_location)
        is_elsewhere = path is not None and files is not None and not files.is_relative_to(path.resolve().parent)
        if is_elsewhere and files is not None and not files.exists():
            raise TrackingError(_gone(files / "every file of the search"))
        return str(found.experiment_id)
    place = None if path is None else (path.resolve().with_suffix(".artifacts") / name).as_uri()
    return str(client.create_experiment(name, place))


def known_experiment(client: MlflowClient, uri: str, name: str) -> Experiment | None:
    """Return the experiment of search `name`, if there is one.

    Raises:
        TrackingError: it was deleted by hand.
    """
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        address = sqlite_address(path) if (path := sqlite_path(uri)) is not None else masked(uri)
        raise TrackingError(
            f"the experiment {name!r} of {masked(uri)} was deleted; expected one that is there; restore it with "
            f"MLFLOW_TRACKING_URI={shlex.quote(address)} mlflow experiments restore --experiment-id "
            f"{found.experiment_id}, or give the search another name"
        )
    return found


def child_runs(client: MlflowClient, experiment: str, parent: str) -> list[Run]:
    """Return all runs of an experiment whose parent is that run."""
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=1000, page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found

"""Reach the MLflow store, and check that it can be used; every other file gets its client here."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from search import cache
from search.base import TrackingError, masked

RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
PATIENCE = {RETRIES: "5", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""The patience of MLflow's client with a server that is gone: about a minute, so that the server may restart. Its own
defaults take four, and Ctrl-C has to wait for as long. Set these variables yourself to decide otherwise."""

FAULTS = (MlflowException, SQLAlchemyError, OSError, ImportError)
"""The errors of a store that cannot be used: a server, a database, a file, a driver that is not installed."""


def check_store(uri: str) -> None:
    """Check that the MLflow store can be read and written, before anything costs time.

    Raises:
        TrackingError: it cannot.
    """
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
    """Silence MLflow's own log."""
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def unwritable(uri: str, reason: str) -> str:
    """Build the message about a store that cannot be used, without its password."""
    return masked(
        f"cannot use the MLflow store {uri}: {textwrap.shorten(reason, 300)}; expected a store this process may read "
        "and write; correct tracking.uri, or the permissions of its folder"
    )


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
    @wraps(call)
    def held(*args: Any, **kwargs: Any) -> Any:
        with holding_signals():
            return call(*args, **kwargs)

    return held


def artifact(client: MlflowClient, run_id: str, name: str) -> bytes:
    """Return the content of a file that a run keeps; MLflow would never remove a folder of its own choice."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()


def _create(path: Path) -> None:
    """Make an empty MLflow database."""
    _quiet()
    MlflowClient(tracking_uri=f"sqlite:///{path.resolve()}").search_experiments(max_results=1)


def connect(uri: str) -> MlflowClient:
    """Return a client of the store at `uri`, which becomes this process's own; a local path is made absolute."""
    _quiet()
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    path = sqlite_path(uri)
    absolute = uri if path is None else f"sqlite:///{path.resolve()}"
    mlflow.set_tracking_uri(absolute)
    return _Client(tracking_uri=absolute)


def sqlite_path(uri: str) -> Path | None:
    """The file of a local database; None for a server or a database elsewhere."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def experiment_of(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of search `name`'s experiment, made if there is none; its files lie beside a local database."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    path = sqlite_path(uri)
    place = None if path is None else (path.resolve().with_suffix(".artifacts") / name).as_uri()
    return str(client.create_experiment(name, place))


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

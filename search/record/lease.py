"""One driver per search: a lock beside a local store; on a server a tag, which whoever drives keeps changing."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow.tracking import MlflowClient

from search import cache
from search.base import SearchError, TrackingError
from search.record.store import FAULTS, connect, experiment_of, failing_fast, sqlite_path, unwritable

log = logging.getLogger(__name__)

TAG = "paredown.driver"
BEAT_S, SILENT_S = 5.0, 16.0
"""Seconds between two words of a driver, and seconds without a word after which another may take its place."""


@contextmanager
def locked(uri: str, name: str) -> Iterator[None]:
    """Holds search `name` of this store for this process, where every other driver looks.

    A driver that was killed has let go of a local store, but a server cannot tell: there its place is free after
    `SILENT_S`. One that lost its server for so long is not told that another has its place.

    Raises:
        SearchError: another process holds it.
        TrackingError: the store cannot be reached.
    """
    path = sqlite_path(uri)
    if path is not None:
        with alone(f"{path.name} {name}", path.resolve().parent):
            yield
    else:
        with alone(f"{uri} {name}", cache.folder() / "locks"), _leased(uri, name):
            yield


@contextmanager
def _leased(uri: str, name: str) -> Iterator[None]:
    """The place of the one driver of a search on a server. What is compared is whether the tag changes: no clocks."""
    client, has_ended = connect(uri), threading.Event()
    try:
        experiment = experiment_of(client, uri, name)
        _wait_for_silence(client, experiment, name)
        client.set_experiment_tag(experiment, TAG, _word())
    except FAULTS as error:
        raise TrackingError(unwritable(uri, str(error))) from error

    def beat() -> None:
        while not has_ended.wait(BEAT_S):
            with suppress(*FAULTS):  # a server that is away is told by whoever has something to write
                client.set_experiment_tag(experiment, TAG, _word())

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        has_ended.set()
        with suppress(*FAULTS), failing_fast():
            beating.join(BEAT_S)
            client.delete_experiment_tag(experiment, TAG)


def _word() -> str:
    """Build a driver's word: its name, and something new each time."""
    return f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(4)}"


def _wait_for_silence(client: MlflowClient, experiment: str, name: str) -> None:
    """Returns once no driver says anything.

    Raises:
        SearchError: one does.
    """
    first = _heard(client, experiment)
    if first is None:
        return
    who = first.rpartition(", ")[0]
    log.warning("search %r has a driver, %s, unless that was killed; waiting %g s to hear of it", name, who, SILENT_S)
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        time.sleep(1)
        now = _heard(client, experiment)
        if now is None:
            return
        if now != first:
            raise SearchError(
                f"search {name!r} is run by {now.rpartition(', ')[0]}, in the same store; expected one driver per "
                "search; wait for it, stop it, or give this spec another name"
            )


def _heard(client: MlflowClient, experiment: str) -> str | None:
    """The last word of a driver that has not ended."""
    word: str | None = client.get_experiment(experiment).tags.get(TAG)
    return word


@contextmanager
def alone(what: str, where: Path) -> Iterator[None]:
    """Holds `what` for this process by a lock in the folder `where`; the system lets go of it however the process ends.

    Raises:
        SearchError: another process holds it.
    """
    path = where / f".paredown.{hashlib.blake2b(what.encode(), digest_size=8).hexdigest()}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SearchError(
                "this search is running already, in another process; expected one driver per search; "
                "wait for it, stop it, or give this spec another name"
            ) from error
        yield

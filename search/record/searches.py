"""Find the record of a search by its name, or open it for a driver to resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from search.base import TrackingError, masked
from search.cache import digest
from search.record.changes import check_unchanged
from search.record.record import Record
from search.record.store import (
    FAULTS,
    artifact,
    check_store,
    connect,
    connect_existing,
    experiment_of,
    known_experiment,
    unwritable,
)


def open_search(uri: str, name: str, *, decisive: Mapping[str, Any], spec: str, model: str) -> Record:
    """The record of search `name`: the one there is, to go on with, or a new one.

    Args:
        decisive: all that decides what the search proposes and what comes of it; its `budgets` may grow.

    Raises:
        SpecChanged: the record is of another search; the message lists what differs.
        TrackingError: the store cannot be reached or written.
    """
    client = connect(uri)
    try:
        experiment = experiment_of(client, uri, name)
        parent = next(iter(client.search_runs([experiment], "tags.`paredown.started` != ''")), None)
        if parent is not None and not _has_begun(client, experiment, parent):
            _forget(client, experiment, parent)  # nothing came of it, so nothing binds the spec
            parent = None
        if parent is None:
            born = {
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "limits": "{}",
                "registered_model": model,
            }
            tags = {f"paredown.{key}": value for key, value in born.items()}
            parent = client.create_run(experiment, tags=tags, run_name=name)
        run_id = parent.info.run_id
        if known := parent.data.tags.get("paredown.digest"):
            kept = artifact(client, run_id, f"decisive-{known}.json")
            check_unchanged(name, json.loads(kept), decisive)
        fingerprint = digest(decisive)
        client.log_dict(run_id, dict(decisive), f"decisive-{fingerprint}.json")
        for key, value in {"spec": spec, "registered_model": model, "digest": fingerprint}.items():
            client.set_tag(run_id, f"paredown.{key}", value)  # the digest last: by then its file is whole
        return Record(client, experiment, client.get_run(run_id))
    except FAULTS as error:
        raise TrackingError(unwritable(uri, str(error))) from error


def _has_begun(client: MlflowClient, experiment: str, parent: Run) -> bool:
    """Whether any trial of a search has ended."""
    of_it = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`paredown.state` != ''"
    return len(client.search_runs([experiment], of_it, max_results=1)) > 0


def _forget(client: MlflowClient, experiment: str, parent: Run) -> None:
    """Removes a search of which no trial has ended, with the trials a killed driver left."""
    for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"):
        client.delete_run(run.info.run_id)
    client.delete_run(parent.info.run_id)


def find_search(uri: str, name: str) -> Record:
    """The latest record of search `name`, which has its teacher's figures.

    Raises:
        TrackingError: the store holds no such search; the message lists those it has.
    """
    record = find_begun(uri, name)
    if record.search.teacher() is None:
        raise TrackingError(
            f"search {name!r} in {masked(uri)} has only begun; expected its teacher's figures; try again later"
        )
    return record


def find_begun(uri: str, name: str) -> Record:
    """The latest record of search `name`, however little it holds. Raises as `find_search` does."""
    client = connect_existing(uri)
    check_store(uri)
    found = known_experiment(client, uri, name)
    parents = client.search_runs([found.experiment_id], "tags.`paredown.started` != ''") if found else []
    if not found or not parents:
        others = {experiment.name for experiment in client.search_experiments()} - {"Default", name}
        held = ", ".join(sorted(others)) or "no other"
        raise TrackingError(f"no search {name!r} in {masked(uri)}; it holds {held}; check the name")
    return Record(client, found.experiment_id, parents[0])


def search_of(uri: str, run_id: str) -> Record:
    """The record of the search that a trial's run belongs to.

    Raises:
        TrackingError: it belongs to none.
    """
    client = connect_existing(uri)
    run = client.get_run(run_id)
    if (parent := run.data.tags.get("mlflow.parentRunId")) is None:
        raise TrackingError(
            f"run {run_id} in {masked(uri)} is no trial of a search; expected one that paredown search made; check the "
            "name of the model"
        )
    return Record(client, run.info.experiment_id, client.get_run(parent))


@dataclass(frozen=True)
class Listed:
    """A search as a store lists it: `started` and `ended` are Unix times in seconds, of its latest sitting's end."""

    name: str
    phase: str
    started: float | None
    ended: float | None


def list_searches(uri: str) -> list[Listed]:
    """The searches of the MLflow store at `uri`, the latest first, 1,000 at most.

    Raises:
        TrackingError: the store cannot be reached.
    """
    check_store(uri)
    client = connect(uri)
    try:
        names = {one.experiment_id: one.name for one in client.search_experiments()}
        runs = client.search_runs(list(names), "tags.`paredown.started` != ''")
    except FAULTS as error:
        raise TrackingError(unwritable(uri, str(error))) from error
    latest = {run.info.experiment_id: run for run in reversed(runs)}
    return [_listed(names[experiment], run) for experiment, run in reversed(latest.items())]


def _listed(name: str, run: Run) -> Listed:
    started, ended = (None if time is None else time / 1000 for time in (run.info.start_time, run.info.end_time))
    return Listed(name, run.data.tags.get("paredown.phase", "starting"), started, ended)

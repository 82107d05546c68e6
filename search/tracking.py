"""MLflow, and nothing else: the record of a search and the registry of its winners. The only file that imports it.

One experiment per search; a parent run per spec; a child run per trial. The driver is the only writer, and everything
`SearchResult` needs is read back from here, so a search can be looked at, or taken up again, by another process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import textwrap
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
import numpy as np
import safetensors.numpy
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError
from torch import nn

from methods.base import Budget, Plan
from search.base import TrackingError
from search.frontier import BudgetResult, Candidate, Cost, SearchResult, State, Teacher, winner

if TYPE_CHECKING:
    from search.study import Proposal
    from search.trial import Measured


FIGURES = (
    *("top1_surgery", "top1_bn", "top1_validation"),
    *("macs", "macs_expected", "macs_expected_validation", "macs_worst", "params", "size_bytes"),
)
"""What is recorded of an outcome as MLflow metrics; those of a gated model only where it is one."""

FAULTS = (MlflowException, SQLAlchemyError, OSError, ImportError)
"""What a store that cannot be used raises: a server, a database, a file, a driver that is not installed."""


class Tracker:
    """The record of one search: an experiment and the parent run of one spec."""

    def __init__(self, client: MlflowClient, experiment: str, parent: Run) -> None:
        self._client = client
        self._experiment = experiment
        self.run_id: str = parent.info.run_id
        self.registered_model = parent.data.tags["paredown.registered_model"]

    def write_teacher(self, teacher: Teacher) -> None:
        """Records the teacher's figures."""
        figures = {f"teacher/{key}": value for key, value in asdict(teacher).items() if value is not None}
        self._log(self.run_id, figures)

    def start_trial(self, proposal: Proposal) -> str:
        """A child run for a proposal; its id."""
        tags = {
            "mlflow.parentRunId": self.run_id,
            "paredown.knobs": json.dumps(dict(proposal.knobs) | _prefixed("recovery", proposal.recovery)),
        }
        name = f"{proposal.budget}-{proposal.number:03d}-{proposal.method}"
        run = self._client.create_run(self._experiment, tags=tags, run_name=name)
        params = {"budget": proposal.budget, "trial": proposal.number, "method": proposal.method}
        params |= dict(proposal.knobs) | _prefixed("recovery", proposal.recovery)
        run_id: str = run.info.run_id
        self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
        return run_id

    def complete(self, run_id: str, plan: Plan, measured: Measured, device_s: float, *, keep_weights: bool) -> None:
        """Ends a trial's run with its figures, its plan and, where they may be needed again, its weights."""
        outcome = measured.outcome
        figures = {key: float(value) for key in FIGURES if (value := getattr(outcome, key)) is not None}
        figures |= {"seconds": outcome.seconds, "device_s": device_s} | _flat("latency_ms", measured.latency_ms)
        self._log(run_id, figures | _flat("teacher_latency_ms", measured.teacher_latency_ms))
        self._client.log_dict(run_id, plan.to_json(), "plan.json")
        if keep_weights:
            self._log_weights(run_id, outcome.state)
        self._end(run_id, "complete")

    def fail(self, run_id: str, state: State, error: str, device_s: float) -> None:
        """Ends a trial's run as `failed` or `infeasible`, saying why."""
        self._log(run_id, {"seconds": device_s, "device_s": device_s})
        self._client.set_tag(run_id, "paredown.error", error[:5000])
        self._end(run_id, state)

    def discard(self, run_id: str) -> None:
        """Removes the run of a trial that a killed driver left unfinished; the trial gets a new one."""
        self._client.delete_run(run_id)

    def unfinished(self) -> list[str]:
        """The child runs that never ended."""
        return [run.info.run_id for run in self._children() if "paredown.state" not in run.data.tags]

    def candidate(self, run_id: str) -> Candidate:
        """A trial that ended, without its plan."""
        return _candidate(self._client.get_run(run_id))

    def trials(self) -> list[Candidate]:
        """Every trial that ended, by budget and number, without its plan."""
        ended = [_candidate(run) for run in self._children() if "paredown.state" in run.data.tags]
        return sorted(ended, key=lambda candidate: (candidate.budget, candidate.trial))

    def plan(self, run_id: str) -> Plan:
        """The plan of a completed trial."""
        return Plan.from_json(json.loads(Path(self._fetched(run_id, "plan.json")).read_text()))

    def weights(self, run_id: str) -> dict[str, np.ndarray]:
        """The state of a completed trial's student, where it was kept."""
        return safetensors.numpy.load_file(self._fetched(run_id, "student.safetensors"))

    def log_model(self, run_id: str, student: nn.Module, example: np.ndarray) -> str:
        """Stores `student` with its trial as a pt2 program, which needs no project code and no pickle; its URI."""
        requirements = [f"{package}=={version(package)}" for package in ("torch", "mlflow", "numpy")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mlflow.start_run(run_id=run_id):
                info = mlflow.pytorch.log_model(
                    student, name="model", input_example=example, pip_requirements=requirements
                )
        self._client.set_tag(run_id, "paredown.model_uri", info.model_uri)
        uri: str = info.model_uri
        return uri

    def model_uri(self, run_id: str) -> str | None:
        """The URI of the model stored with a trial, if there is one."""
        uri: str | None = self._client.get_run(run_id).data.tags.get("paredown.model_uri")
        return uri

    def register(self, alias: str, run_id: str, uri: str, tags: Mapping[str, object]) -> None:
        """Registers the stored model of a trial as a version, once, and points `alias` at it."""
        model = self.registered_model
        try:
            self._client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._client.search_model_versions(f"name='{model}' and run_id='{run_id}'")
        made = next((one for one in versions if one.tags.get("budget") == alias), None)
        if made is None:
            told = {"budget": alias} | {key: str(value) for key, value in tags.items()}
            made = self._client.create_model_version(model, source=uri, run_id=run_id, tags=told)
        self._client.set_registered_model_alias(model, alias, made.version)

    def _registered(self, alias: str) -> tuple[str | None, Mapping[str, str]]:
        """The run and the tags of the version an alias points at, if it does."""
        try:
            found = self._client.get_model_version_by_alias(self.registered_model, alias)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None, {}
        return found.run_id, found.tags

    def add_seconds(self, wall_s: float) -> None:
        """Adds to the wall seconds this search has taken, over all its sittings."""
        before = self._client.get_run(self.run_id).data.metrics.get("wall_s", 0.0)
        self._log(self.run_id, {"wall_s": before + wall_s})

    def finish(self, report: Path) -> None:
        """Ends the parent run, with the report beside it."""
        self._client.log_artifact(self.run_id, str(report))
        self._client.set_terminated(self.run_id, "FINISHED")

    def result(self) -> SearchResult:
        """The whole search as it stands in the record."""
        run = self._client.get_run(self.run_id)
        candidates = self.trials()
        tags, figures = run.data.tags, run.data.metrics
        limits: dict[str, dict[str, int]] = json.loads(tags["paredown.limits"])
        return SearchResult(
            name=self._client.get_experiment(self._experiment).name,
            teacher=_teacher(figures),
            budgets=[self._budget(name, limit, candidates) for name, limit in limits.items()],
            candidates=candidates,
            cost=Cost(
                wall_s=figures.get("wall_s", 0.0),
                device_s=sum(candidate.device_s for candidate in candidates),
                trials=len(candidates),
                stopped=sum(candidate.state == "stopped" for candidate in candidates),
            ),
            started=tags["paredown.started"],
            spec=tags.get("paredown.spec", ""),
        )

    def _budget(self, name: str, limits: Mapping[str, int], candidates: Sequence[Candidate]) -> BudgetResult:
        best = winner(candidates, limits)
        if best is None:
            return BudgetResult(name, limits)
        best = replace(best, plan=self.plan(best.run_id).to_json())
        run_id, tags = self._registered(name)
        if run_id != best.run_id:
            return BudgetResult(name, limits, best)
        return BudgetResult(
            name, limits, best, f"models:/{self.registered_model}@{name}", name, float(tags["top1_test"])
        )

    def _children(self) -> list[Run]:
        found: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.`mlflow.parentRunId` = '{self.run_id}'", max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def _log(self, run_id: str, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, 0) for key, value in figures.items()]
        self._client.log_batch(run_id, metrics=metrics)

    def _log_weights(self, run_id: str, state: Mapping[str, np.ndarray]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "student.safetensors")
            safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
            self._client.log_artifact(run_id, str(path))

    def _fetched(self, run_id: str, name: str) -> str:
        path: str = self._client.download_artifacts(run_id, name)
        return path

    def _end(self, run_id: str, state: str) -> None:
        self._client.set_terminated(run_id, "FAILED" if state == "failed" else "FINISHED")
        self._client.set_tag(run_id, "paredown.state", state)


def check_store(uri: str) -> None:
    """Makes sure that the MLflow store can be read and written, before anything costs time.

    Raises:
        TrackingError: it cannot.
    """
    path = _sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise TrackingError(_unwritable(uri, "permission denied"))
    try:
        _client(uri).search_experiments(max_results=1)
    except FAULTS as error:
        raise TrackingError(_unwritable(uri, str(error))) from error


def open_search(
    uri: str, name: str, *, digest: str, spec: str, model: str, limits: Sequence[Budget], started: str
) -> Tracker:
    """The record of search `name` for the spec with this digest: the one there is, or a new one.

    Raises:
        TrackingError: the store cannot be reached or written.
    """
    client = _client(uri)
    try:
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name, _artifact_location(uri, name))
        parents = list(client.search_runs([experiment], f"tags.`paredown.digest` = '{digest}'"))
        if not parents:
            born = {"paredown.digest": digest, "paredown.started": started}
            parents = [client.create_run(experiment, tags=born, run_name=name)]
        run_id = parents[0].info.run_id
        client.set_tag(run_id, "paredown.spec", spec)
        client.set_tag(run_id, "paredown.registered_model", model)
        client.set_tag(run_id, "paredown.limits", json.dumps({budget.name: budget.declared() for budget in limits}))
        parents = [client.get_run(run_id)]
        return Tracker(client, experiment, parents[0])
    except FAULTS as error:
        raise TrackingError(_unwritable(uri, str(error))) from error


def find_search(uri: str, name: str) -> Tracker:
    """The latest record of search `name`.

    Raises:
        TrackingError: the store holds no such search; the message lists those it has.
    """
    path = _sqlite_path(uri)
    if path is not None and not path.is_file():
        raise TrackingError(f"no MLflow store at {uri}; expected the file {path}; run a search first or give --uri")
    check_store(uri)
    client = _client(uri)
    found = client.get_experiment_by_name(name)
    parents = (
        client.search_runs([found.experiment_id], "tags.`paredown.digest` != ''", order_by=["start_time DESC"])
        if found
        else []
    )
    if not found or not parents:
        names = [experiment.name for experiment in client.search_experiments() if experiment.name != "Default"]
        raise TrackingError(f"no search {name!r} in {uri}; it holds {', '.join(names) or 'none'}; check the name")
    if "teacher/top1_validation" not in parents[0].data.metrics:
        raise TrackingError(f"search {name!r} in {uri} has only begun; expected its teacher's figures; try again later")
    return Tracker(client, found.experiment_id, parents[0])


def load_model(uri: str, name: str) -> object:
    """The PyTorch model at `name`, such as `models:/x/1`, in the store at `uri`."""
    _client(uri)
    return mlflow.pytorch.load_model(name)


def _unwritable(uri: str, reason: str) -> str:
    message = (
        f"cannot use the MLflow store {uri}: {textwrap.shorten(reason, 300)}; expected a store this process may read "
        "and write; correct tracking.uri, or the permissions of its folder"
    )
    return re.sub(r"//([^:/@\s]+):[^@\s]+@", r"//\1:***@", message)


def _client(uri: str) -> MlflowClient:
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    path = _sqlite_path(uri)
    absolute = uri if path is None else f"sqlite:///{path.resolve()}"
    mlflow.set_tracking_uri(absolute)
    return MlflowClient(tracking_uri=absolute)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _artifact_location(uri: str, name: str) -> str | None:
    """A folder beside a local database; a server has its own place."""
    path = _sqlite_path(uri)
    return None if path is None else (path.resolve().with_suffix(".artifacts") / name).as_uri()


def _teacher(figures: Mapping[str, float]) -> Teacher:
    return Teacher(
        top1_validation=figures["teacher/top1_validation"],
        top1_test=figures.get("teacher/top1_test"),
        macs=int(figures["teacher/macs"]),
        params=int(figures["teacher/params"]),
        size_bytes=int(figures["teacher/size_bytes"]),
    )


COUNTS = ("macs", "macs_expected", "params", "size_bytes")


def _candidate(run: Run) -> Candidate:
    figures, params = run.data.metrics, run.data.params
    counts: dict[str, Any] = {key: int(figures[key]) for key in COUNTS if key in figures}
    return Candidate(
        run_id=run.info.run_id,
        trial=int(params["trial"]),
        budget=params["budget"],
        method=params["method"],
        knobs=json.loads(run.data.tags["paredown.knobs"]),
        state=cast(State, run.data.tags["paredown.state"]),
        latency_ms=_nested("latency_ms", figures),
        teacher_latency_ms=_nested("teacher_latency_ms", figures),
        top1_surgery=figures.get("top1_surgery"),
        top1_bn=figures.get("top1_bn"),
        top1_validation=figures.get("top1_validation"),
        seconds=figures.get("seconds", 0.0),
        device_s=figures.get("device_s", 0.0),
        error=run.data.tags.get("paredown.error"),
        **counts,
    )


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in values.items()}


def _flat(prefix: str, table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{prefix}/{row}/{key}": value for row, values in table.items() for key, value in values.items()}


def _nested(prefix: str, figures: Mapping[str, float]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        if key.startswith(f"{prefix}/"):
            row, column = key.removeprefix(f"{prefix}/").rsplit("/", 1)
            table.setdefault(row, {})[column] = value
    return table

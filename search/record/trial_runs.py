"""The trials' runs in MLflow: begun, filled as a trial goes on, and ended; children of the search's run."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy
from mlflow.entities import Metric, Param, RunData, RunTag, ViewType
from mlflow.tracking import MlflowClient

from search.noise import packed
from search.record.entries import FIGURES, candidate_of_run, metrics_of, now_ms, of_fitted, of_timings, prefixed
from search.record.store import child_runs
from search.trials import Candidate, Fitted, Proposal, State, Timing

if TYPE_CHECKING:  # who only looks at a record need not wait for torch
    from methods.pipeline import Outcome

log = logging.getLogger(__name__)

WAIT_MS = 60_000
"""Milliseconds that figures of a running trial wait to be written, at its rungs: every write costs the driver."""


@dataclass
class _Open:
    """A trial's run that has not ended: all that is known of it, and how much of that is written.

    `since` is when the first of what is not was known (Unix time in ms).
    """

    since: int
    tags: list[RunTag]
    params: list[Param]
    metrics: list[Metric] = field(default_factory=list)
    written: tuple[int, int, int] = (0, 0, 0)


class TrialRuns:
    """Writes the runs of the trials of the search whose own run is `parent`."""

    def __init__(self, client: MlflowClient, experiment: str, parent: str) -> None:
        self._client = client
        self._experiment = experiment
        self._parent = parent
        self._open: dict[str, _Open] = {}

    def start(self, proposal: Proposal) -> str:
        """A child run for a proposal; its id.

        Its params, what it is `planned` to cost and its rungs are written when the trial ends, or at a rung once they
        have waited for a minute. A driver that is killed loses what it had not written, but such a trial runs again.
        """
        tags = {
            "mlflow.parentRunId": self._parent,
            "paredown.knobs": json.dumps(dict(proposal.knobs) | prefixed("recovery", proposal.recovery)),
        }
        name = f"{proposal.budget}-{proposal.number:03d}-{proposal.method}"
        run = self._client.create_run(self._experiment, tags=tags, run_name=name)
        params = {"budget": proposal.budget, "trial": proposal.number, "method": proposal.method}
        params |= dict(proposal.knobs) | prefixed("recovery", proposal.recovery)
        run_id: str = run.info.run_id
        known = [RunTag(key, value) for key, value in tags.items()]
        told = [Param(key, str(value)) for key, value in params.items()]
        self._open[run_id] = _Open(now_ms(), known, told, written=(len(known), 0, 0))
        return run_id

    def planned(self, run_id: str, fitted: Fitted, work: str) -> None:
        """Records what is known of a trial before it is trained; `work` names its plan and recipe."""
        self._client.log_dict(run_id, fitted.plan.to_json(), "plan.json")
        self._keep(run_id, of_fitted(fitted), {"paredown.work": work})

    def progress(self, run_id: str, step: int, top1: float) -> None:
        """Records validation top-1 at a step of recovery."""
        self._keep(run_id, {"top1": top1}, step=step)
        if now_ms() - self._open[run_id].since >= WAIT_MS:
            self._write(run_id)

    def complete(
        self, run_id: str, outcome: Outcome, device_s: float, *, top1_drop: float, keep_weights: bool
    ) -> Candidate:
        """Ends a trial's run with its figures and, where they may be needed again, its weights; the trial."""
        if keep_weights:
            self.write_weights(run_id, outcome.state)
        return self._end(run_id, "complete", *_reached(outcome, device_s, top1_drop))

    def pass_over(self, run_id: str, outcome: Outcome, device_s: float, *, top1_drop: float) -> Candidate:
        """Ends the run of a trial that was stopped before its first step, with its figures there; the trial."""
        figures, tags = _reached(outcome, device_s, top1_drop)
        stop = {"stopped_at": 0.0, "top1_last": outcome.top1_validation}
        return self._end(run_id, "stopped", figures | stop, tags)

    def reuse(self, run_id: str, source: str) -> Candidate:
        """Ends a trial's run with what came of `source`, a run of the same plan and recipe; the trial cost nothing."""
        found = self._client.get_run(source).data
        figures = {key: found.metrics[key] for key in (*FIGURES, "top1_drop") if key in found.metrics}
        tags = {key: found.tags[key] for key in ("paredown.hits",) if key in found.tags}
        spent = {"seconds": 0.0, "device_s": 0.0}
        return self._end(run_id, "complete", figures | spent, {**tags, "paredown.same_as": source})

    def stop(self, run_id: str, step: int, top1: float, device_s: float) -> Candidate:
        """Ends the run of a trial that was given up at `step`; the trial."""
        figures = {"stopped_at": step, "top1_last": top1, "seconds": device_s, "device_s": device_s}
        return self._end(run_id, "stopped", figures)

    def fail(self, run_id: str, state: State, error: str, device_s: float) -> Candidate:
        """Ends a trial's run as `failed` or `infeasible`, saying why; the trial."""
        spent = {"seconds": device_s, "device_s": device_s}
        return self._end(run_id, state, spent, {"paredown.error": error[:5000]})

    def write_timings(self, run_id: str, timings: Mapping[str, Timing]) -> None:
        """Records the timings of a trial that ended without any."""
        self._client.log_batch(run_id, metrics_of(of_timings(timings), now_ms()))

    def write_weights(self, run_id: str, state: Mapping[str, np.ndarray]) -> None:
        """Record the state of a student."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "student.safetensors")
            safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
            self._client.log_artifact(run_id, str(path))

    def restore_deleted(self) -> None:
        """Restore the runs of trials that ended and were deleted by hand: nothing else deletes those."""
        ended = f"tags.`mlflow.parentRunId` = '{self._parent}' and tags.`paredown.state` != ''"
        for run in self._client.search_runs([self._experiment], ended, ViewType.DELETED_ONLY):
            log.warning("the run %s of a trial was deleted by hand; it is restored", run.info.run_name)
            self._client.restore_run(run.info.run_id)

    def remove_unfinished(self) -> None:
        """Remove the runs of trials that a killed driver never ended, and close those it was just ending."""
        for run in child_runs(self._client, self._experiment, self._parent):
            state = run.data.tags.get("paredown.state")
            if state is None:
                self._client.delete_run(run.info.run_id)
            elif run.info.status != _status(state):  # killed between the two writes of `_end`
                self._client.set_terminated(run.info.run_id, _status(state))

    def end_open(self, status: str) -> None:
        """End every run that is still open with MLflow's `status`, or with its own if only that was not written."""
        for run in child_runs(self._client, self._experiment, self._parent):
            if run.info.status == "RUNNING":
                state = run.data.tags.get("paredown.state")
                self._client.set_terminated(run.info.run_id, _status(state) if state else status)

    def _keep(
        self, run_id: str, figures: Mapping[str, float], tags: Mapping[str, str] = MappingProxyType({}), step: int = 0
    ) -> None:
        """Let figures and tags wait for the next write of their trial."""
        run, now = self._open[run_id], now_ms()
        if run.written == (len(run.tags), len(run.params), len(run.metrics)):
            run.since = now
        run.metrics += metrics_of(figures, now, step)
        run.tags += [RunTag(key, value) for key, value in tags.items()]

    def _write(self, run_id: str) -> None:
        """Writes what waits, tags last: who finds one of these finds all of it."""
        run = self._open[run_id]
        tags, params, metrics = run.written
        self._client.log_batch(run_id, run.metrics[metrics:], run.params[params:], run.tags[tags:])
        run.written = len(run.tags), len(run.params), len(run.metrics)

    def _end(
        self, run_id: str, state: State, figures: Mapping[str, float], tags: Mapping[str, str] = MappingProxyType({})
    ) -> Candidate:
        """Ends a trial's run; the trial as it would be read back."""
        self._keep(run_id, figures, {**tags, "paredown.state": state})
        self._write(run_id)
        run, now = self._open.pop(run_id), now_ms()
        self._client.set_terminated(run_id, _status(state), end_time=now)
        return candidate_of_run(run_id, RunData(run.metrics, run.params, run.tags), now)


def _reached(outcome: Outcome, device_s: float, top1_drop: float) -> tuple[dict[str, float], dict[str, str]]:
    """Return an outcome as the metrics and the tags of its run."""
    figures = {key: float(value) for key in FIGURES if (value := getattr(outcome, key)) is not None}
    tags = {} if outcome.hits is None else {"paredown.hits": packed(outcome.hits)}
    return figures | {"top1_drop": top1_drop, "seconds": outcome.seconds, "device_s": device_s}, tags


def _status(state: str) -> str:
    """Return MLflow's word for how a trial ended; stopping early is not failing."""
    return "FAILED" if state == "failed" else "FINISHED"

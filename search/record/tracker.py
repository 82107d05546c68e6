"""MLflow runs: what is written of a search and its trials, and read back.

One experiment per search with one parent run; a child run per trial. The driver is the only writer, and everything
`SearchResult` needs is read back from here, so a search can be looked at, or taken up again, by another process.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import safetensors.numpy
from mlflow.entities import Metric, Param, Run, RunData, RunTag
from mlflow.tracking import MlflowClient

from search.frontier import winner
from search.record.entries import FIGURES, candidate_of, of_fitted, of_teacher, prefixed, teacher_of
from search.record.registry import Registry
from search.record.store import FAULTS, artifact, at_once
from search.results import BudgetResult, Cost, SearchResult
from search.trials import Candidate, Fitted, Proposal, State, Teacher

if TYPE_CHECKING:  # who only looks at a record need not wait for torch
    from methods.base import Plan
    from methods.pipeline import Outcome


log = logging.getLogger(__name__)

Phase: TypeAlias = Literal["starting", "scoring", "trials", "registering", "done", "stopped", "failed"]
"""What a driver is at, or how it ended; one that was killed could not tell, and its last phase stays on record."""

WAIT_MS = 60_000
"""How long what is known of a running trial waits to be written, at its rungs: every write costs the driver."""


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


class Tracker:
    """The record of one search: an experiment and its parent run."""

    def __init__(self, client: MlflowClient, experiment: str, parent: Run) -> None:
        self.client = client
        self._experiment = experiment
        self.run_id: str = parent.info.run_id
        self.registered_model: str = parent.data.tags["paredown.registered_model"]
        self.spec_digest: str = parent.data.tags.get(
            "paredown.digest", ""
        )  # written last of all that a record begins with
        self.registry = Registry(client, self.registered_model)
        self._open: dict[str, _Open] = {}
        self._amounts: dict[str, float] | None = None

    def enter(self, phase: Phase) -> None:
        """Records what the driver is at now."""
        self.client.set_tag(self.run_id, "paredown.phase", phase)

    def expect(self, trials: int) -> None:
        """Records how many trials there will be in all."""
        self.client.set_tag(self.run_id, "paredown.expected", str(trials))

    def write_teacher(self, teacher: Teacher) -> None:
        """Records the teacher's figures."""
        self._log(of_teacher(teacher))

    def teacher(self) -> Teacher | None:
        """The teacher's figures, where they are on record."""
        figures = self.client.get_run(self.run_id).data.metrics
        return teacher_of(figures) if "teacher/top1_validation" in figures else None

    def write_limits(self, limits: Mapping[str, Mapping[str, float]]) -> None:
        """Records every budget's limits in absolute units."""
        self.client.set_tag(self.run_id, "paredown.limits", json.dumps(limits))

    def write_devices(self, devices: Mapping[str, Mapping[str, Any]]) -> None:
        """Records what latency was measured on."""
        self.client.set_tag(self.run_id, "paredown.devices", json.dumps(devices))

    def able(self) -> dict[str, Any]:
        """The methods that each budget's study began with, and its size."""
        found: dict[str, Any] = json.loads(self.client.get_run(self.run_id).data.tags.get("paredown.able", "{}"))
        return found

    def write_able(self, able: Mapping[str, Any]) -> None:
        """Records them."""
        self.client.set_tag(self.run_id, "paredown.able", json.dumps(able))

    def write_beyond(self, reasons: Mapping[str, Mapping[str, str]]) -> None:
        """Records per budget and method why it cannot be met."""
        self.client.log_dict(self.run_id, dict(reasons), "beyond.json")

    def write_importance(self, importance: Mapping[str, Mapping[str, float]]) -> None:
        """Records how much each knob decided, per budget."""
        self.client.log_dict(self.run_id, dict(importance), "importance.json")

    def start_trial(self, proposal: Proposal) -> str:
        """A child run for a proposal; its id.

        Its params, what it is `planned` to cost and its rungs are written when the trial ends, or at a rung once they
        have waited for a minute. A driver that is killed loses what it had not written, but such a trial runs again.
        """
        tags = {
            "mlflow.parentRunId": self.run_id,
            "paredown.knobs": json.dumps(dict(proposal.knobs) | prefixed("recovery", proposal.recovery)),
        }
        name = f"{proposal.budget}-{proposal.number:03d}-{proposal.method}"
        run = self.client.create_run(self._experiment, tags=tags, run_name=name)
        params = {"budget": proposal.budget, "trial": proposal.number, "method": proposal.method}
        params |= dict(proposal.knobs) | prefixed("recovery", proposal.recovery)
        run_id: str = run.info.run_id
        known = [RunTag(key, value) for key, value in tags.items()]
        told = [Param(key, str(value)) for key, value in params.items()]
        self._open[run_id] = _Open(_milliseconds(), known, told, written=(len(known), 0, 0))
        return run_id

    def planned(self, run_id: str, fitted: Fitted, work: str) -> None:
        """Records what is known of a trial before it is trained; `work` names its plan and recipe."""
        self.client.log_dict(run_id, fitted.plan.to_json(), "plan.json")
        self._keep(run_id, of_fitted(fitted), {"paredown.work": work})

    def progress(self, run_id: str, step: int, top1: float) -> None:
        """Records validation top-1 at a step of recovery."""
        self._keep(run_id, {"top1": top1}, step=step)
        if _milliseconds() - self._open[run_id].since >= WAIT_MS:
            self._write(run_id)

    def complete(
        self, run_id: str, outcome: Outcome, device_s: float, *, top1_drop: float, keep_weights: bool
    ) -> Candidate:
        """Ends a trial's run with its figures and, where they may be needed again, its weights; the trial."""
        figures = {key: float(value) for key in FIGURES if (value := getattr(outcome, key)) is not None}
        if keep_weights:
            self._log_weights(run_id, outcome.state)
        spent = {"seconds": outcome.seconds, "device_s": device_s}
        return self._end(run_id, "complete", figures | {"top1_drop": top1_drop} | spent)

    def reuse(self, run_id: str, source: str) -> Candidate:
        """Ends a trial's run with what came of `source`, a run of the same plan and recipe; the trial cost nothing."""
        found = self.client.get_run(source).data
        figures = {key: found.metrics[key] for key in (*FIGURES, "top1_drop") if key in found.metrics}
        return self._end(run_id, "complete", figures | {"seconds": 0.0, "device_s": 0.0}, {"paredown.same_as": source})

    def stop(self, run_id: str, step: int, top1: float, device_s: float) -> Candidate:
        """Ends the run of a trial that was given up at `step`; the trial."""
        figures = {"stopped_at": step, "top1_last": top1, "seconds": device_s, "device_s": device_s}
        return self._end(run_id, "stopped", figures)

    def fail(self, run_id: str, state: State, error: str, device_s: float) -> Candidate:
        """Ends a trial's run as `failed` or `infeasible`, saying why; the trial."""
        spent = {"seconds": device_s, "device_s": device_s}
        return self._end(run_id, state, spent, {"paredown.error": error[:5000]})

    def resume(self) -> None:
        """Clears up after a killed driver: runs of trials that never ended are removed, since those run again."""
        self.client.update_run(self.run_id, status="RUNNING")
        self.enter("starting")
        for run in self._children():
            state = run.data.tags.get("paredown.state")
            if state is None:
                self.client.delete_run(run.info.run_id)
            elif run.info.status == "RUNNING":  # killed between the two writes of `_end`
                self.client.set_terminated(run.info.run_id, _status(state))

    def halt(self, status: str) -> None:
        """Ends every run that is still open as `status`, which is MLflow's `KILLED` or `FAILED`."""
        try:
            with at_once():
                for run in self._children():
                    if run.info.status == "RUNNING":
                        self.client.set_terminated(run.info.run_id, status)
                self.enter("stopped" if status == "KILLED" else "failed")
                self.client.set_terminated(self.run_id, status)
        except FAULTS as error:  # of a store that is gone: what led here is told, not this
            log.warning("runs are still open in MLflow: %s", error)

    def trials(self) -> list[Candidate]:
        """Every trial that ended, by budget and number, without its plan."""
        ended = [run for run in self._children() if "paredown.state" in run.data.tags]
        found = [_candidate(run.info.run_id, run.data, run.info.end_time) for run in ended]
        return sorted(found, key=lambda candidate: (candidate.budget, candidate.trial))

    def works(self) -> dict[str, str]:
        """The run of every plan and recipe that was trained to the end, by the `work` it was `planned` with."""
        complete = [run for run in self._children() if run.data.tags.get("paredown.state") == "complete"]
        return {
            run.data.tags["paredown.work"]: run.info.run_id
            for run in complete
            if "paredown.same_as" not in run.data.tags
        }

    def plan(self, run_id: str) -> Plan:
        """The plan of a completed trial."""
        from methods.base import Plan

        return Plan.from_json(self._plan(run_id))

    def weights(self, run_id: str) -> dict[str, np.ndarray]:
        """The state of a completed trial's student, where it was kept; a reused one's is its source's."""
        source = self.client.get_run(run_id).data.tags.get("paredown.same_as", run_id)
        return safetensors.numpy.load(artifact(self.client, source, "student.safetensors"))

    def add(self, **amounts: float) -> None:
        """Adds to what this search has taken over all its sittings: seconds, scoring shards."""
        if self._amounts is None:
            self._amounts = dict(self.client.get_run(self.run_id).data.metrics)
        sums = {name: self._amounts.get(name, 0.0) + amount for name, amount in amounts.items()}
        self._amounts |= sums
        self._log(sums)

    def finish(self, report: Path) -> None:
        """Ends the parent run, with the report beside it."""
        self.client.log_artifact(self.run_id, str(report))
        self.enter("done")
        self.client.set_terminated(self.run_id, "FINISHED")

    def result(self) -> SearchResult:
        """The whole search as it stands in the record."""
        run = self.client.get_run(self.run_id)
        candidates = self.trials()
        tags, figures = run.data.tags, run.data.metrics
        limits: dict[str, dict[str, float]] = json.loads(tags["paredown.limits"])
        beside = {name: figures.get(name, 0.0) for name in ("scoring_s", "measuring_s")}
        return SearchResult(
            name=self.client.get_experiment(self._experiment).name,
            teacher=teacher_of(figures),
            budgets=[self._budget(name, limit, candidates) for name, limit in limits.items()],
            candidates=candidates,
            cost=Cost(
                wall_s=figures.get("wall_s", 0.0),
                device_s=sum(one.device_s for one in candidates) + sum(beside.values()),
                trials=len(candidates),
                stopped=sum(candidate.state == "stopped" for candidate in candidates),
                **beside,
            ),
            started=tags["paredown.started"],
            spec=tags.get("paredown.spec", ""),
            devices=json.loads(tags.get("paredown.devices", "{}")),
            importance=self._json("importance.json"),
            beyond=self._json("beyond.json"),
        )

    def _budget(self, name: str, limits: Mapping[str, float], candidates: Sequence[Candidate]) -> BudgetResult:
        best = winner(candidates, limits)
        if best is None:
            return BudgetResult(name, limits)
        best = replace(best, plan=self._plan(best.run_id))
        found = self.registry.version_of(best.run_id, name)
        if found is None:
            return BudgetResult(name, limits, best)
        held = self.registry.holder(name)
        alias = name if held is not None and held.run_id == best.run_id else None
        uri = f"models:/{self.registered_model}" + (f"@{name}" if alias else f"/{found.version}")
        return BudgetResult(name, limits, best, uri, alias, float(found.tags["top1_test"]))

    def _plan(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(artifact(self.client, run_id, "plan.json"))
        return found

    def _children(self) -> list[Run]:
        found: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self._experiment], f"tags.`mlflow.parentRunId` = '{self.run_id}'", max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def _log(self, figures: Mapping[str, float]) -> None:
        """Writes figures of the search."""
        self.client.log_batch(self.run_id, _metrics(figures, _milliseconds()))

    def _keep(
        self, run_id: str, figures: Mapping[str, float], tags: Mapping[str, str] = MappingProxyType({}), step: int = 0
    ) -> None:
        """Has figures and tags wait for the next write of their trial."""
        run, now = self._open[run_id], _milliseconds()
        if run.written == (len(run.tags), len(run.params), len(run.metrics)):
            run.since = now
        run.metrics += _metrics(figures, now, step)
        run.tags += [RunTag(key, value) for key, value in tags.items()]

    def _write(self, run_id: str) -> None:
        """Writes what waits, tags last: who finds one of these finds all of it."""
        run = self._open[run_id]
        tags, params, metrics = run.written
        self.client.log_batch(run_id, run.metrics[metrics:], run.params[params:], run.tags[tags:])
        run.written = len(run.tags), len(run.params), len(run.metrics)

    def _log_weights(self, run_id: str, state: Mapping[str, np.ndarray]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "student.safetensors")
            safetensors.numpy.save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, path)
            self.client.log_artifact(run_id, str(path))

    def _json(self, name: str) -> dict[str, Any]:
        """An artifact of the parent run, empty where it has none of that name."""
        if name not in {file.path for file in self.client.list_artifacts(self.run_id)}:
            return {}
        found: dict[str, Any] = json.loads(artifact(self.client, self.run_id, name))
        return found

    def _end(
        self, run_id: str, state: State, figures: Mapping[str, float], tags: Mapping[str, str] = MappingProxyType({})
    ) -> Candidate:
        """Ends a trial's run; the trial as it would be read back."""
        self._keep(run_id, figures, {**tags, "paredown.state": state})
        self._write(run_id)
        run, now = self._open.pop(run_id), _milliseconds()
        self.client.set_terminated(run_id, _status(state), end_time=now)
        return _candidate(run_id, RunData(run.metrics, run.params, run.tags), now)


def _metrics(figures: Mapping[str, float], now: int, step: int = 0) -> list[Metric]:
    return [Metric(key, float(value), now, step) for key, value in figures.items()]


def _candidate(run_id: str, data: RunData, ended_ms: int | None) -> Candidate:
    ended = 0.0 if ended_ms is None else ended_ms / 1000
    return candidate_of(data.metrics, data.params, data.tags, run_id=run_id, ended=ended)


def _milliseconds() -> int:
    """Unix time as MLflow counts it."""
    return int(time.time() * 1000)


def _status(state: str) -> str:
    """MLflow's word for how a trial ended; stopping early is not failing."""
    return "FAILED" if state == "failed" else "FINISHED"

"""Read a search back from MLflow, so that another process can look at it or resume it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import safetensors.numpy
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from search.frontier import Rule, standing, winner
from search.limits import Limits
from search.record.entries import candidate_of_run, scale_of, teacher_of
from search.record.registry import Registry
from search.record.store import artifact, child_runs
from search.results import BudgetResult, Cost, SearchResult
from search.trials import Candidate

if TYPE_CHECKING:  # who only looks at a record need not wait for torch
    from methods.base import Plan


class Reader:
    """Reads the search whose own run is `run_id`."""

    def __init__(self, client: MlflowClient, experiment: str, run_id: str, registry: Registry) -> None:
        self._client = client
        self._experiment = experiment
        self._run_id = run_id
        self._registry = registry

    def trials(self) -> list[Candidate]:
        """Return every trial that ended, by budget and number, without its plan."""
        runs = filter(_state, child_runs(self._client, self._experiment, self._run_id))
        found = [candidate_of_run(run.info.run_id, run.data, run.info.end_time) for run in runs]
        return sorted(found, key=lambda candidate: (candidate.budget, candidate.trial))

    def works(self) -> dict[str, str]:
        """Return the run of every plan and recipe that was trained to the end, by the `work` it was `planned` with."""
        runs = child_runs(self._client, self._experiment, self._run_id)
        trained = [run for run in runs if _state(run) == "complete" and "paredown.same_as" not in run.data.tags]
        return {run.data.tags["paredown.work"]: run.info.run_id for run in trained}

    def plan(self, run_id: str) -> Plan:
        """Return the plan of a completed trial."""
        from methods.base import Plan

        return Plan.from_json(self._plan(run_id))

    def has_weights(self, run_id: str) -> bool:
        """Whether the state of a trial's student was kept."""
        return any(file.path == "student.safetensors" for file in self._client.list_artifacts(run_id))

    def weights(self, run_id: str) -> dict[str, np.ndarray]:
        """Return the state of a trial's student, if it was kept; a reused one's is its source's."""
        source = self._client.get_run(run_id).data.tags.get("paredown.same_as", run_id)
        return safetensors.numpy.load(artifact(self._client, source, "student.safetensors"))

    def result(self) -> SearchResult:
        """Return the whole search as it stands in the record."""
        run = self._client.get_run(self._run_id)
        candidates = self.trials()
        tags, figures = run.data.tags, run.data.metrics
        beside = {name: figures.get(name, 0.0) for name in ("scoring_s", "measuring_s")}
        return SearchResult(
            name=self._client.get_experiment(self._experiment).name,
            teacher=teacher_of(figures),
            budgets=[self._budget(name, limits, candidates, rule_of(tags)) for name, limits in self.limits().items()],
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
            unreachable=self._json("beyond.json"),
            metric=scale_of(tags),
            rule=rule_of(tags),
        )

    def limits(self) -> dict[str, Limits]:
        """Return every budget's limits."""
        tags = self._client.get_run(self._run_id).data.tags
        return {name: Limits(limits) for name, limits in json.loads(tags["paredown.limits"]).items()}

    def _budget(self, name: str, limits: Limits, candidates: Sequence[Candidate], rule: Rule) -> BudgetResult:
        best = winner(candidates, limits, rule)
        if best is None:
            return BudgetResult(name, limits)
        fitting, equal = standing(candidates, limits)
        best = replace(best, plan=self._plan(best.run_id))
        known = BudgetResult(name, limits, best, fitting=fitting, equal=equal)
        found = self._registry.version_of(best.run_id, name)
        if found is None:
            return known
        held = self._registry.holder(name)
        alias = name if held is not None and held.run_id == best.run_id else None
        uri = f"models:/{self._registry.model}" + (f"@{name}" if alias else f"/{found.version}")
        return replace(known, model_uri=uri, alias=alias, top1_test=float(found.tags["top1_test"]))

    def _plan(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(artifact(self._client, run_id, "plan.json"))
        return found

    def _json(self, name: str) -> dict[str, Any]:
        """Return an artifact of the search's run, empty if it has none of that name."""
        if name not in {file.path for file in self._client.list_artifacts(self._run_id)}:
            return {}
        found: dict[str, Any] = json.loads(artifact(self._client, self._run_id, name))
        return found


def rule_of(tags: Mapping[str, str]) -> Rule:
    """Return the rule by which budgets are won, by the tags of its run; before there was a choice: the best."""
    return cast(Rule, tags.get("paredown.winner", "best"))


def _state(run: Run) -> str | None:
    """Return how a trial ended, if it did.

    MLflow reads a run's row, and after it tags, params and metrics in any order, while a driver may be writing them.
    The row is the last that is written: where it says that the run is over, the rest is whole.
    """
    state: str | None = run.data.tags.get("paredown.state")
    return None if run.info.status == "RUNNING" else state

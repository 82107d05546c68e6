"""The search's own run in MLflow, parent of its trials' runs: its phase, its teacher, its limits, what it has taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from search.frontier import Rule
from search.limits import Limits
from search.record.entries import metrics_of, now_ms, of_teacher, teacher_of
from search.record.store import artifact
from search.trials import Teacher
from search.units import Scale

Phase: TypeAlias = Literal["starting", "scoring", "trials", "registering", "done", "stopped", "failed"]
"""The driver's present step, or how it ended; a killed one could not tell, and its last phase stays on record."""


class SearchRun:
    """Writes and reads the run of a search."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client = client
        self.run_id: str = run.info.run_id
        self.registered_model: str = run.data.tags["paredown.registered_model"]
        self.spec_digest: str = run.data.tags.get(
            "paredown.digest", ""
        )  # written last of all that a record begins with
        self._amounts: dict[str, float] | None = None

    def enter(self, phase: Phase) -> None:
        """Record the driver's present step."""
        self._client.set_tag(self.run_id, "paredown.phase", phase)

    def expect(self, trials: int) -> None:
        """Record how many trials there will be in all."""
        self._client.set_tag(self.run_id, "paredown.expected", str(trials))

    def write_teacher(self, teacher: Teacher) -> None:
        """Record the teacher's figures."""
        self._log(of_teacher(teacher))

    def teacher(self) -> Teacher | None:
        """Return the teacher's figures, if they are on record."""
        figures = self._client.get_run(self.run_id).data.metrics
        return teacher_of(figures) if "teacher/top1_validation" in figures else None

    def decisive(self) -> dict[str, Any]:
        """Return all that decides what the search proposes, as `SearchSpec.decisive` gave it."""
        kept = artifact(self._client, self.run_id, f"decisive-{self.spec_digest}.json")
        found: dict[str, Any] = json.loads(kept)
        return found

    def write_metric(self, metric: Scale) -> None:
        """Record the scale that every top-1 is a share of, unless that is top-1 itself."""
        if metric.described:
            self._client.set_tag(self.run_id, "paredown.metric", json.dumps(metric.described["metric"]))

    def write_rule(self, rule: Rule) -> None:
        """Record which of a budget's candidates wins it."""
        self._client.set_tag(self.run_id, "paredown.winner", rule)

    def write_limits(self, limits: Mapping[str, Limits]) -> None:
        """Record every budget's limits in absolute units."""
        self._client.set_tag(self.run_id, "paredown.limits", json.dumps(limits))

    def write_devices(self, devices: Mapping[str, Mapping[str, Any]]) -> None:
        """Record what latency was measured on."""
        self._client.set_tag(self.run_id, "paredown.devices", json.dumps(devices))

    def capable(self) -> dict[str, Any]:
        """Return, per budget, the methods its study began with and its size in MACs."""
        found: dict[str, Any] = json.loads(self._client.get_run(self.run_id).data.tags.get("paredown.able", "{}"))
        return found

    def write_capable(self, capable: Mapping[str, Any]) -> None:
        """Record the methods that each budget's study begins with."""
        self._client.set_tag(self.run_id, "paredown.able", json.dumps(capable))

    def settle_explore(self, wanted: int, *, is_new: bool) -> int:
        """Return how many candidates this search judges for each it trains: as it began, or `wanted` where it `is_new`.

        One that was begun before there was a choice trains all of them.
        """
        known: str | None = self._client.get_run(self.run_id).data.tags.get("paredown.explore")
        settled = int(known) if known else wanted if is_new else 1
        self._client.set_tag(self.run_id, "paredown.explore", str(settled))
        return settled

    def write_unreachable(self, reasons: Mapping[str, Mapping[str, str]]) -> None:
        """Record, per budget and method, why the method cannot meet it."""
        self._client.log_dict(self.run_id, dict(reasons), "beyond.json")

    def write_importance(self, importance: Mapping[str, Mapping[str, float]]) -> None:
        """Record, per budget, how much each knob decided."""
        self._client.log_dict(self.run_id, dict(importance), "importance.json")

    def add(self, **amounts: float) -> None:
        """Add to what this search has taken over all its sittings: seconds, scoring shards."""
        if self._amounts is None:
            self._amounts = dict(self._client.get_run(self.run_id).data.metrics)
        sums = {name: self._amounts.get(name, 0.0) + amount for name, amount in amounts.items()}
        self._amounts |= sums
        self._log(sums)

    def reopen(self) -> None:
        """Mark the run as running again."""
        self._client.update_run(self.run_id, status="RUNNING")
        self.enter("starting")

    def finish(self, report: Path) -> None:
        """End the run, with the report beside it."""
        self._client.log_artifact(self.run_id, str(report))
        self.enter("done")
        self._client.set_terminated(self.run_id, "FINISHED")

    def halt(self, status: Literal["KILLED", "FAILED"]) -> None:
        """End the run of a search that did not come to its end."""
        self.enter("stopped" if status == "KILLED" else "failed")
        self._client.set_terminated(self.run_id, status)

    def _log(self, figures: Mapping[str, float]) -> None:
        self._client.log_batch(self.run_id, metrics_of(figures, now_ms()))

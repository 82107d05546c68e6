"""A teacher and a trial as MLflow keeps them, by the names of metrics, params and tags; and back."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from mlflow.entities import Metric, RunData

from search.trials import Candidate, Fitted, State, Stop, Teacher, Timing, Top1
from search.units import Scale

COUNTS = ("macs", "macs_expected", "params", "size_bytes")

FIGURES = (
    *("top1_surgery", "top1_bn", "top1_validation"),
    *("macs", "macs_expected", "macs_expected_validation", "macs_worst", "params", "size_bytes"),
)
"""The metrics recorded of an outcome; some exist only for a gated model."""


def of_teacher(teacher: Teacher) -> dict[str, float]:
    """The metrics of a search's run that `teacher_of` reads."""
    values = {key: value for key, value in asdict(teacher).items() if value is not None}
    latency = values.pop("latency_ms")
    return {f"teacher/{key}": value for key, value in (values | _flat("latency_ms", latency)).items()}


def teacher_of(figures: Mapping[str, float]) -> Teacher:
    """The teacher that these metrics of a search's run are of."""
    return Teacher(
        top1_validation=figures["teacher/top1_validation"],
        top1_test=figures.get("teacher/top1_test"),
        macs=int(figures["teacher/macs"]),
        params=int(figures["teacher/params"]),
        size_bytes=int(figures["teacher/size_bytes"]),
        latency_ms=_nested("teacher/latency_ms", figures),
        top1_error=figures.get("teacher/top1_error"),
    )


def of_fitted(fitted: Fitted) -> dict[str, float]:
    """The metrics of a trial's run that are known before it is trained."""
    costs = {key: float(value) for key in COUNTS if (value := getattr(fitted.plan, key, None)) is not None}
    return costs | of_timings(fitted.timings) | {"latency_rounds": fitted.rounds}


def of_timings(timings: Mapping[str, Timing]) -> dict[str, float]:
    """The metrics of a trial's run that hold its timings by device."""
    found: dict[str, float] = {}
    for device, timing in timings.items():
        found |= _flat("latency_ms", {device: timing.latency_ms})
        found |= _flat("teacher_latency_ms", {device: timing.teacher_latency_ms})
        found |= {} if timing.noise is None else {f"noise/{device}": timing.noise}
    return found


def candidate_of(
    figures: Mapping[str, float], params: Mapping[str, str], tags: Mapping[str, str], *, run_id: str, ended: float
) -> Candidate:
    """The trial, without its plan, that these metrics, params and tags of an ended run are of.

    Args:
        ended: when the run did, in Unix seconds.
    """
    counted: dict[str, Any] = {key: int(figures[key]) for key in COUNTS if key in figures}
    is_complete, is_stopped = "top1_validation" in figures, "stopped_at" in figures
    return Candidate(
        run_id=run_id,
        trial=int(params["trial"]),
        budget=params["budget"],
        method=params["method"],
        knobs=json.loads(tags["paredown.knobs"]),
        state=cast(State, tags["paredown.state"]),
        timings=_timings(figures),
        top1=_top1(figures, tags) if is_complete else None,
        stop=Stop(int(figures["stopped_at"]), figures["top1_last"]) if is_stopped else None,
        same_as=tags.get("paredown.same_as"),
        seconds=figures.get("seconds", 0.0),
        device_s=figures.get("device_s", 0.0),
        ended=ended,
        error=tags.get("paredown.error"),
        **counted,
    )


def candidate_of_run(run_id: str, data: RunData, ended_ms: int | None) -> Candidate:
    """Return the trial that an ended run is of, without its plan."""
    ended = 0.0 if ended_ms is None else ended_ms / 1000
    return candidate_of(data.metrics, data.params, data.tags, run_id=run_id, ended=ended)


def scale_of(tags: Mapping[str, str]) -> Scale:
    """Return the scale of the metric that decides, by the tags of a search's run."""
    return Scale(**json.loads(tags.get("paredown.metric", "{}")))


def metrics_of(figures: Mapping[str, float], now: int, step: int = 0) -> list[Metric]:
    """Return figures as MLflow's metrics of the time `now`."""
    return [Metric(key, float(value), now, step) for key, value in figures.items()]


def now_ms() -> int:
    """Return Unix time as MLflow counts it, in milliseconds."""
    return int(time.time() * 1000)


def _timings(figures: Mapping[str, float]) -> dict[str, Timing]:
    """Return the timings by device that `of_fitted` wrote down."""
    teachers = _nested("teacher_latency_ms", figures)
    return {
        device: Timing(times, teachers.get(device, {}), figures.get(f"noise/{device}"))
        for device, times in _nested("latency_ms", figures).items()
    }


def _top1(figures: Mapping[str, float], tags: Mapping[str, str]) -> Top1:
    """Return what a complete trial reached."""
    surgery, bn, drop = (figures.get(f"top1_{key}") for key in ("surgery", "bn", "drop"))
    return Top1(figures["top1_validation"], surgery, bn, drop, tags.get("paredown.hits"))


def prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under dotted names.

    >>> prefixed("recovery", {"distill": 0.5})
    {'recovery.distill': 0.5}
    """
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

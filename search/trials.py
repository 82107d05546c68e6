"""One trial as data: what the teacher and a candidate cost and reach, what is proposed, and what was fitted."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:  # who only looks at a record need not wait for torch
    from methods.base import KnobValue, Plan

LATENCY = "latency_ms/"
"""The name of a device's latency among the costs starts with this; the device's own follows."""


AXES: tuple[str, ...] = ("macs", "macs_expected", "params")
"""The costs a frontier is drawn over, beside each device's latency. MACs and expected MACs are two axes: a masked
channel is not a saved one."""


State: TypeAlias = Literal["complete", "failed", "infeasible", "stopped"]


Latency: TypeAlias = Mapping[str, Mapping[str, float]]
"""Milliseconds for one batch of a device: its name to `min`, `p50` and `p95`."""


@dataclass(frozen=True)
class Teacher:
    """The network the search was given."""

    top1_validation: float
    top1_test: float | None
    macs: int
    params: int
    size_bytes: int
    latency_ms: Latency = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One evaluated candidate. What its trial did not get to measure is `None`; a complete one has every cost.

    `macs_expected` is the mean over inputs of a gated model, measured on the calibration set, and None for any other.
    `plan` is what `Plan.to_json` gave. `top1_surgery` and `top1_bn` are validation top-1 right after `apply` and after
    the batch norms saw data again; `top1_validation` is the one after recovery, by which the search decides, and
    `top1_drop` what of the teacher's it lost. A trial that was stopped early has the top-1 of its step `stopped_at` in
    `top1_last` instead.
    `latency_ms` are per device, corrected for drift: scaled by the teacher's first measured median over its median in
    this measurement, which took both in turn; `teacher_latency_ms` are the teacher's of this measurement, as they were.
    `noise` is how far the medians lay above the fastest call, as a share, where that was too far after all repeats.
    `same_as` is the run that trained this very plan with this very recipe; nothing was trained again.
    `ended` is a Unix time in seconds.

    Raises:
        ValueError: a complete candidate lacks a cost or a finite top-1.
    """

    run_id: str
    trial: int
    budget: str
    method: str
    knobs: Mapping[str, float | int | str | bool]
    state: State
    plan: Mapping[str, Any] | None = None
    macs: int | None = None
    macs_expected: int | None = None
    params: int | None = None
    size_bytes: int | None = None
    latency_ms: Latency = field(default_factory=dict)
    teacher_latency_ms: Latency = field(default_factory=dict)
    top1_surgery: float | None = None
    top1_bn: float | None = None
    top1_validation: float | None = None
    top1_drop: float | None = None
    top1_last: float | None = None
    stopped_at: int | None = None
    noise: Mapping[str, float] = field(default_factory=dict)
    same_as: str | None = None
    seconds: float = 0.0
    device_s: float = 0.0
    ended: float = 0.0
    error: str | None = None

    def __post_init__(self) -> None:
        if self.state != "complete":
            return
        for name in ("macs", "params", "size_bytes", "top1_validation"):
            value = getattr(self, name)
            if value is None or not math.isfinite(value):
                raise ValueError(
                    f"candidate {self.run_id!r} is complete, but its {name} is {value}; "
                    "a complete candidate has a finite value there: record it, or give the state 'failed'"
                )

    def fits(self, limits: Mapping[str, float]) -> bool:
        """Whether this candidate was measured to the end and meets every limit, for example `{"macs": 1_000_000}`."""
        return self.state == "complete" and all(cost_of(self, cost) <= limit for cost, limit in limits.items())

    def excess(self, limits: Mapping[str, float]) -> dict[str, float]:
        """How far each limited cost lies above its limit, as a share of it; negative where there is room.

        What is lost of top-1 counts as it is: it may be limited to nothing.
        """
        return {
            cost: cost_of(self, cost) - limit if cost == "top1_drop" else cost_of(self, cost) / limit - 1
            for cost, limit in limits.items()
        }


def cost_of(one: object, cost: str) -> float:
    """What `one`, a teacher, a candidate or an outcome, costs: an attribute, or `latency_ms/DEVICE`, the median there.

    Without gates expected MACs are its MACs. What was not measured on a device costs infinitely much there; a teacher
    has lost nothing of its own top-1.
    """
    if cost.startswith(LATENCY):
        times = getattr(one, "latency_ms", {}).get(cost.removeprefix(LATENCY))
        return math.inf if times is None else float(times["p50"])
    if cost == "top1_drop" and isinstance(one, Teacher):
        return 0.0
    found: float | None = getattr(one, cost, None)
    if found is None and cost == "macs_expected":
        return cost_of(one, "macs")
    assert found is not None
    return found


Times: TypeAlias = Mapping[str, float]
"""`min`, `p50` and `p95` in milliseconds of one call, which runs the device's batch."""


@dataclass(frozen=True)
class Timing:
    """A student's latency on a device, corrected for drift, and the teacher's beside it as it was, in milliseconds.

    `noise` is how far the medians lay above the fastest calls, as a share, where that was too far after all repeats.
    """

    latency_ms: Times
    teacher_latency_ms: Times
    noise: float | None = None


@dataclass(frozen=True)
class Fitted:
    """A plan that meets its budget's limits on costs, its student's latency by device, and the rounds that took.

    There are no rounds where latency is not limited. A device that cannot run the student is not among the timings.
    """

    plan: Plan
    timings: Mapping[str, Timing]
    rounds: int


@dataclass(frozen=True)
class Proposal:
    """What to try: a method with its knobs and recovery's, as trial `number` of `budget`."""

    budget: str
    number: int
    method: str
    knobs: Mapping[str, KnobValue]
    recovery: Mapping[str, KnobValue]

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from every other proposal of the search."""
        return self.budget, self.number

    def seed(self, base: int) -> int:
        """This trial's own seed, from the search's."""
        return trial_seed(base, self.budget, self.number)


def trial_seed(base: int, budget: str, number: int, name: str = "") -> int:
    words = [base, zlib.crc32(budget.encode()), number, *([zlib.crc32(name.encode())] if name else [])]
    return int(np.random.SeedSequence(words).generate_state(1)[0])

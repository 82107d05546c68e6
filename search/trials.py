"""One trial as data: the proposal, the fitted plan, the candidate that came of it, and the teacher beside it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from search.limits import TOP1_DROP, Costs, Limits, latency_on
from search.noise import standard_error, unpacked

if TYPE_CHECKING:  # who only looks at a record need not wait for torch
    from methods.base import KnobValue, Plan

State: TypeAlias = Literal["complete", "failed", "infeasible", "stopped"]


Latency: TypeAlias = Mapping[str, Mapping[str, float]]
"""Milliseconds for one batch of a device: its name to `min`, `p50` and `p95`."""


Times: TypeAlias = Mapping[str, float]
"""`min`, `p50` and `p95` in milliseconds of one call, which runs the device's batch."""


@dataclass(frozen=True)
class Timing:
    """A student's latency on a device, corrected for drift, and the teacher's beside it as it was, in milliseconds.

    The student's is scaled by the teacher's first measured median over its median in this measurement, which took both
    in turn. `noise` is how far the medians lay above the fastest calls, as a share, if that was too far after all
    repeats.
    """

    latency_ms: Times
    teacher_latency_ms: Times
    noise: float | None = None


@dataclass(frozen=True)
class Teacher:
    """The network the search was given; `top1_error` is the standard error of its validation top-1, if it is known."""

    top1_validation: float
    top1_test: float | None
    macs: int
    params: int
    size_bytes: int
    latency_ms: Latency = field(default_factory=dict)
    top1_error: float | None = None

    @property
    def costs(self) -> Costs:
        """All its costs; it has lost nothing of its own top-1."""
        return costs_of(self, self.latency_ms, top1_drop=0.0)


@dataclass(frozen=True)
class Top1:
    """Validation top-1 of a student: after recovery, by which the search decides, and on the way there.

    `surgery` and `bn` are top-1 right after `apply` and after `settle`. `drop` is the teacher's top-1 minus
    `validation`; searches of early versions did not record it. `hits` tells whether each validation image was
    classified right, as `search.noise` writes it; a metric of the user's own tells nothing of single images.
    """

    validation: float
    surgery: float | None = None
    bn: float | None = None
    drop: float | None = None
    hits: str | None = None

    @property
    def error(self) -> float | None:
        """The standard error of `validation`, if it is known."""
        return None if self.hits is None else standard_error(unpacked(self.hits))


@dataclass(frozen=True)
class Stop:
    """The step at which a trial was stopped early, and its validation top-1 there."""

    step: int
    top1: float


@dataclass(frozen=True)
class Candidate:
    """One evaluated candidate. A trial without a plan has no costs; one that `is_model` has them all.

    `macs_expected` is the mean over inputs of a gated model, measured on the calibration set, and None for any other.
    `plan` is what `Plan.to_json` gave. `timings` are per device. `top1` is there if the trial is a model, `stop` if it
    was stopped early. `same_as` is the run that trained this very plan with this very recipe; nothing was trained
    again. `ended` is a Unix time in seconds.

    Raises:
        ValueError: a complete candidate, or one stopped at step 0, lacks a cost or a finite top-1.
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
    timings: Mapping[str, Timing] = field(default_factory=dict)
    top1: Top1 | None = None
    stop: Stop | None = None
    same_as: str | None = None
    seconds: float = 0.0
    device_s: float = 0.0
    ended: float = 0.0
    error: str | None = None

    def __post_init__(self) -> None:
        if not self.is_model:
            return
        for name in ("macs", "params", "size_bytes", "top1_validation"):
            value = getattr(self, name)
            if value is None or not math.isfinite(value):
                raise ValueError(
                    f"candidate {self.run_id!r} is {self.state}, but its {name} is {value}; "
                    "a candidate that is a model has a finite value there: record it, or give the state 'failed'"
                )

    @property
    def is_model(self) -> bool:
        """Whether it was measured to the end of what it was given: a whole recovery, or none where it stopped at 0."""
        return self.state == "complete" or (self.stop is not None and self.stop.step == 0)

    @property
    def top1_validation(self) -> float | None:
        """Validation top-1 after recovery, if the trial is a model."""
        return None if self.top1 is None else self.top1.validation

    @property
    def top1_error(self) -> float | None:
        """The standard error of validation top-1, if it is known."""
        return None if self.top1 is None else self.top1.error

    @property
    def latency_ms(self) -> Latency:
        """The student's latency on every device it was timed on."""
        return {device: timing.latency_ms for device, timing in self.timings.items()}

    @property
    def costs(self) -> Costs:
        """All its costs that are known."""
        return costs_of(self, self.latency_ms, top1_drop=None if self.top1 is None else self.top1.drop)

    def fits(self, limits: Limits) -> bool:
        """Whether this candidate was measured to the end and meets every limit."""
        return self.is_model and limits.met_by(self.costs)


def costs_of(counted: object, latency_ms: Latency, *, top1_drop: float | None) -> Costs:
    """Return the costs by name of anything with `macs`, `params` and maybe `macs_expected` and `size_bytes`.

    Without gates expected MACs are the MACs. A cost that is None is left out.
    """
    known = {cost: getattr(counted, cost, None) for cost in ("macs", "macs_expected", "params", "size_bytes")}
    if known["macs_expected"] is None:
        known["macs_expected"] = known["macs"]
    known |= {latency_on(device): times["p50"] for device, times in latency_ms.items()}
    return {cost: value for cost, value in (known | {TOP1_DROP: top1_drop}).items() if value is not None}


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
    """A method with its knobs and recovery's, to be tried as trial `number` of `budget`."""

    budget: str
    number: int
    method: str
    knobs: Mapping[str, KnobValue]
    recovery: Mapping[str, KnobValue]

    @property
    def key(self) -> tuple[str, int]:
        """The pair that tells it from every other proposal of the search."""
        return self.budget, self.number

    def seed(self, base: int) -> int:
        """This trial's own seed, from the search's."""
        return trial_seed(base, self.budget, self.number)


def trial_seed(base: int, budget: str, number: int, name: str = "") -> int:
    words = [base, zlib.crc32(budget.encode()), number, *([zlib.crc32(name.encode())] if name else [])]
    return int(np.random.SeedSequence(words).generate_state(1)[0])

"""The end of the story in plain data: what a search found, which candidates nothing beats, and who wins each budget.

Only arithmetic: the tracker builds a `SearchResult`, and the command line, the HTTP app and the report read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Literal, Protocol, TypeAlias

AXES: tuple[str, ...] = ("macs", "macs_expected", "params")
"""The costs a frontier is drawn over. MACs and expected MACs are two axes: a masked channel is not a saved one."""

State: TypeAlias = Literal["complete", "failed", "infeasible", "stopped"]

Latency: TypeAlias = Mapping[str, Mapping[str, float]]
"""Milliseconds for one input: device name to `min`, `p50` and `p95`."""


@dataclass(frozen=True)
class Teacher:
    """The network the search was given."""

    top1_validation: float
    top1_test: float | None
    macs: int
    params: int
    size_bytes: int


@dataclass(frozen=True)
class Candidate:
    """One evaluated candidate. What its trial did not get to measure is `None`; a complete one has every cost.

    `macs_expected` is the mean over inputs of a gated model, measured on the calibration set, and None for any other.
    `plan` is what `Plan.to_json` gave. `top1_surgery` and `top1_bn` are validation top-1 right after `apply` and after
    the batch norms saw data again; `top1_validation` is the one after recovery, by which the search decides.
    `teacher_latency_ms` is the teacher's, measured in turn with this candidate on the same machine.

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
    seconds: float = 0.0
    device_s: float = 0.0
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

    def fits(self, limits: Mapping[str, int]) -> bool:
        """Whether this candidate was measured to the end and meets every limit, for example `{"macs": 1_000_000}`."""
        return self.state == "complete" and all(cost_of(self, cost) <= limit for cost, limit in limits.items())

    def excess(self, limits: Mapping[str, int]) -> dict[str, float]:
        """How far each limited cost lies above its limit, as a share of it; negative where there is room."""
        return {cost: cost_of(self, cost) / limit - 1 for cost, limit in limits.items()}


@dataclass(frozen=True)
class BudgetResult:
    """One budget's limits in absolute units, and the candidate that won it (None: nothing fits).

    `model_uri` is what `mlflow.pytorch.load_model` takes, `models:/NAME@ALIAS`; it, `alias` and `top1_test` exist only
    where a winner is registered.
    """

    name: str
    limits: Mapping[str, int]
    winner: Candidate | None = None
    model_uri: str | None = None
    alias: str | None = None
    top1_test: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The contract's `{name, limits, winner}`."""
        found = None if self.winner is None else self._winner_json(self.winner)
        return {"name": self.name, "limits": dict(self.limits), "winner": found}

    def _winner_json(self, winner: Candidate) -> dict[str, Any]:
        return {
            **_pick(winner, "run_id"),
            **_pick(self, "model_uri", "alias"),
            **_pick(winner, "method", "top1_validation"),
            **_pick(self, "top1_test"),
            **_pick(winner, "macs", "macs_expected", "params", "size_bytes"),
            "latency_ms": {device: dict(times) for device, times in winner.latency_ms.items()},
        }


@dataclass(frozen=True)
class Cost:
    """What the search cost: wall seconds, seconds of all trials summed over devices, trials run and stopped early."""

    wall_s: float
    device_s: float
    trials: int
    stopped: int


@dataclass(frozen=True)
class SearchResult:
    """A finished search. `started` is an ISO 8601 time, `spec` the text of the file that asked for it."""

    name: str
    teacher: Teacher
    budgets: Sequence[BudgetResult]
    candidates: Sequence[Candidate]
    cost: Cost
    started: str
    spec: str

    @property
    def axes(self) -> tuple[str, ...]:
        """The costs that matter here: expected MACs are one where a model is gated or a budget limits them."""
        is_gated = any(candidate.macs_expected is not None for candidate in self.candidates)
        is_asked = any("macs_expected" in budget.limits for budget in self.budgets)
        return AXES if is_gated or is_asked else tuple(axis for axis in AXES if axis != "macs_expected")

    def complete(self) -> list[Candidate]:
        """The candidates that were measured to the end."""
        return [candidate for candidate in self.candidates if candidate.state == "complete"]

    def to_json(self) -> dict[str, Any]:
        """What `paredown frontier --json` prints; other programs read it, so the keys are fixed."""
        return {
            "name": self.name,
            "teacher": asdict(self.teacher),
            "budgets": [budget.to_json() for budget in self.budgets],
            "frontier": {axis: frontier(self.teacher, self.candidates, axis) for axis in self.axes},
            "cost": asdict(self.cost),
        }


def frontier(teacher: Teacher, candidates: Sequence[Candidate], axis: str) -> list[dict[str, Any]]:
    """The non-dominated points over `axis`, one of `AXES`, cheapest first, as JSON-ready values.

    The teacher competes too, with `run_id` and `budget` None and method "teacher"; it is gone where a student is both
    cheaper and no worse.
    """
    complete = [candidate for candidate in candidates if candidate.state == "complete"]
    costs = [cost_of(one, axis) for one in (teacher, *complete)]
    points = [{"run_id": None, "method": "teacher", "budget": None, "macs_expected": None} | asdict(teacher)]
    points += [vars(candidate) for candidate in complete]
    kept = non_dominated([(cost, point["top1_validation"]) for cost, point in zip(costs, points, strict=True)])
    keys = ("run_id", "method", "budget", "top1_validation", "macs", "macs_expected", "params", "size_bytes")
    return [{key: points[index][key] for key in keys} | {axis: costs[index]} for index in kept]


def cost_of(one: object, axis: str) -> int:
    """What `one`, a teacher, a candidate or an outcome, costs on an axis: without gates expected MACs are its MACs."""
    found: int | None = getattr(one, axis, None)
    if found is None and axis == "macs_expected":
        return cost_of(one, "macs")
    assert found is not None
    return found


def winner(candidates: Sequence[Candidate], limits: Mapping[str, int]) -> Candidate | None:
    """The best validation top-1 among all complete candidates that meet every limit, whatever budget they were for.

    Ties go to fewer MACs, then fewer params, then the earlier trial, then the smaller run id.
    """

    def rank(candidate: Candidate) -> tuple[Any, ...]:
        assert candidate.top1_validation is not None
        return (
            -candidate.top1_validation,
            candidate.macs,
            candidate.params,
            candidate.trial,
            candidate.run_id,
        )

    return min((candidate for candidate in candidates if candidate.fits(limits)), key=rank, default=None)


class Costed(Protocol):
    """Anything measured to the end: a complete `Candidate`, a `Teacher`, an outcome of the pipeline."""

    @property
    def top1_validation(self) -> float | None: ...


def beats(one: Costed, other: Costed) -> bool:
    """Whether `other` can neither win any budget nor stand on any frontier while `one` is there.

    So `one` costs no more on every axis and is no worse, and is strictly better in top-1 or strictly cheaper on every
    axis: with less, `other` would tie on one axis and could stay there.
    """
    assert one.top1_validation is not None
    assert other.top1_validation is not None
    ahead = [cost_of(other, axis) - cost_of(one, axis) for axis in AXES]
    if min(ahead) < 0 or one.top1_validation < other.top1_validation:
        return False
    return one.top1_validation > other.top1_validation or min(ahead) > 0


def non_dominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the `(cost, top1)` points that no other dominates, cheapest first.

    A point dominates another if it costs no more, is no worse, and one of the two strictly. Of exact duplicates the
    first stays.

    >>> non_dominated([(9.0, 0.9), (5.0, 0.8), (6.0, 0.7), (5.0, 0.8)])
    [1, 0]
    """
    kept: list[int] = []
    best = -math.inf
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1], index)):
        if points[index][1] > best:
            kept.append(index)
            best = points[index][1]
    return kept


def hypervolume(points: Sequence[tuple[float, float]], *, reference_cost: float) -> float:
    """The share of the box (top-1 0 to 1, cost 0 to `reference_cost`) that `(cost, top1)` points dominate.

    `reference_cost` is the teacher's. Summed in rational numbers and rounded once, so it does not depend on the order
    of the points and never shrinks when one is added. What lies outside the box is clipped to it.

    >>> hypervolume([(25.0, 0.5), (50.0, 1.0)], reference_cost=100.0)
    0.625

    Raises:
        ValueError: `reference_cost` is not positive.
    """
    if not reference_cost > 0:
        raise ValueError(f"reference_cost is {reference_cost}; expected a positive cost: pass the teacher's")
    volume, reached = Fraction(0), Fraction(0)
    for index in non_dominated(points):
        cost, top1 = points[index]
        width = 1 - min(max(Fraction(cost) / Fraction(reference_cost), Fraction(0)), Fraction(1))
        top = min(max(Fraction(top1), Fraction(0)), Fraction(1))
        volume += width * (top - reached) if top > reached else 0
        reached = max(reached, top)
    return float(volume)


def _pick(source: object, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}

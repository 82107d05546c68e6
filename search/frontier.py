"""The end of the story in plain data: what a search found, which candidates nothing beats, and who wins each budget.

Only arithmetic: the tracker builds a `SearchResult`, and the command line, the HTTP app and the report read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from search.trials import AXES, LATENCY, Candidate, Latency, Teacher, cost_of


@dataclass(frozen=True)
class BudgetResult:
    """One budget's limits in absolute units by cost (see `cost_of`), and the candidate that won (None: nothing fits).

    `model_uri` is what `mlflow.pytorch.load_model` takes, `models:/NAME@ALIAS`; it and `top1_test` exist only where a
    winner is registered. Where a better model of another search holds the alias, it is None and the URI names the
    version.
    """

    name: str
    limits: Mapping[str, float]
    winner: Candidate | None = None
    model_uri: str | None = None
    alias: str | None = None
    top1_test: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The contract's `{name, limits, winner}`; a limit on latency is `latency_ms: {device: ms}`, as in a winner."""
        found = None if self.winner is None else self._winner_json(self.winner)
        limits: dict[str, Any] = {cost: limit for cost, limit in self.limits.items() if not cost.startswith(LATENCY)}
        latency = {cost.removeprefix(LATENCY): limit for cost, limit in self.limits.items() if cost not in limits}
        return {"name": self.name, "limits": limits | ({"latency_ms": latency} if latency else {}), "winner": found}

    def _winner_json(self, winner: Candidate) -> dict[str, Any]:
        return {
            **_pick(winner, "run_id"),
            **_pick(self, "model_uri", "alias"),
            **_pick(winner, "method", "top1_validation"),
            **_pick(self, "top1_test"),
            **_pick(winner, "macs", "macs_expected", "params", "size_bytes"),
            "latency_ms": _plain(winner.latency_ms),
        }


@dataclass(frozen=True)
class Cost:
    """What the search cost: wall seconds, seconds summed over devices, trials run and stopped early.

    `device_s` are those of trials, of scoring and of measuring; the last two are given beside it.
    """

    wall_s: float
    device_s: float
    trials: int
    stopped: int
    scoring_s: float = 0.0
    measuring_s: float = 0.0


@dataclass(frozen=True)
class SearchResult:
    """A finished search. `started` is an ISO 8601 time, `spec` the text of the file that asked for it.

    `devices` say for each device its `runtime`, `threads`, `batch`, `host` and whether its latency `is_predicted`;
    `importance` is per budget how much each knob decided of top-1, as shares; `beyond` is per budget why methods were
    known to be unable to meet it before any training.
    """

    name: str
    teacher: Teacher
    budgets: Sequence[BudgetResult]
    candidates: Sequence[Candidate]
    cost: Cost
    started: str
    spec: str
    devices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    beyond: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """The costs a frontier is drawn over here: counted ones, and the latency on each device the teacher ran on.

        Expected MACs are one where a model is gated or a budget limits them.
        """
        is_gated = any(candidate.macs_expected is not None for candidate in self.candidates)
        is_asked = any("macs_expected" in budget.limits for budget in self.budgets)
        counted = AXES if is_gated or is_asked else tuple(axis for axis in AXES if axis != "macs_expected")
        return counted + tuple(f"{LATENCY}{device}" for device in self.teacher.latency_ms)

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
            "hypervolume": {axis: volume(self.teacher, self.candidates, axis) for axis in self.axes},
            "cost": _pick(self.cost, "wall_s", "device_s", "trials", "stopped"),
        }


@dataclass(frozen=True)
class Moment:
    """How far a search had come when one more trial ended, after `device_s` seconds of devices, scoring included.

    `hypervolume` is over MACs; `best` holds the best validation top-1 within each budget's limits, once there is one.
    """

    device_s: float
    hypervolume: float
    best: Mapping[str, float]


def history(result: SearchResult) -> list[Moment]:
    """How a search went: one moment per trial, in the order they ended."""
    moments: list[Moment] = []
    device_s = result.cost.scoring_s + result.cost.measuring_s
    points, best = list[tuple[float, float]](), dict[str, float]()
    for found in sorted(result.candidates, key=lambda one: (one.ended, one.trial)):
        device_s += found.device_s
        if found.state == "complete":
            point = _point(found, "macs")
            top1 = point[1]
            points = [*points, point]
            points = [points[index] for index in non_dominated(points)]  # the others add nothing, now or later
            met = [budget.name for budget in result.budgets if found.fits(budget.limits)]
            best = best | {name: max(top1, best.get(name, top1)) for name in met}
        moments.append(Moment(device_s, hypervolume(points, reference_cost=result.teacher.macs), best))
    return moments


def frontier(teacher: Teacher, candidates: Sequence[Candidate], axis: str) -> list[dict[str, Any]]:
    """The non-dominated points over `axis`, one of a result's `axes`, cheapest first, as JSON-ready values.

    The teacher competes too, with `run_id` and `budget` None and method "teacher"; it is gone where a student is both
    cheaper and no worse. What was not measured on a device stands nowhere on its axis.
    """
    standing = _measured([teacher, *candidates], axis)
    kept = [standing[index] for index in non_dominated([_point(one, axis) for one in standing])]
    return [_point_json(one) | {axis: cost_of(one, axis)} for one in kept]


def volume(teacher: Teacher, candidates: Sequence[Candidate], axis: str) -> float:
    """The hypervolume over `axis` of the candidates measured to the end; the teacher bounds it and adds nothing."""
    points = [_point(one, axis) for one in _measured(candidates, axis)]
    return hypervolume(points, reference_cost=cost_of(teacher, axis))


def _measured(found: Sequence[Teacher | Candidate], axis: str) -> list[Teacher | Candidate]:
    """Those with a place on `axis`: measured to the end, and on the axis's device where it is one of latency."""
    complete = [one for one in found if isinstance(one, Teacher) or one.state == "complete"]
    return [one for one in complete if math.isfinite(cost_of(one, axis))]


def _point(one: Teacher | Candidate, axis: str) -> tuple[float, float]:
    assert one.top1_validation is not None
    return cost_of(one, axis), one.top1_validation


def _point_json(one: Teacher | Candidate) -> dict[str, Any]:
    known = {"run_id": None, "method": "teacher", "budget": None, "macs_expected": None} | vars(one)
    keys = ("run_id", "method", "budget", "top1_validation", "macs", "macs_expected", "params", "size_bytes")
    return {key: known[key] for key in keys} | {"latency_ms": _plain(one.latency_ms)}


def winner(candidates: Sequence[Candidate], limits: Mapping[str, float]) -> Candidate | None:
    """The best validation top-1 among all complete candidates that meet every limit, whatever budget they were for.

    Ties go to fewer MACs, then fewer params, then the earlier trial, then the budget's name.
    """

    def rank(candidate: Candidate) -> tuple[Any, ...]:
        assert candidate.top1_validation is not None
        return (
            -candidate.top1_validation,
            candidate.macs,
            candidate.params,
            candidate.trial,
            candidate.budget,
            candidate.run_id,
        )

    return min((candidate for candidate in candidates if candidate.fits(limits)), key=rank, default=None)


class Costed(Protocol):
    """Anything measured to the end: a complete `Candidate`, or a `Teacher`."""

    @property
    def top1_validation(self) -> float | None: ...

    @property
    def latency_ms(self) -> Latency: ...


def beats(one: Costed, other: Costed) -> bool:
    """Whether `other` can neither win any budget nor stand on any frontier while `one` is there.

    So `one` is no worse and costs no more in anything a budget may limit, and it is strictly better in top-1 or
    strictly cheaper on every axis: with less, `other` would tie on one axis and could stay there. Size is limited but
    no axis. What is lost of top-1 needs no look of its own: who is no worse has lost no more.
    """
    assert one.top1_validation is not None
    assert other.top1_validation is not None
    axes = (*AXES, *(f"{LATENCY}{device}" for device in {**one.latency_ms, **other.latency_ms}))
    costs = [(cost_of(one, cost), cost_of(other, cost)) for cost in (*axes, "size_bytes")]
    if one.top1_validation < other.top1_validation or any(ours > theirs for ours, theirs in costs):
        return False
    return one.top1_validation > other.top1_validation or all(ours < theirs for ours, theirs in costs[:-1])


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


def _plain(latency_ms: Latency) -> dict[str, dict[str, float]]:
    return {device: dict(times) for device, times in latency_ms.items()}

"""The arithmetic of frontiers: which candidates nothing beats, how much they dominate, and which one wins a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, Protocol, TypeAlias

from search.limits import AXES, Costs, Limits, latencies_in
from search.noise import is_noise
from search.trials import Candidate, Latency, Teacher


def frontier(teacher: Teacher, candidates: Sequence[Candidate], axis: str) -> list[dict[str, Any]]:
    """The non-dominated points over `axis`, one of a result's `axes`, cheapest first, as JSON-ready values.

    The teacher competes too, with `run_id` and `budget` None and method "teacher"; it is gone where a student is both
    cheaper and no worse. What was not measured on a device stands nowhere on its axis.
    """
    standing = _measured([teacher, *candidates], axis)
    kept = [standing[index] for index in non_dominated([point_of(one, axis) for one in standing])]
    return [_point_json(one) | {axis: one.costs[axis]} for one in kept]


def volume(teacher: Teacher, candidates: Sequence[Candidate], axis: str) -> float:
    """The hypervolume over `axis` of the candidates measured to the end; the teacher bounds it and adds nothing."""
    points = [point_of(one, axis) for one in _measured(candidates, axis)]
    return hypervolume(points, reference_cost=teacher.costs[axis])


def _measured(found: Sequence[Teacher | Candidate], axis: str) -> list[Teacher | Candidate]:
    """Those with a place on `axis`: measured to the end, and on the axis's device where it is one of latency."""
    models = [one for one in found if isinstance(one, Teacher) or one.is_model]
    return [one for one in models if axis in one.costs]


def point_of(one: Teacher | Candidate, axis: str) -> tuple[float, float]:
    """Return the cost on `axis` and the validation top-1 of the teacher or a complete candidate."""
    assert one.top1_validation is not None
    return one.costs[axis], one.top1_validation


def _point_json(one: Teacher | Candidate) -> dict[str, Any]:
    known = {"run_id": None, "method": "teacher", "budget": None, "macs_expected": None} | vars(one)
    known["top1_validation"] = one.top1_validation
    known["top1_error"] = one.top1_error
    names = ("run_id", "method", "budget", "top1_validation", "top1_error")
    counted = ("macs", "macs_expected", "params", "size_bytes")
    return {key: known[key] for key in (*names, *counted)} | {"latency_ms": plain_latency(one.latency_ms)}


Rule: TypeAlias = Literal["simplest", "best"]
"""What wins a budget: of all candidates whose top-1 is the best but for noise the cheapest, or the best as it is."""


def winner(candidates: Sequence[Candidate], limits: Limits, rule: Rule = "simplest") -> Candidate | None:
    """The best validation top-1 among all complete candidates that meet every limit, whatever budget they were for.

    By the rule `simplest`, candidates count as equal if the best lies above them by no more than one standard error of
    the difference, and the one that leaves most room in its limits wins. Ties go to fewer MACs, then fewer params, then
    the earlier trial, then the budget's name. No winner is dominated: who costs no more and is no worse would win.
    """

    fitting = [candidate for candidate in candidates if candidate.fits(limits)]
    best = min(fitting, key=_rank, default=None)
    if best is None or rule == "best":
        return best
    least = min(limits.fill(one.costs) for one in _equals(best, fitting))
    return min((one for one in fitting if limits.fill(one.costs) <= least), key=_rank)


def standing(candidates: Sequence[Candidate], limits: Limits) -> tuple[int, int]:
    """Count the candidates that meet `limits`, and those among them that are the best but for noise.

    The latter are none where the noise is not known.
    """
    fitting = [candidate for candidate in candidates if candidate.fits(limits)]
    best = min(fitting, key=_rank, default=None)
    if best is None or best.top1_error is None:
        return len(fitting), 0
    return len(fitting), len(_equals(best, fitting))


def _rank(candidate: Candidate) -> tuple[Any, ...]:
    """Return the order of complete candidates, the best first."""
    assert candidate.top1_validation is not None
    costs = candidate.macs, candidate.params
    return -candidate.top1_validation, *costs, candidate.trial, candidate.budget, candidate.run_id


def _equals(best: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return `best` and the complete candidates whose top-1 is no worse, or worse by no more than noise."""
    return [one for one in candidates if one is best or _is_equal(best, one)]


def _is_equal(best: Candidate, other: Candidate) -> bool:
    if best.top1 is None or other.top1 is None or best.top1.hits is None or other.top1.hits is None:
        return best.top1_validation == other.top1_validation
    return is_noise(best.top1.hits, other.top1.hits)


class Costed(Protocol):
    """Anything measured to the end: a complete `Candidate`, or a `Teacher`."""

    @property
    def top1_validation(self) -> float | None: ...

    @property
    def costs(self) -> Costs: ...


def beats(one: Costed, other: Costed) -> bool:
    """Whether `other` can neither win any budget nor stand on any frontier while `one` is there.

    So `one` is no worse and costs no more in anything a budget may limit, and it is strictly better in top-1 or
    strictly cheaper on every axis: with less, `other` would tie on one axis and could stay there. Size is limited but
    no axis. What is lost of top-1 needs no look of its own: who is no worse has lost no more.
    """
    assert one.top1_validation is not None
    assert other.top1_validation is not None
    axes = (*AXES, *latencies_in((*one.costs, *other.costs)))
    costs = [(one.costs.get(cost, math.inf), other.costs.get(cost, math.inf)) for cost in (*axes, "size_bytes")]
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


def plain_latency(latency_ms: Latency) -> dict[str, dict[str, float]]:
    """Return latencies as JSON-ready values."""
    return {device: dict(times) for device, times in latency_ms.items()}

"""Plans that meet every limit that can be known before training: latency on a device too, which no allocator knows.

Latency is predicted, measured and corrected: MACs are found whose plan is predicted to meet the limit, its student is
built and measured, and the prediction's limit is moved by as much as it was wrong, before any of it is trained.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

from torch import nn

from methods import named
from methods.base import Budget, Infeasible, MethodError, Plan
from methods.chain import AUTO, Chain, share_knob
from methods.protocol import defaults
from search.devices.programs import Student
from search.devices.stopwatch import Stopwatch
from search.driver.planning.bracket import Bracket, Point
from search.driver.planning.planner import Planner
from search.driver.planning.sizing import Request, SizedPlans, built, untried
from search.limits import latency_on
from search.spec.targets import Target
from search.trials import Fitted, Timing
from search.units import milliseconds

ROUNDS = 4
"""Measurements of a student before the best plan so far is taken."""

PLANS, CHAIN_PLANS = 10, 5
"""The most plans between two measurements; a chain's may each cost a pass of scoring."""

ROOM = 0.9
"""A student that takes less than this share of its limit is worth another round."""

MOST = 0.9
"""The share of the cut that a chain's first link takes where half is too slow."""

DOUBT = 0.25
"""The share by which predictions for a device that is there may be too high. On a ResNet-14 it was up to 16 %."""


Pursuit: TypeAlias = Generator[Point, Timing | str, tuple[Plan, int]]
"""Yields points whose students are to be measured, takes the timing of each or why it has none, and returns a plan and
the rounds it took."""


@dataclass(frozen=True)
class Fitter:
    """Finds plans that meet every limit of their budget that can be known before training.

    Unless it `times_all`, only students whose budget limits latency are timed.
    """

    planner: Planner
    stopwatch: Stopwatch
    teacher: nn.Module
    times_all: bool = True
    _first_shares: dict[tuple[str, str], float] = field(default_factory=dict)

    def fit(self, requests: Sequence[Request]) -> list[Fitted | MethodError]:
        """Return a plan for each request, or why there is none.

        Students whose budget limits latency are timed on all devices, those of a round together; the others are not. A
        request that limits neither latency nor size gets the method's own plan for its budget. All other limits hold
        for every plan that is tried.
        """
        pursuits = [self._pursue(request) for request in requests]
        found = [_advance(pursuit, None) for pursuit in pursuits]
        while waiting := {place: point for place, point in enumerate(found) if isinstance(point, Point)}:
            timed = self._measure([(requests[place].target.device, point.plan) for place, point in waiting.items()])
            for place, timing in zip(waiting, timed, strict=True):
                found[place] = _advance(pursuits[place], timing)
        ended = [_fitted(one) for one in found if not isinstance(one, Point)]
        in_need = [one for one in ended if isinstance(one, Fitted) and one.rounds]
        known = dict(zip(map(id, in_need), self.timed(in_need), strict=True))
        return [known.get(id(one), one) for one in ended]

    def timed(self, found: Sequence[Fitted]) -> list[Fitted]:
        """Return these plans with their students' timings on all devices, if every student is to be timed."""
        if not self.times_all:
            return list(found)
        untimed = [one for one in found if not one.timings]
        rows = iter(self.stopwatch.time([_student(one.plan) for one in untimed], self.stopwatch.devices))
        return [one if one.timings else replace(one, timings=next(rows)) for one in found]

    def reachable(self, method: str, target: Target) -> Plan | str:
        """Return a plan of a method with default knobs that is predicted to meet a budget, or why there is none.

        No student is measured. As predictions err, a plan that is a little over a limit on latency is given too.
        """
        return self._predicted(self._without_tries(Request(method, target, defaults(named(method)))))

    def _without_tries(self, request: Request) -> Request:
        """Return the request with the shares set that were to be tried: half of the cut for each link of a chain.

        Where that is not predicted to meet the limits and most of it for the first link is, it is the latter. That is
        found once per chain and budget, with default knobs.
        """
        chain, knobs = named(request.method), untried(request.knobs)
        if not isinstance(chain, Chain) or request.knobs[share_knob(chain.links[0])] != AUTO:
            return replace(request, knobs=knobs)
        place = request.method, request.target.name
        if place not in self._first_shares:
            usual = replace(request, knobs=untried(defaults(chain)))
            most = replace(usual, knobs={**usual.knobs, share_knob(chain.links[0]): MOST})
            is_slow = isinstance(self._predicted(usual), str) and isinstance(self._predicted(most), Plan)
            self._first_shares[place] = MOST if is_slow else 0.5
        return replace(request, knobs={**knobs, share_knob(chain.links[0]): self._first_shares[place]})

    def least_latency(self, method: str, budget: Budget, devices: Sequence[str]) -> dict[str, float]:
        """Return the predicted milliseconds, by device, of the plan of a method for `budget` with default knobs.

        Raises:
            MethodError: it has no plan for it.
        """
        student = built(self.planner.plan(method, budget, untried(defaults(named(method)))), self.teacher)
        return {device: self.stopwatch.predict(student, device) for device in devices}

    def _pursue(self, request: Request) -> Pursuit:
        """Close in on the plan of most MACs that meets every limit.

        Where latency is limited no share is tried: each would take a pursuit of its own.

        Raises:
            MethodError: there is none.
        """
        if request.target.latency_ms is None:
            return SizedPlans(request, self.planner, self.teacher).largest(), 0
        sized = SizedPlans(self._without_tries(request), self.planner, self.teacher)
        bracket = Bracket.below(sized.most_macs, self.planner.macs, request.target.latency_ms)
        error, rounds, is_exhausted = None, 0, False
        try:
            while rounds < ROUNDS:
                self._close_in(bracket, sized)
                point = bracket.best() or bracket.fastest()
                if point.measured is not None:
                    is_exhausted = True
                    break
                timing = yield point
                if isinstance(timing, str):
                    raise _untimed(request, timing)
                rounds += 1
                bracket.measure(point, timing.latency_ms["p50"])
                if ROOM * bracket.limit <= timing.latency_ms["p50"] <= bracket.limit:
                    break
        except MethodError as raised:
            error = raised
        if (met := bracket.met()) is not None:
            return met.plan, rounds
        raise error or self._too_slow(request, bracket, None if is_exhausted else rounds)

    def _close_in(self, bracket: Bracket, sized: SizedPlans) -> None:
        """Add plans to the bracket until the best ask is known, or it is not worth another one."""
        request = sized.request
        for _ in range(CHAIN_PLANS if isinstance(named(request.method), Chain) else PLANS):
            macs = bracket.next()
            if macs is None or self._is_hopeless(bracket):
                return
            try:
                plan, student = sized.plan(macs, is_first=not bracket.points)
            except Infeasible as error:
                if not bracket.points:
                    raise
                bracket.refuse(macs, int(error.least.get("macs", 0)))
            else:
                predicted = self.stopwatch.predict(student, request.target.device)
                bracket.points.append(Point(macs, plan, predicted))

    def _predicted(self, request: Request) -> Plan | str:
        """Return the plan that is predicted to meet a request, or why there is none.

        A prediction over the limit rules a plan out only if it is over it beyond doubt.
        """
        sized, limit = SizedPlans(request, self.planner, self.teacher), request.target.latency_ms
        try:
            if limit is None:
                return sized.largest()
            bracket = Bracket.below(sized.most_macs, self.planner.macs, limit)
            self._close_in(bracket, sized)
        except MethodError as error:
            return str(error)
        point = bracket.best() or bracket.fastest()
        doubt = 0.0 if self.stopwatch.is_predicted(request.target.device) else DOUBT
        is_open = not self._is_hopeless(bracket) and bracket.next() is not None
        if is_open or point.predicted <= limit * (1 + doubt):
            return point.plan
        return str(self._too_slow(request, bracket, None))

    def _is_hopeless(self, bracket: Bracket) -> bool:
        """Whether fewer MACs cannot make a student faster: no runtime here saves what a gate saves."""
        return any(point.plan.macs > self.planner.macs for point in bracket.points)

    def _measure(self, wanted: Sequence[tuple[str, Plan]]) -> list[Timing | str]:
        """Return the timing of each student on its device, or why it has none; each device is asked once."""
        found: dict[int, Timing | str] = {}
        for device in dict.fromkeys(device for device, _ in wanted):
            places = [place for place, (name, _) in enumerate(wanted) if name == device]
            students = [_student(wanted[place][1]) for place in places]
            for place, student, row in zip(places, students, self.stopwatch.time(students, [device]), strict=True):
                found[place] = row.get(device) or str(self.stopwatch.refusal(student, device))
        return [found[place] for place in range(len(wanted))]

    def _too_slow(self, request: Request, bracket: Bracket, rounds: int | None) -> Infeasible:
        """Build the error that no plan is fast enough, with what the fastest takes: measured, if any was.

        `rounds` is None if no other plan was left to try.
        """
        target, limit = request.target, bracket.limit
        measured = [point for point in bracket.points if point.measured]
        best = min(measured or bracket.points, key=lambda point: point.measured or point.predicted)
        took = best.measured or best.predicted
        if best.measured is None or self.stopwatch.is_predicted(target.device):
            takes = "is predicted to take, with these knobs, at least"
        else:
            takes = "takes at least" if rounds is None else f"takes, in the best of {rounds} rounds,"
        return Infeasible(
            f"budget {target.name!r} allows {milliseconds(limit)} on {target.device}, but {request.method} "
            f"{takes} {milliseconds(took)} there ({took / limit - 1:.0%} more), with {best.plan.macs:,} MACs; "
            "raise it or try another method",
            {latency_on(target.device): took},
        )


def _fitted(ended: tuple[Plan, int] | MethodError) -> Fitted | MethodError:
    return ended if isinstance(ended, MethodError) else Fitted(ended[0], {}, ended[1])


def _advance(pursuit: Pursuit, timing: Timing | str | None) -> Point | tuple[Plan, int] | MethodError:
    """Run a pursuit up to its next point, or to its end."""
    try:
        return next(pursuit) if timing is None else pursuit.send(timing)
    except StopIteration as end:
        return cast(tuple[Plan, int], end.value)
    except MethodError as error:
        return error


def _untimed(request: Request, refusal: str) -> MethodError:
    return MethodError(
        f"a student of {request.method} cannot be timed on {request.target.device}: {refusal}; expected one that the "
        "device runs; try another runtime or method"
    )


def _student(plan: Plan) -> Student:
    return named(plan.method), plan

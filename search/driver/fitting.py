"""Plans that meet limits no allocator knows: the size of the stored weights, and latency on a device.

Latency is predicted, measured and corrected: MACs are found whose plan is predicted to meet the limit, its student is
built and measured, and the prediction's limit is moved by as much as it was wrong, before any of it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from methods import named
from methods.base import Budget, Infeasible, KnobValue, MethodError, Plan, ScoreError
from methods.chain import SHARE, Chain
from methods.pipeline import size_bytes
from methods.protocol import defaults
from search.devices.stopwatch import Stopwatch
from search.driver.bracket import Bracket, Point
from search.driver.planner import Planner
from search.spec.targets import Target
from search.trials import LATENCY, Fitted, Timing
from search.units import milliseconds, size
from search.workload import Workload

ROUNDS = 4
"""How often a student is measured, or a limit on size corrected, before the best plan so far is taken."""

PLANS, CHAIN_PLANS = 10, 5
"""The most plans between two measurements; a chain's may each cost a pass of scoring."""

ROOM = 0.9
"""A student that takes less than this share of its limit is worth another round."""

MARGIN = 0.02
"""Taken off the limit each time that a student was over it: readings differ by as much."""

DOUBT = 0.25
"""The share by which predictions for a device that is there may be too high. On a ResNet-14 it was up to 16 %."""


@dataclass(frozen=True)
class Wish:
    """A method, by name, that is to meet a budget with these knobs."""

    method: str
    target: Target
    knobs: Mapping[str, KnobValue]


def fit(
    wishes: Sequence[Wish], planner: Planner, stopwatch: Stopwatch, workload: Workload
) -> list[Fitted | MethodError]:
    """A plan for each wish, or why there is none; students are timed on all devices, those of a round together.

    A plan of a wish that limits neither latency nor size is the method's own for the budget. What else is limited holds
    for every plan that is tried.
    """
    pursuits = [_Pursuit(wish, planner, stopwatch, workload) for wish in wishes]
    for _ in range(ROUNDS):
        for one in pursuits:
            one.advance()
        _measure([one for one in pursuits if one.candidate is not None], stopwatch)
    found = [one.outcome() for one in pursuits]
    plans = [plan for plan in found if isinstance(plan, Plan)]
    rows = iter(stopwatch.time([(named(plan.method), plan) for plan in plans], stopwatch.devices))
    return [
        Fitted(plan, next(rows), one.rounds) if isinstance(plan, Plan) else plan
        for plan, one in zip(found, pursuits, strict=True)
    ]


def reachable(name: str, target: Target, planner: Planner, stopwatch: Stopwatch, workload: Workload) -> Plan | str:
    """A plan of a method with its knobs at their defaults that is predicted to meet a budget, or why there is none.

    No student is measured. As predictions err, a plan that is a little over a limit on latency is given too. A chain
    whose links differ in speed is also asked with its first link taking the most of the cut.
    """
    method = named(name)
    usual = defaults(method)
    found = _predicted(Wish(name, target, usual), planner, stopwatch, workload)
    if isinstance(method, Chain) and target.latency_ms is not None and not isinstance(found, Plan):
        first = f"share.{method.links[0].name}"
        most = _predicted(Wish(name, target, usual | {first: SHARE.high}), planner, stopwatch, workload)
        found = most if isinstance(most, Plan) else found
    return found


def _predicted(wish: Wish, planner: Planner, stopwatch: Stopwatch, workload: Workload) -> Plan | str:
    """The plan of a wish that is predicted to meet it, or why there is none."""
    pursuit = _Pursuit(wish, planner, stopwatch, workload)
    pursuit.advance()
    if pursuit.candidate is None:
        plan = pursuit.outcome()
        return plan if isinstance(plan, Plan) else str(plan)
    return pursuit.predicted()


def least_latency(
    name: str, budget: Budget, devices: Sequence[str], planner: Planner, stopwatch: Stopwatch, *, workload: Workload
) -> dict[str, float]:
    """The predicted milliseconds, by device, of what a method makes of `budget` with its knobs at their defaults.

    Raises:
        MethodError: it has no plan for it.
    """
    student = _built(planner.plan(name, budget, defaults(named(name))), workload)
    return {device: stopwatch.predict(student, device) for device in devices}


def _measure(pursuits: Sequence[_Pursuit], stopwatch: Stopwatch) -> None:
    """Measures every candidate on the device that its limit is about."""
    for device in dict.fromkeys(one.device for one in pursuits):
        there = [one for one in pursuits if one.device == device]
        plans = [one.candidate.plan for one in there if one.candidate is not None]
        students = [(named(plan.method), plan) for plan in plans]
        for one, student, row in zip(there, students, stopwatch.time(students, [device]), strict=True):
            one.judge(row.get(device), stopwatch.refusal(student, device))


class _Pursuit:
    """One wish on its way: the plans made for it, which of them is to be measured next, and what came of that."""

    def __init__(self, wish: Wish, planner: Planner, stopwatch: Stopwatch, workload: Workload) -> None:
        self._wish = wish
        self._target = wish.target
        self._planner = planner
        self._stopwatch = stopwatch
        self._workload = workload
        self._params = self._most_params()
        self._plan: Plan | None = None
        self._error: MethodError | None = None
        self._is_settled = False
        self._overs = 0
        self._aim = self._limit = wish.target.latency_ms or 0.0
        self._whole = planner.macs
        self._top = min(wish.target.budget.limits().get("macs", self._whole), self._whole)
        self._bracket = Bracket.below(self._top, self._whole)
        self.candidate: Point | None = None
        self.rounds = 0

    @property
    def device(self) -> str:
        """The device whose latency is limited."""
        return self._target.device

    def advance(self) -> None:
        """Makes plans until one is predicted to meet the limit; `candidate` is the one to measure, if there is any."""
        self.candidate = None
        if self._is_settled:
            return
        try:
            if self._target.latency_ms is None:
                self._plan, self._is_settled = self._unhurried(), True
            else:
                self._close_in()
        except MethodError as error:
            self._error, self._is_settled = error, True

    def judge(self, timing: Timing | None, refusal: str | None) -> None:
        """Told what the candidate's student took, or why it could not be measured."""
        point = self.candidate
        assert point is not None
        if timing is None:
            why = f"a student of {self._wish.method} cannot be timed on {self.device}: {refusal}"
            self._error = MethodError(f"{why}; expected one that the device runs; try another runtime or method")
            self._is_settled = True
            return
        self.rounds += 1
        point.measured = timing.latency_ms["p50"]
        self._overs += point.measured > self._limit
        self._aim = point.predicted * self._limit / point.measured * (1 - MARGIN * self._overs)
        self._is_settled = ROOM * self._limit <= point.measured <= self._limit

    def outcome(self) -> Plan | MethodError:
        """The plan of most MACs that met every limit, or why there is none."""
        met = self._bracket.best(lambda point: point.measured is None or point.measured > self._limit)
        if met is not None:
            return met.plan
        return self._plan or self._error or self._too_slow()

    def predicted(self) -> Plan | str:
        """The candidate's plan; why there is none, where its prediction is over the limit beyond doubt."""
        assert self.candidate is not None
        doubt = 0.0 if self._stopwatch.is_predicted(self.device) else DOUBT
        is_open = not self._is_hopeless() and self._bracket.next(self._is_over, self._aim) is not None
        if is_open or self.candidate.predicted <= self._limit * (1 + doubt):
            return self.candidate.plan
        return str(self._too_slow())

    def _unhurried(self) -> Plan:
        """The plan where latency does not matter."""
        if self._target.size_bytes is None:
            return self._planner.plan(self._wish.method, self._target.budget, self._wish.knobs)
        return self._planned(self._top)[0]

    def _most_params(self) -> int | None:
        """What a limit on size leaves, were there nothing but parameters to store."""
        if self._target.size_bytes is None:
            return None
        return max(1, int(self._target.size_bytes / _parameter_bytes(self._workload.teacher)))

    def _close_in(self) -> None:
        for _ in range(CHAIN_PLANS if isinstance(named(self._wish.method), Chain) else PLANS):
            macs = self._bracket.next(self._is_over, self._aim)
            if macs is None or self._is_hopeless():
                break
            self._try(macs)
        found = self._bracket.best(self._is_over) or self._fastest()
        if found.measured is None:
            self.candidate = found
        else:
            self._is_settled = True

    def _try(self, macs: int) -> None:
        """Adds the plan of so many MACs to the bracket, or that there is none."""
        try:
            plan, student = self._planned(macs)
        except Infeasible as error:
            if not self._bracket.points:
                raise
            self._bracket.refuse(macs, int(error.least.get("macs", 0)))
            return
        self._bracket.points.append(Point(macs, plan, self._stopwatch.predict(student, self.device)))

    def _is_hopeless(self) -> bool:
        """Whether fewer MACs cannot make it faster: what a gate saves is saved by no runtime here."""
        return any(point.plan.macs > self._whole for point in self._bracket.points)

    def _is_over(self, point: Point) -> bool:
        return point.predicted > self._aim if point.measured is None else point.measured > self._limit

    def _fastest(self) -> Point:
        """The point that takes least, as far as that was measured or else predicted."""
        return min(self._bracket.points, key=lambda point: point.measured or point.predicted)

    def _planned(self, macs: int) -> tuple[Plan, nn.Module]:
        """The plan of so many MACs whose student meets the limit on size, and the student."""
        limit = self._target.size_bytes
        for _ in range(1 + ROUNDS):
            try:
                plan = self._planner.plan(self._wish.method, self._within(macs, self._params), self._wish.knobs)
            except Infeasible as error:
                if self._params is None or self._bracket.points:
                    raise
                plan = self._smallest(error)
            student = _built(plan, self._workload)
            found = size_bytes(student)
            if limit is None or found <= limit:
                return plan, student
            self._params = max(1, plan.params - ceil((found - limit) / _parameter_bytes(student)))
        raise self._oversized(found, plan.params)

    def _within(self, macs: int, params: int | None) -> Budget:
        """The budget with limits on top of its own."""
        own = self._target.budget
        lowest = [limit for limit in (own.params, params) if limit is not None]
        return replace(own, macs=min(macs, own.macs or macs), params=min(lowest, default=None))

    def _smallest(self, error: Infeasible) -> Plan:
        """The plan of fewest params where a limit on size left too few of them.

        Raises:
            Infeasible: the budget cannot be met without that limit, or that plan is too large.
        """
        own = self._within(self._top, None)
        self._planner.plan(self._wish.method, own, self._wish.knobs)
        fewest = int(error.least["params"])
        least = replace(own, params=min(fewest, own.params or fewest))
        plan = self._planner.plan(self._wish.method, least, self._wish.knobs)
        found = size_bytes(_built(plan, self._workload))
        if self._target.size_bytes is not None and found > self._target.size_bytes:
            raise self._oversized(found, plan.params) from error
        return plan

    def _oversized(self, found: int, params: int) -> Infeasible:
        limit, method = self._target.size_bytes, self._wish.method
        assert limit is not None
        return Infeasible(
            f"budget {self._target.name!r} allows {size(limit)} of weights, but {method} reaches no less than "
            f"{size(found)} ({found / limit - 1:.0%} more), with {params:,} params; raise it or try another method",
            {"size_bytes": found},
        )

    def _too_slow(self) -> Infeasible:
        """Why no plan is fast enough: what the fastest takes, as measured where any was."""
        points = self._bracket.points
        best = min([one for one in points if one.measured] or points, key=lambda one: one.measured or one.predicted)
        found, limit = best.measured or best.predicted, self._limit
        if best.measured is None or self._stopwatch.is_predicted(self.device):
            takes = "is predicted to take, with these knobs, at least"
        else:
            takes = "takes at least" if self._is_settled else f"takes, in the best of {self.rounds} rounds,"
        least = {f"{LATENCY}{self.device}": found}
        return Infeasible(
            f"budget {self._target.name!r} allows {milliseconds(limit)} on {self.device}, but {self._wish.method} "
            f"{takes} {milliseconds(found)} there ({found / limit - 1:.0%} more), with {best.plan.macs:,} MACs; "
            "raise it or try another method",
            least,
        )


def _built(plan: Plan, workload: Workload) -> nn.Module:
    """The student of a plan, on the CPU, before its weights are fitted to anything."""
    try:
        return named(plan.method).apply(workload.teacher.cpu(), plan)
    except LinAlgError as error:
        raise ScoreError(f"{plan.method} could not be built: {error}; expected finite weights; try another") from error


def _parameter_bytes(model: nn.Module) -> float:
    """The mean bytes of a parameter."""
    sizes = [(one.numel(), one.numel() * one.element_size()) for one in model.parameters()]
    return sum(total for _, total in sizes) / sum(count for count, _ in sizes)

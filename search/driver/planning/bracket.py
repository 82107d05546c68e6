"""Choose how many MACs to ask for so that a plan just meets a limit on latency: arithmetic over the plans made so
far."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from methods.base import Plan

STEP = 0.95
"""MACs that may be asked for are the teacher's times powers of this, so that limits which are alike meet like plans."""


MARGIN = 0.02
"""Taken off the aim each time that a student was over the limit: readings differ by as much."""


@dataclass(eq=False)
class Point:
    """A plan, the MACs that were asked for, and the latency of its student in milliseconds, once `measured` too."""

    asked: int
    plan: Plan
    predicted: float
    measured: float | None = None


@dataclass
class Bracket:
    """Closes in on the largest of `asks`, in ascending order, whose plan takes no longer than `limit` milliseconds.

    A plan that was not measured is compared by its prediction with `aim`, which every measurement corrects. Plans are
    expected to take longer the more MACs they have; where one does not, a good plan is found, but not always the
    largest.
    """

    asks: list[int]
    limit: float
    aim: float = field(init=False)
    overs: int = 0
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.aim = self.limit

    @staticmethod
    def below(top: int, teacher: int, limit: float) -> Bracket:
        """Ask for `top` and for every step below it, for a teacher of so many MACs."""
        steps = [teacher]
        while steps[-1] > 1:
            steps.append(min(int(steps[-1] * STEP), steps[-1] - 1))
        return Bracket([*(step for step in reversed(steps) if step < top), top], limit)

    def refuse(self, asked: int, least: int) -> None:
        """Take note that no plan has so few MACs; `least` are the fewest that might have one."""
        rest = [ask for ask in self.asks if ask > max(asked, least)]
        self.asks = [least, *rest] if asked < least < _lowest(self.points) else rest

    def measure(self, point: Point, ms: float) -> None:
        """Take note of what a point's student took, and correct the aim by as much as its prediction was wrong."""
        point.measured = ms
        self.overs += ms > self.limit
        self.aim = point.predicted * self.limit / ms * (1 - MARGIN * self.overs)

    def is_over(self, point: Point) -> bool:
        """Whether a point takes too long, as far as is known."""
        return point.predicted > self.aim if point.measured is None else point.measured > self.limit

    def next(self) -> int | None:
        """The MACs to ask for next so that a plan takes `aim`; None if the best ask is known, or there is none."""
        if not self.points:
            return self.asks[-1] if self.asks else None
        under = self.best()
        over = [point for point in self.points if self.is_over(point) and (not under or point.asked > under.asked)]
        if not over:
            return None
        high = bisect_left(self.asks, _lowest(over))
        low = bisect_right(self.asks, under.asked) - 1 if under else -1
        if high - low <= 1:
            return None
        guess = bisect_right(self.asks, _crossing(under, over, self.aim)) - 1
        if len(self.points) % 3 == 0:  # where latency jumps, the straight line may creep
            guess = (low + high) // 2
        return self.asks[min(max(guess, low + 1), high - 1)]

    def best(self) -> Point | None:
        """The point of the largest ask that is not over the limit."""
        return max((one for one in self.points if not self.is_over(one)), key=_asked, default=None)

    def met(self) -> Point | None:
        """The point of the largest ask that was measured and met the limit."""
        return max(
            (one for one in self.points if one.measured and one.measured <= self.limit), key=_asked, default=None
        )

    def fastest(self) -> Point:
        """The point that takes least, as measured or else as predicted."""
        return min(self.points, key=lambda point: point.measured or point.predicted)


def _asked(point: Point) -> int:
    return point.asked


def _lowest(points: Sequence[Point]) -> float:
    """The fewest MACs that are known to lead to one of these plans: it is the same down to its own."""
    return min((min(one.asked, one.plan.macs) for one in points), default=math.inf)


def _crossing(under: Point | None, over: Sequence[Point], aim: float) -> float:
    """Return the MACs at which the straight line through two points takes `aim`.

    One is the least that is over; the other is the one that is under, else the next that is over, else the origin.
    """
    high, *higher = sorted(over, key=lambda point: point.asked)
    other = under or next((point for point in higher if point.predicted > high.predicted), None)
    macs, ms = (other.plan.macs, other.predicted) if other else (0, 0.0)
    if ms == high.predicted:
        return (macs + high.plan.macs) / 2
    return macs + (aim - ms) * (high.plan.macs - macs) / (high.predicted - ms)

"""Plans whose students meet a limit on the size of the stored weights, which no allocator knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, log

from torch import nn

from methods import named
from methods.base import Budget, Infeasible, KnobValue, Plan
from methods.chain import AUTO, Chain, share_knob
from methods.pipeline import size_bytes
from search.driver.planning.planner import Planner, refusing
from search.spec.targets import Target
from search.units import size

STAGE = 0.9
"""Where latency is limited, a chain's first link leaves the teacher's MACs times a power of this: the many plans of a
pursuit share few first students, and each new one costs a profile and a pass of scoring."""

CORRECTIONS = 4
"""Corrections of the limit on params before a limit on size is taken to be out of reach."""


@dataclass(frozen=True)
class Request:
    """A method, by name, that is to meet a budget with these knobs."""

    method: str
    target: Target
    knobs: Mapping[str, KnobValue]


class SizedPlans:
    """The plans of a request whose students meet its limit on the size of the stored weights.

    No allocator knows that size, so the limit on params is lowered until the built student is small enough; the next
    plan begins with what was learnt. Without a limit on size every plan is the method's own; where latency is limited,
    the share of a chain's first link is moved a little, see `STAGE`.
    """

    def __init__(self, request: Request, planner: Planner, teacher: nn.Module) -> None:
        self.request = request
        self._planner = planner
        self._teacher = teacher
        self._budget = request.target.budget
        self._limit = request.target.size_bytes
        self.most_macs = min(self._budget.limits().get("macs", planner.macs), planner.macs)
        self._params = None if self._limit is None else max(1, int(self._limit / _parameter_bytes(self._teacher)))

    def largest(self) -> Plan:
        """Return the plan of most MACs; raises as `plan` does."""
        return self._asked(self._budget) if self._limit is None else self.plan(self.most_macs)[0]

    def plan(self, macs: int, *, is_first: bool = True) -> tuple[Plan, nn.Module]:
        """Return the plan of so many MACs and its student.

        Raises:
            Infeasible: there is none; for the first plan even that of fewest params is too large.
        """
        for _ in range(1 + CORRECTIONS):
            try:
                plan = self._asked(self._within(macs, self._params), self._staged(macs))
            except Infeasible as error:
                if self._params is None or not is_first:
                    raise
                plan = self._smallest(error)
            student = built(plan, self._teacher)
            found = size_bytes(student)
            if self._limit is None or found <= self._limit:
                return plan, student
            self._params = max(1, plan.params - ceil((found - self._limit) / _parameter_bytes(student)))
        raise self._oversized(found, plan.params)

    def _asked(self, budget: Budget, knobs: Mapping[str, KnobValue] | None = None) -> Plan:
        return self._planner.plan(self.request.method, budget, knobs or self.request.knobs)

    def _staged(self, macs: int) -> Mapping[str, KnobValue]:
        """Return the knobs for a plan of so many MACs, with a chain's first stage at the nearest power of `STAGE`."""
        chain, knobs, whole = named(self.request.method), self.request.knobs, self._planner.macs
        if not isinstance(chain, Chain) or self.request.target.latency_ms is None or macs >= whole:
            return knobs
        share = share_knob(chain.links[0])
        left = 1 - float(knobs[share]) * (1 - macs / whole)
        level = round(log(left, STAGE))
        if level == 0:
            return knobs
        cut = whole - int(whole * STAGE**level)
        return {**knobs, share: min(1.0, (cut + 0.5) / (whole - macs))}  # the half keeps rounding from adding a MAC

    def _within(self, macs: int, params: int | None) -> Budget:
        """Return the budget with limits on top of its own."""
        own = self._budget
        lowest = [limit for limit in (own.params, params) if limit is not None]
        return replace(own, macs=min(macs, own.macs or macs), params=min(lowest, default=None))

    def _smallest(self, error: Infeasible) -> Plan:
        """Return the plan of fewest params, where a limit on size left too few of them.

        Raises:
            Infeasible: the budget cannot be met without that limit, or that plan is too large.
        """
        own = self._within(self.most_macs, None)
        self._asked(own)
        fewest = int(error.least["params"])
        plan = self._asked(replace(own, params=min(fewest, own.params or fewest)))
        found = size_bytes(built(plan, self._teacher))
        if self._limit is not None and found > self._limit:
            raise self._oversized(found, plan.params) from error
        return plan

    def _oversized(self, found: int, params: int) -> Infeasible:
        limit, method = self._limit, self.request.method
        assert limit is not None
        return Infeasible(
            f"budget {self._budget.name!r} allows {size(limit)} of weights, but {method} reaches no less than "
            f"{size(found)} ({found / limit - 1:.0%} more), with {params:,} params; raise it or try another method",
            {"size_bytes": found},
        )


def untried(knobs: Mapping[str, KnobValue]) -> dict[str, KnobValue]:
    """Return knobs with one half for every share that was to be tried."""
    return {name: 0.5 if value == AUTO else value for name, value in knobs.items()}


def built(plan: Plan, teacher: nn.Module) -> nn.Module:
    """Return the student of a plan, on the CPU, before its weights are fitted to anything.

    Raises:
        MethodError: the surgery raised.
    """
    with refusing(plan.method, "building a student"):
        return named(plan.method).apply(teacher.cpu(), plan)


def _parameter_bytes(model: nn.Module) -> float:
    """The mean bytes of a parameter."""
    sizes = [(one.numel(), one.numel() * one.element_size()) for one in model.parameters()]
    return sum(total for _, total in sizes) / sum(count for count, _ in sizes)

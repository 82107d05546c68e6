"""The shares of a chain's links, found by trying: each is built and refit, and the nearest to the teacher is taken.

The best share moves with the budget, and nothing that is known before a student is built tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf, log
from typing import Any, TypeAlias

from cluster import Cluster, Done, Failed
from methods.base import Budget, Infeasible, KnobValue, Plan
from methods.chain import Chain, share_knob
from methods.pipeline import distance
from methods.protocol import defaults
from search import cache
from search.base import Report
from search.workload import Workload

SHARES = (0.25, 0.45, 0.65, 0.8, 0.9)
"""The shares of the cut still to be made that are tried for a link."""

GRID = 0.8
"""Shares are tried for limits that are the teacher's cost times powers of this: limits that are alike share them, and
those found for one do not depend on what was asked before it."""

VERSION = 2
"""Raised whenever what is found changes meaning."""

Shares: TypeAlias = Mapping[str, KnobValue]


Planning: TypeAlias = Callable[[Chain, Budget, Mapping[str, KnobValue]], Plan]
"""Plans a chain with all its knobs given; raises `Infeasible` where there is no plan."""


class TriedShares:
    """Finds shares on the cluster, once per chain and budget, and keeps them in the cache."""

    def __init__(self, workload: Workload, cluster: Cluster, plan: Planning, report: Report) -> None:
        self._workload = workload
        self._cluster = cluster
        self._plan = plan
        self._report = report
        self._found: dict[str, list[Shares]] = {}
        self.seconds = 0.0

    def ranked(self, chain: Chain, budget: Budget, whole: Mapping[str, int]) -> list[Shares]:
        """Return the shares that were tried, the best first; those without a plan come last.

        The other knobs have their defaults.

        Args:
            whole: the teacher's costs, by the names of a budget's limits.
        """
        near = _near(budget, whole)
        key = cache.digest(f"{VERSION} {chain!r} {near!r} {self._workload.fingerprint} {self._workload.refit}")
        if key not in self._found:
            path = cache.folder() / "shares" / f"{key}.json"
            kept = cache.read_json(path).get("ranked")
            if kept is None:
                kept = self._tried(chain, near)
                cache.keep_json(path, {"ranked": kept})
            self._found[key] = kept
        return self._found[key]

    def _tried(self, chain: Chain, budget: Budget) -> list[Shares]:
        """Try shares link by link, those of the other links as they are known so far."""
        best: dict[str, KnobValue] = {share_knob(link): 0.5 for link in chain.links[:-1]}
        ranked: list[Shares] = []
        for link in chain.links[:-1]:
            tries = [best | {share_knob(link): share} for share in SHARES]
            far = self._distances(chain, budget, tries)
            ranked = [tries[place] for place in sorted(range(len(tries)), key=lambda place: (far[place], place))]
            best = dict(ranked[0])
        return ranked

    def _distances(self, chain: Chain, budget: Budget, tries: Sequence[Shares]) -> list[float]:
        """Return how far from the teacher each try's student is; infinitely, where there is none."""
        plans = {place: plan for place, shares in enumerate(tries) if (plan := self._planned(chain, budget, shares))}
        places, found = list(plans), [inf] * len(tries)
        tell = partial(self._report, "trying shares")
        tell(0, len(places), chain.name)
        for event in self._cluster.run(distance, [(chain, plan) for plan in plans.values()]):
            if isinstance(event, Done | Failed):
                self.seconds += event.seconds
            if isinstance(event, Done):
                found[places[event.index]] = event.value
                tell(sum(one < inf for one in found), len(places), chain.name)
        return found

    def _planned(self, chain: Chain, budget: Budget, shares: Shares) -> Plan | None:
        try:
            return self._plan(chain, budget, {**defaults(chain), **shares})
        except Infeasible:
            return None


def _near(budget: Budget, whole: Mapping[str, int]) -> Budget:
    """Return the budget, nameless, with its limits raised to the next power of `GRID` of the teacher's costs."""

    def raised(cost: str, limit: int) -> int:
        most = whole[cost]
        level = int(log(max(limit, 1) / most, GRID) + 1e-9)
        return most if limit >= most else max(limit, int(most * GRID**level))

    limits: dict[str, Any] = {cost: raised(cost, limit) for cost, limit in budget.limits().items()}
    return replace(Budget("shares", channels=budget.channels), **limits)

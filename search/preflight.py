"""What is known before anything is trained: what each method can reach, and about how long a search would take."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cluster import Cluster
from methods import named
from methods.base import Budget, Infeasible, MethodError, Plan, defaults
from methods.training import Recipe, evaluate, train
from search.base import Report
from search.prepare import Prepared, prepare
from search.spec import RecoverySpec, SearchSpec
from search.workload import Workload, load

TIMED_STEPS = 4


@dataclass(frozen=True)
class MethodReach:
    """The least cost one method brings this network to, its knobs at their defaults, or why it cannot handle it.

    The least MACs of a gated method are expected ones.
    """

    method: str
    refusal: str | None
    least: Mapping[str, int]


@dataclass(frozen=True)
class BudgetReach:
    """One budget's limits, and per method None or why no plan of it fits."""

    budget: str
    limits: Mapping[str, int]
    reasons: Mapping[str, str | None]

    @property
    def is_reachable(self) -> bool:
        """Whether some method fits."""
        return None in self.reasons.values()


@dataclass(frozen=True)
class Preflight:
    """The answer of `paredown check`. `minutes` is an estimate for as many workers as this machine has cores."""

    name: str
    macs: int
    params: int
    layers: int
    methods: tuple[MethodReach, ...]
    budgets: tuple[BudgetReach, ...]
    minutes: float

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        reachable = [{**asdict(budget), "is_reachable": budget.is_reachable} for budget in self.budgets]
        return asdict(self) | {"budgets": reachable}


def preflight(spec: SearchSpec, make_cluster: Callable[[object], Cluster], report: Report) -> Preflight:
    """Profiles and scores, and allocates every budget with every method's defaults; trains nothing.

    A zoo teacher that was never trained is looked at untrained: costs do not depend on its weights.
    """
    workload = load(spec, report, fit=False)
    prepared = prepare(spec, workload, make_cluster(workload.bench()), report)
    return Preflight(
        name=spec.name,
        macs=prepared.profile.macs,
        params=prepared.profile.params,
        layers=len(prepared.profile.layers),
        methods=tuple(_method_reach(prepared, name) for name in spec.candidates),
        budgets=tuple(
            BudgetReach(
                budget.name,
                budget.declared(),
                {name: _obstacle(plan, budget) for name, plan in prepared.reach[budget.name].items()},
            )
            for budget in prepared.budgets
        ),
        minutes=_minutes(spec, workload),
    )


def _obstacle(found: Plan | str, budget: Budget) -> str | None:
    """Why a method has no plan that can win the budget, or None."""
    if isinstance(found, str) or budget.allows(found.macs, found.params, found.macs_expected):
        return found if isinstance(found, str) else None
    return (
        f"budget {budget.name!r} limits MACs, which {found.method} meets on average only: {found.macs_expected:,} are "
        f"expected, {found.macs:,} with every channel; limit macs_expected instead to let it win"
    )


def _method_reach(prepared: Prepared, name: str) -> MethodReach:
    if name in prepared.refused:
        return MethodReach(name, prepared.refused[name], {})
    least: dict[str, int] = {}
    for cost in ("macs", "params"):
        limit = {cost: 1}
        nothing = Budget("nothing", limit.get("macs"), limit.get("params"), prepared.budgets[0].channels)
        try:
            plan = prepared.planner.plan(name, nothing, defaults(named(name)))
            least[cost] = getattr(plan, cost)
        except Infeasible as error:
            least[cost] = error.least[cost]
        except MethodError as error:
            return MethodReach(name, str(error), {})
    return MethodReach(name, None, least)


def _minutes(spec: SearchSpec, workload: Workload) -> float:
    """Trials x (steps + evaluations), from a few timed steps of the teacher's copy on one core's share."""
    settings = spec.recovery
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every worker has
    try:
        step, look = _seconds(workload, settings)
    finally:
        torch.set_num_threads(threads)
    trials = spec.search.trials * len(spec.budgets)
    return trials * (settings.steps * step + 8 * look) / (os.cpu_count() or 1) / 60


def _seconds(workload: Workload, settings: RecoverySpec) -> tuple[float, float]:
    """What a training step and an evaluation take."""
    model = copy.deepcopy(workload.teacher)
    quick = Recipe(TIMED_STEPS, batch_size=settings.batch_size, learning_rate=1e-6, precision=settings.precision)
    started = time.perf_counter()
    for _ in train(model, workload.splits.train, quick, seed=0, teacher=workload.teacher):
        pass
    step = (time.perf_counter() - started) / TIMED_STEPS
    started = time.perf_counter()
    evaluate(model, workload.splits.validation, workload.metric)
    return step, time.perf_counter() - started

"""What is known before any training: the profile, every method's scores, and which budgets each can meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import Cluster
from methods import METHODS
from methods.base import Budget, Infeasible, KnobValue, Method, Plan, Scores, defaults
from methods.profile import Profile, profile
from methods.training import Recipe
from search.base import Report
from search.scoring import scores
from search.spec import RecoverySpec, SearchSpec
from search.workload import Workload


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first trial: `reach` says per budget which methods can meet it, or why not."""

    spec: SearchSpec
    workload: Workload
    profile: Profile
    budgets: tuple[Budget, ...]
    scores: Mapping[str, Scores]
    refused: Mapping[str, str]
    reach: Mapping[str, Mapping[str, Plan | str]]

    def able(self, budget: str) -> list[Method]:
        """The methods that can meet a budget, the baseline last."""
        return [METHODS[name] for name, found in self.reach[budget].items() if isinstance(found, Plan)]


def prepare(
    spec: SearchSpec, workload: Workload, cluster: Cluster, report: Report, only: Sequence[str] | None = None
) -> Prepared:
    """Profile, scores and, per budget and method, whether a plan exists: all before any training."""
    found = profile(workload.teacher, workload.example)
    names = spec.candidates if only is None else only
    refused = {name: why for name in names if (why := METHODS[name].accepts(found)) is not None}
    methods = [METHODS[name] for name in names if name not in refused]
    scored = scores(methods, workload, found, cluster, report)
    budgets = spec.limits(found)
    reach = {
        budget.name: {method.name: _reach(method, scored[method.name], found, budget) for method in methods}
        for budget in budgets
    }
    return Prepared(spec, workload, found, budgets, scored, refused, reach)


def _reach(method: Method, scored: Scores, found: Profile, budget: Budget) -> Plan | str:
    try:
        return method.allocate(scored, found, budget, defaults(method))
    except Infeasible as error:
        return str(error)


def recipe(settings: RecoverySpec, knobs: Mapping[str, KnobValue]) -> Recipe:
    """The recovery recipe: what the spec fixes, and the knobs' values."""
    tuned: dict[str, Any] = {name: float(value) for name, value in knobs.items()}
    return Recipe(
        steps=settings.steps,
        batch_size=settings.batch_size,
        labels=settings.labels,
        precision=settings.precision,
        report_every=max(1, settings.steps // 5),
        **tuned,
    )

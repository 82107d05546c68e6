"""What is known before any training: the profile, every method's scores, and which budgets each can meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import Cluster
from methods import named
from methods.base import Budget, KnobValue, MethodError, Plan, defaults
from methods.chain import AnyMethod, Chain
from methods.profile import Profile, profile
from methods.training import Recipe
from search.base import Report
from search.scoring import Planner
from search.spec import RecoverySpec, SearchSpec
from search.workload import Workload


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first trial: `reach` says per budget which methods can meet it, or why not."""

    spec: SearchSpec
    workload: Workload
    profile: Profile
    budgets: tuple[Budget, ...]
    planner: Planner
    refused: Mapping[str, str]
    reach: Mapping[str, Mapping[str, Plan | str]]

    def budget(self, name: str) -> Budget:
        """The budget of that name."""
        return next(budget for budget in self.budgets if budget.name == name)

    def able(self, budget: str) -> list[AnyMethod]:
        """The methods that can meet a budget, the baseline last."""
        return [named(name) for name, found in self.reach[budget].items() if isinstance(found, Plan)]


def prepare(
    spec: SearchSpec, workload: Workload, cluster: Cluster, report: Report, only: Sequence[str] | None = None
) -> Prepared:
    """Profile, scores and, per budget and method, whether a plan exists: all before any training."""
    found = profile(workload.teacher, workload.example)
    names = spec.candidates if only is None else only
    refused = {name: why for name in names if (why := named(name).accepts(found)) is not None}
    able = [name for name in names if name not in refused]
    planner = Planner(workload, found, cluster, report)
    firsts = [method.links[0] if isinstance(method, Chain) else method for method in map(named, able)]
    planner.score(list({method.name: method for method in firsts}.values()))
    budgets = spec.limits(found)
    reach = {budget.name: {name: _reach(planner, name, budget) for name in able} for budget in budgets}
    return Prepared(spec, workload, found, budgets, planner, refused, reach)


def _reach(planner: Planner, name: str, budget: Budget) -> Plan | str:
    try:
        return planner.plan(name, budget, defaults(named(name)))
    except MethodError as error:
        return str(error)


def recipe(settings: RecoverySpec, knobs: Mapping[str, KnobValue]) -> Recipe:
    """The recovery recipe: what the spec fixes, and the knobs' values."""
    tuned: dict[str, Any] = {name: float(value) for name, value in knobs.items()}
    return Recipe(
        steps=settings.steps,
        batch_size=settings.batch_size,
        labels=settings.labels,
        images=settings.images,
        precision=settings.precision,
        report_every=max(1, settings.steps // 5),
        **tuned,
    )

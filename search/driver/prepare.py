"""Prepare a search: the profile, every method's scores, and which budgets each method can meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster import Cluster
from methods import named
from methods.base import KnobValue, MethodError, Plan
from methods.chain import AnyMethod, links_of
from methods.network import Profile, profile
from methods.pipeline import size_bytes
from methods.protocol import Method
from methods.training import Recipe
from search.base import Report
from search.devices.stopwatch import Stopwatch
from search.driver.planning.fitting import Fitter
from search.driver.planning.planner import Planner, refusing
from search.noise import standard_error
from search.spec import SearchSpec
from search.spec.schema import RecoverySpec
from search.spec.targets import Target
from search.trials import Latency, Teacher
from search.workload import Workload

RUNGS = 5
"""Looks at recovery; a trial can be stopped early at each but the last."""


@dataclass(frozen=True)
class Prepared:
    """A search before its first trial.

    `refused` says why methods cannot handle the network at all. `first_plans` holds, per budget and other method, the
    plan with default knobs that is predicted to meet it, or why there is none.
    """

    spec: SearchSpec
    workload: Workload
    profile: Profile
    teacher: Teacher
    targets: tuple[Target, ...]
    fitter: Fitter
    refused: Mapping[str, str]
    first_plans: Mapping[str, Mapping[str, Plan | str]]

    def target(self, name: str) -> Target:
        """The budget of that name, with all its limits."""
        return next(target for target in self.targets if target.name == name)

    def capable(self, budget: str) -> list[AnyMethod]:
        """The methods that can meet a budget, the baseline last."""
        return [named(name) for name, found in self.first_plans[budget].items() if isinstance(found, Plan)]


def prepare(
    spec: SearchSpec,
    workload: Workload,
    cluster: Cluster,
    report: Report,
    *,
    only: Sequence[str] | None = None,
    known: Teacher | None = None,
    timed: bool = True,
) -> Prepared:
    """Profile, scores and, per budget and method, whether a plan exists: all before any training.

    Args:
        only: the methods to look at; all that compete where it is None.
        known: the teacher's figures where they are on record: limits stay what they were when the search began.
        timed: whether the teacher's latency is measured, and every student's; budgets that limit latency need it.
    """
    report("profile", 0, 1, "")
    found = profile(workload.teacher, workload.example, partial(report, "profile"))
    report("profile", 1, 1, f"{len(found.layers)} layers")
    reference = None if known is None else known.latency_ms
    stopwatch = Stopwatch(spec.devices, Path(spec.folder), workload, cluster, report, reference=reference)
    latency_ms = stopwatch.teacher() if timed else (reference or {})
    report("teacher", 0, 1, "on the validation images")
    teacher = replace(known, latency_ms=latency_ms) if known else _teacher(workload, found, latency_ms)
    report("teacher", 1, 1, f"validation {spec.metric.scale.told(teacher.top1_validation)}")
    targets = spec.targets(teacher)
    names = spec.candidates if only is None else only
    planner = Planner(workload, found, cluster, report)
    refused = _refused(names, found, planner)
    accepted = [name for name in names if name not in refused]
    fitter = Fitter(planner, stopwatch, workload.teacher, times_all=timed)
    plans = {target.name: {name: fitter.reachable(name, target) for name in accepted} for target in targets}
    return Prepared(spec, workload, found, teacher, targets, fitter, refused, plans)


def _refused(names: Sequence[str], found: Profile, planner: Planner) -> dict[str, str]:
    """Score the teacher with every method that accepts it; return why each other one, by name, cannot handle it."""
    refused = {name: why for name in names if (why := _obstacle(name, found)) is not None}
    firsts = {name: _first(name) for name in names if name not in refused}
    failed = planner.score(list({method.name: method for method in firsts.values()}.values()))
    return refused | {name: failed[first.name] for name, first in firsts.items() if first.name in failed}


def _first(name: str) -> Method:
    """Return the method that looks at the teacher: the first link of a chain."""
    return links_of(named(name))[0]


def _obstacle(name: str, found: Profile) -> str | None:
    try:
        with refusing(name, "looking at the profile"):
            return named(name).accepts(found)
    except MethodError as error:
        return str(error)


def _teacher(workload: Workload, found: Profile, latency_ms: Latency) -> Teacher:
    judged = workload.judge(workload.teacher, workload.splits.validation)
    return Teacher(
        top1_validation=judged.value,
        top1_test=None,
        macs=found.macs,
        params=found.params,
        size_bytes=size_bytes(workload.teacher),
        latency_ms=latency_ms,
        top1_error=None if judged.hits is None else standard_error(judged.hits),
    )


def rung(steps: int) -> int:
    """The steps between two looks at recovery."""
    return max(1, -(-steps // RUNGS))


def recipe(settings: RecoverySpec, knobs: Mapping[str, KnobValue]) -> Recipe:
    """The recovery recipe: what the spec fixes, and the knobs' values."""
    tuned: dict[str, Any] = {name: float(value) for name, value in knobs.items()}
    return Recipe(
        steps=settings.steps,
        batch_size=settings.batch_size,
        labels=settings.labels,
        images=settings.images,
        precision=settings.precision,
        report_every=rung(settings.steps),
        **tuned,
    )

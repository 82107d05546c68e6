"""Tell, before anything is trained, how far each method can reach and about how long a search would take.

Where the search trains nothing either, also what the students keep: their figures are final then.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

import torch

from cluster import Cluster, Done, Failed
from methods import named
from methods.base import Budget, Infeasible, MethodError, Plan
from methods.chain import links_of
from methods.pipeline import look
from methods.protocol import defaults
from methods.training import Recipe, train
from search.base import Report
from search.driver.planning.sizing import Request, untried
from search.driver.prepare import Prepared, prepare
from search.limits import Limits, latency_on
from search.results import BudgetReach, LayerReach, MethodReach, Preflight
from search.spec import SearchSpec
from search.spec.schema import RecoverySpec
from search.spec.targets import Target
from search.trials import Fitted, costs_of
from search.workload import Workload, load

TIMED_STEPS = 4

EXPORT_S, SESSION_S, CALLS = 2.0, 0.5, 60
"""Roughly what timing a student takes: its export, and a session of at least so many seconds or calls."""


def preflight(
    spec: SearchSpec, make_cluster: Callable[[Workload], Cluster], report: Report, *, explain: bool = False
) -> Preflight:
    """Profiles and scores, and plans for every budget with every method's defaults; trains no student.

    A zoo teacher that was never trained is looked at untrained, since costs do not depend on its weights, unless
    `recovery.steps` is 0: then each plan's student is built and judged. Devices are only asked where some budget limits
    latency; then the teacher and single layers are measured.

    Args:
        make_cluster: gives the workers, which hold the workload's `worker_inputs()`.
        explain: whether to say, for every layer, which methods may change it.
    """
    is_final = spec.recovery.steps == 0
    workload = load(spec, report, fit=is_final)
    cluster = make_cluster(workload)
    try:
        prepared = prepare(spec, workload, cluster, report, timed=spec.needs_latency())
        looks = _looks(prepared, cluster, report) if is_final else None
        report("timing", 0, 1, "some steps of training")
        found = _found(prepared, looks, explain=explain)
        report("timing", 1, 1, "")
        return found
    finally:
        cluster.close()


@dataclass(frozen=True)
class _Look:
    """What a first plan's student keeps of top-1, or why there is no such student, and the seconds that took."""

    top1: float | str
    seconds: float


_Looks: TypeAlias = Mapping[tuple[str, str], _Look]
"""By budget and method."""


def _looks(prepared: Prepared, cluster: Cluster, report: Report) -> _Looks:
    """Plan what can be reached as the first round of the search does, and judge the students."""
    looks = dict[tuple[str, str], _Look]()
    asked = [(budget, one.name) for budget in prepared.first_plans for one in prepared.capable(budget)]
    requests = [Request(name, prepared.target(budget), defaults(named(name))) for budget, name in asked]
    plans = dict[tuple[str, str], Plan]()
    for place, found in zip(asked, prepared.fitter.fit(requests), strict=True):
        if isinstance(found, Fitted):
            plans[place] = found.plan
        else:
            looks[place] = _Look(str(found), 0.0)
    places = list(plans)
    items = [(named(plan.method), plan) for plan in plans.values()]
    for event in cluster.run(look, items):
        if isinstance(event, Done | Failed):
            budget, name = place = places[event.index]
            top1 = event.value.top1_validation if isinstance(event, Done) else f"{name} failed: {event.error}"
            looks[place] = _Look(top1, event.seconds)
            report("students", len(looks), len(asked), f"{budget} {name}")
    return looks


def _found(prepared: Prepared, looks: _Looks | None, *, explain: bool) -> Preflight:
    spec = prepared.spec
    return Preflight(
        name=spec.name,
        macs=prepared.profile.macs,
        params=prepared.profile.params,
        layers=len(prepared.profile.layers),
        methods=tuple(_method_reach(prepared, name) for name in spec.candidates),
        budgets=tuple(_budget_reach(prepared, target, looks) for target in prepared.targets),
        minutes=_minutes(prepared, looks),
        explained=_explained(prepared) if explain else None,
        teacher_top1=None if looks is None else prepared.teacher.top1_validation,
        metric=spec.metric.scale,
    )


def _budget_reach(prepared: Prepared, target: Target, looks: _Looks | None) -> BudgetReach:
    reasons = {name: _obstacle(plan, target) for name, plan in prepared.first_plans[target.name].items()}
    if looks is None:
        return BudgetReach(target.name, target.limits, reasons)
    top1 = {name: one.top1 for (budget, name), one in looks.items() if budget == target.name}
    failed = {name: found for name, found in top1.items() if isinstance(found, str)}
    kept = {name: found for name, found in top1.items() if isinstance(found, float)}
    return BudgetReach(target.name, target.limits, reasons | failed, kept)


def _explained(prepared: Prepared) -> tuple[LayerReach, ...]:
    """A row per layer, with an entry per method that can handle the network, links of chains among them."""
    names = {link.name: link for name in prepared.spec.candidates for link in links_of(named(name))}
    found: dict[str, Mapping[str, str]] = {}
    for name, method in names.items():
        if method.accepts(prepared.profile) is None and name not in prepared.refused:
            with suppress(MethodError):  # refused, and told so
                found[name] = prepared.fitter.planner.untouched(method)
    return tuple(
        LayerReach(
            layer.name, layer.weight_shape, layer.macs, {name: why.get(layer.name) for name, why in found.items()}
        )
        for layer in prepared.profile.layers
    )


def _obstacle(found: Plan | str, target: Target) -> str | None:
    """Why a method has no plan that can win the budget, or None."""
    if isinstance(found, str):
        return found
    planned = Limits(target.budget.declared())
    if planned.met_by(costs_of(found, {}, top1_drop=None)):
        return None
    return (
        f"budget {target.name!r} limits MACs, which {found.method} meets on average only: {found.macs_expected:,} are "
        f"expected, {found.macs:,} with every channel; limit macs_expected instead to let it win"
    )


def _method_reach(prepared: Prepared, name: str) -> MethodReach:
    if name in prepared.refused:
        return MethodReach(name, prepared.refused[name], {})
    least: dict[str, float] = {}
    channels = prepared.targets[0].budget.channels
    for cost in ("macs", "params"):
        limit = {cost: 1}
        nothing = Budget("nothing", limit.get("macs"), limit.get("params"), channels)
        try:
            plan = prepared.fitter.planner.plan(name, nothing, untried(defaults(named(name))))
            least[cost] = getattr(plan, cost)
        except Infeasible as error:
            least[cost] = error.least[cost]
        except MethodError as error:
            return MethodReach(name, str(error), {})
    latency = _least_latency(prepared, name, Budget("least", macs=int(least["macs"]), channels=channels))
    return MethodReach(name, None, least | latency)


def _least_latency(prepared: Prepared, name: str, budget: Budget) -> dict[str, float]:
    """The predicted latency of a method's plan for `budget`, as a cost, on every device where latency is limited."""
    devices = list(dict.fromkeys(target.device for target in prepared.targets if target.latency_ms is not None))
    if not devices:
        return {}
    try:
        found = prepared.fitter.least_latency(name, budget, devices)
    except MethodError:  # a chain's links take other shares of this cut, and may miss it
        return {}
    return {latency_on(device): ms for device, ms in found.items()}


def _minutes(prepared: Prepared, looks: _Looks | None) -> float:
    """Trials x the seconds of one, which are those of the students that were `looks`, and timing."""
    each = _trial_seconds(prepared) if looks is None else fmean([one.seconds for one in looks.values()] or [0.0])
    trials = prepared.spec.search.trials * len(prepared.spec.budgets)
    exports = trials if prepared.spec.times_all() else len(prepared.spec.budgets)
    work = (trials * each + exports * EXPORT_S) / (os.cpu_count() or 1)
    return (work + _timing_seconds(prepared)) / 60


def _trial_seconds(prepared: Prepared) -> float:
    """Steps + evaluations of a trial, from a few timed steps of the teacher's copy on one core's share."""
    settings = prepared.spec.recovery
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every worker has
    try:
        step, look = _seconds(prepared.workload, settings)
    finally:
        torch.set_num_threads(threads)
    return settings.steps * step + 8 * look


def _timing_seconds(prepared: Prepared) -> float:
    """Return the seconds all trials wait for devices: a student is timed once on each, twice if that is limited.

    Where not every student is timed, the winners are.
    """
    sessions = 0.0
    for name, device in prepared.spec.devices.items():
        if device.runtime == "profile":
            continue
        teacher_ms = prepared.teacher.latency_ms.get(name, {}).get("p50", 0.0)
        limited = sum(one.device == name and one.latency_ms is not None for one in prepared.targets)
        sessions += (len(prepared.targets) + limited) * max(SESSION_S, CALLS * teacher_ms / 1e3)
    return sessions * (prepared.spec.search.trials if prepared.spec.times_all() else 1)


def _seconds(workload: Workload, settings: RecoverySpec) -> tuple[float, float]:
    """Return the seconds of a training step and of an evaluation."""
    model = copy.deepcopy(workload.teacher)
    quick = Recipe(
        TIMED_STEPS, settings.batch_size, learning_rate=1e-6, precision=settings.precision, task=workload.task
    )
    started = time.perf_counter()
    for _ in train(model, workload.splits.train, quick, seed=0, teacher=workload.teacher):
        pass
    step = (time.perf_counter() - started) / TIMED_STEPS
    started = time.perf_counter()
    workload.judge(model, workload.splits.validation)
    return step, time.perf_counter() - started

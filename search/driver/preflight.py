"""Tell, before anything is trained, how far each method can reach and about how long a search would take."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch

from cluster import Cluster
from methods import named
from methods.base import Budget, Infeasible, MethodError, Plan
from methods.chain import links_of
from methods.protocol import defaults
from methods.training import Recipe, evaluate, train
from search.base import Report
from search.driver.prepare import Prepared, prepare
from search.limits import Limits, latency_on
from search.results import BudgetReach, LayerReach, MethodReach, Preflight
from search.spec import SearchSpec
from search.spec.schema import RecoverySpec
from search.spec.targets import Target
from search.trials import costs_of
from search.workload import Workload, load

TIMED_STEPS = 4

EXPORT_S, SESSION_S, CALLS = 2.0, 0.5, 60
"""Roughly what timing a student takes: its export, and a session of at least so many seconds or calls."""


def preflight(
    spec: SearchSpec, make_cluster: Callable[[Workload], Cluster], report: Report, *, explain: bool = False
) -> Preflight:
    """Profiles and scores, and plans for every budget with every method's defaults; trains nothing.

    A zoo teacher that was never trained is looked at untrained: costs do not depend on its weights. Devices are only
    asked where some budget limits latency; then the teacher and single layers are measured.

    Args:
        make_cluster: gives the workers, which hold the workload's `worker_inputs()`.
        explain: whether to say, for every layer, which methods may change it.
    """
    workload = load(spec, report, fit=False)
    cluster = make_cluster(workload)
    try:
        prepared = prepare(spec, workload, cluster, report, timed=spec.needs_latency())
        report("timing", 0, 1, "some steps of training")
        found = _found(prepared, explain=explain)
        report("timing", 1, 1, "")
        return found
    finally:
        cluster.close()


def _found(prepared: Prepared, *, explain: bool) -> Preflight:
    spec = prepared.spec
    return Preflight(
        name=spec.name,
        macs=prepared.profile.macs,
        params=prepared.profile.params,
        layers=len(prepared.profile.layers),
        methods=tuple(_method_reach(prepared, name) for name in spec.candidates),
        budgets=tuple(
            BudgetReach(
                target.name,
                target.limits,
                {name: _obstacle(plan, target) for name, plan in prepared.first_plans[target.name].items()},
            )
            for target in prepared.targets
        ),
        minutes=_minutes(prepared),
        explained=_explained(prepared) if explain else None,
    )


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
            plan = prepared.fitter.planner.plan(name, nothing, defaults(named(name)))
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


def _minutes(prepared: Prepared) -> float:
    """Trials x (steps + evaluations), from a few timed steps of the teacher's copy on one core's share, and timing."""
    settings = prepared.spec.recovery
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every worker has
    try:
        step, look = _seconds(prepared.workload, settings)
    finally:
        torch.set_num_threads(threads)
    trials = prepared.spec.search.trials * len(prepared.spec.budgets)
    exports = trials if prepared.spec.times_all() else len(prepared.spec.budgets)
    work = (trials * (settings.steps * step + 8 * look) + exports * EXPORT_S) / (os.cpu_count() or 1)
    return (work + _timing_seconds(prepared)) / 60


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
    quick = Recipe(TIMED_STEPS, batch_size=settings.batch_size, learning_rate=1e-6, precision=settings.precision)
    started = time.perf_counter()
    for _ in train(model, workload.splits.train, quick, seed=0, teacher=workload.teacher):
        pass
    step = (time.perf_counter() - started) / TIMED_STEPS
    started = time.perf_counter()
    evaluate(model, workload.splits.validation, workload.metric)
    return step, time.perf_counter() - started

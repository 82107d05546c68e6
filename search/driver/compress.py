"""One method, one budget, no search: the pipeline once, into a folder."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from cluster import Cluster, Done, Failed, Step
from methods import named
from methods.base import Choice, Knob, KnobValue, MethodError, Plan
from methods.pipeline import Outcome, rebuild, trial
from methods.training import Recipe
from search.base import Report, SpecError
from search.driver.planning.sizing import Request
from search.driver.prepare import Prepared, prepare, recipe
from search.driver.study import recovery_knobs
from search.export import exported
from search.noise import standard_error
from search.spec import SearchSpec
from search.trials import Fitted, costs_of
from search.workload import Workload, load
from search.workload.teacher import save_weights

_RECOVERY = "recovery."


class CompressionFailed(Exception):
    """The trial of a compression raised; the message says where its trace is."""


def compress(
    spec: SearchSpec,
    make_cluster: Callable[[Workload], Cluster],
    *,
    method: str,
    budget: str,
    out: Path,
    report: Report,
    knobs: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Compresses with `method` for `budget`; writes weights, plan, program and figures to `out`.

    Args:
        method: a method, or a chain as `first+second`.
        knobs: values for some of its knobs and of recovery's (`recovery.learning_rate`); the rest have their defaults.

    Returns:
        The figures: counted costs, the three validation top-1 figures, test top-1, latency and seconds; the teacher's;
        and which limits are `exceeded`, as only `top1_drop`, and MACs of a gated model, can be.

    Raises:
        SpecError: no such method, budget or knob, or a value out of a knob's range.
        Infeasible: a limit of the budget is out of the method's reach.
        CompressionFailed: surgery or recovery raised.
        OSError: `out` cannot be written; found before anything costs time.
    """
    _check_names(spec, method, budget)
    own, shared = _values(method, recovery_knobs(spec.recovery.steps, labels=spec.recovery.labels), knobs)
    _make_folder(out)
    workload = load(spec, report)
    cluster = make_cluster(workload)
    try:
        prepared = prepare(spec, workload, cluster, report, only=[method])
        fitted = _fitted(prepared, method, budget, own)
        teacher = vars(prepared.teacher) | {"top1_test": workload.judge(workload.teacher, workload.splits.test).value}
        outcome = _trial(spec, cluster, fitted.plan, recipe(spec.recovery, shared), out, report)
    finally:
        cluster.close()
    student = rebuild(workload.teacher.cpu(), named(method), fitted.plan, outcome.state)
    latency_ms = {device: timing.latency_ms for device, timing in fitted.timings.items()}
    figures = {name: value for name, value in vars(outcome).items() if name not in ("state", "hits")}
    figures |= {
        "method": method,
        "budget": budget,
        "limits": prepared.target(budget).limits,
        "top1_test": workload.judge(student, workload.splits.test).value,
        "top1_drop": prepared.teacher.top1_validation - outcome.top1_validation,
        "top1_error": None if outcome.hits is None else standard_error(outcome.hits),
        "teacher": teacher,
        "latency_ms": latency_ms,
        "teacher_latency_ms": {device: timing.teacher_latency_ms for device, timing in fitted.timings.items()},
        "noise": {device: timing.noise for device, timing in fitted.timings.items() if timing.noise is not None},
        "devices": prepared.fitter.stopwatch.described(),
        **spec.metric.scale.described,
    }
    costs = costs_of(outcome, latency_ms, top1_drop=figures["top1_drop"])
    figures["exceeded"] = prepared.target(budget).limits.exceeded(costs)
    (out / "plan.json").write_text(json.dumps(fitted.plan.to_json(), indent=2), encoding="utf-8")
    (out / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    save_weights(student, out / "student.safetensors")
    torch.export.save(exported(student, workload.example), out / "student.pt2")
    return figures


def _fitted(prepared: Prepared, method: str, budget: str, knobs: Mapping[str, KnobValue]) -> Fitted:
    """The method's plan and its student's latency; raises where it cannot handle the network or meet the budget."""
    if method in prepared.refused:
        raise MethodError(prepared.refused[method])
    (found,) = prepared.fitter.fit([Request(method, prepared.target(budget), knobs)])
    if isinstance(found, MethodError):
        raise found
    (timed,) = prepared.fitter.timed([found])
    return timed


def _make_folder(out: Path) -> None:
    """Makes the folder, and writes to it before anything costs time."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def _check_names(spec: SearchSpec, method: str, budget: str) -> None:
    try:
        named(method)
    except ValueError as error:
        raise SpecError(f"{error}; correct --method") from error
    known = [one.name for one in spec.budgets]
    if budget not in known:
        raise SpecError(f"no budget {budget!r} in the spec; expected one of {', '.join(known)}; correct --budget")


def _values(
    method: str, recovery: Mapping[str, Knob], given: Mapping[str, str]
) -> tuple[dict[str, KnobValue], dict[str, KnobValue]]:
    """The values of all the method's knobs and of all of recovery's: as given, or their defaults."""
    own = named(method).knobs
    known = dict(own) | {f"{_RECOVERY}{name}": knob for name, knob in recovery.items()}
    if unknown := sorted(set(given) - set(known)):
        raise SpecError(f"{method} has no knob {unknown[0]!r}; expected one of {', '.join(known)}; correct --knob")
    values = {name: _value(name, knob, given[name]) if name in given else knob.default for name, knob in known.items()}
    return {name: values[name] for name in own}, {name: values[f"{_RECOVERY}{name}"] for name in recovery}


def _value(name: str, knob: Knob, text: str) -> KnobValue:
    found: list[KnobValue]
    if isinstance(knob, Choice):
        expected = f"one of {', '.join(map(str, knob.options))}"
        found = [option for option in knob.options if str(option) == text]
    else:
        expected = f"a number from {knob.low} to {knob.high}"
        number = float(text) if re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", text) else math.nan
        found = [number] if knob.low <= number <= knob.high else []
    if not found:
        raise SpecError(f"knob {name!r} is {text!r}; expected {expected}; correct --knob")
    return found[0]


def _trial(spec: SearchSpec, cluster: Cluster, plan: Plan, how: Recipe, out: Path, report: Report) -> Outcome:
    """Run the trial of a plan; the trace of a failure is written to `out`."""
    for event in cluster.run(trial, [(named(plan.method), plan, how, spec.search.seed)]):
        if isinstance(event, Failed):
            (out / "failure.txt").write_text(event.trace, encoding="utf-8")
            raise CompressionFailed(
                f"{plan.method} failed: {event.error}; expected a compressed network; "
                f"see {out / 'failure.txt'} for where it happened"
            )
        if isinstance(event, Done):
            outcome: Outcome = event.value
            return outcome
        if isinstance(event, Step):
            step = event.value
            report("recovering", step.step, step.steps, f"validation {spec.metric.scale.told(step.top1)}")
    raise AssertionError("a cluster ends every item")

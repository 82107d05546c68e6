"""One method, one budget, no search: the pipeline once, in this process, into a folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster import Cluster, Done, Failed
from methods import METHODS
from methods.base import Budget, MethodError, Plan, defaults
from methods.pipeline import rebuild
from methods.training import evaluate
from search import trial
from search.base import Report, SpecError
from search.prepare import Prepared, prepare, recipe
from search.spec import SearchSpec
from search.study import RECOVERY
from search.trial import Measured
from search.workload import exported, load, save_weights


class CompressionFailed(Exception):
    """The trial of a compression raised; the message says where its trace is."""


def compress(
    spec: SearchSpec, make_cluster: Callable[[object], Cluster], *, method: str, budget: str, out: Path, report: Report
) -> dict[str, Any]:
    """Compresses with `method` at its defaults for `budget`; writes weights, plan, program and figures to `out`.

    Returns:
        The figures: counted costs, the three validation top-1 figures, test top-1, latency and seconds; and the
        teacher's.

    Raises:
        SpecError: no such method or budget.
        Infeasible: the budget is out of the method's reach.
        CompressionFailed: surgery or recovery raised.
        OSError: `out` cannot be written; found before anything costs time.
    """
    _check_names(spec, method, budget)
    _make_folder(out)
    workload = load(spec, report)
    cluster = make_cluster(workload.bench())
    prepared = prepare(spec, workload, cluster, report, only=[method])
    plan = _plan(prepared, method, budget)
    teacher = _teacher(prepared)  # before the trial: it tells first what is wrong with the metric
    measured = _trial(spec, cluster, plan, out, report)
    student = rebuild(workload.teacher.cpu(), METHODS[method], plan, measured.outcome.state)
    figures = {name: value for name, value in vars(measured.outcome).items() if name != "state"}
    figures |= {
        "method": method,
        "budget": budget,
        "limits": _limits(prepared, budget).limits(),
        "top1_test": evaluate(student, workload.splits.test, workload.metric),
        "teacher": teacher,
        "latency_ms": measured.latency_ms,
        "teacher_latency_ms": measured.teacher_latency_ms,
    }
    (out / "plan.json").write_text(json.dumps(plan.to_json(), indent=2))
    (out / "figures.json").write_text(json.dumps(figures, indent=2))
    save_weights(student, out / "student.safetensors")
    torch.export.save(exported(student, workload.example), out / "student.pt2")
    return figures


def _limits(prepared: Prepared, budget: str) -> Budget:
    return next(one for one in prepared.budgets if one.name == budget)


def _plan(prepared: Prepared, method: str, budget: str) -> Plan:
    """The method's plan at its defaults; raises where it cannot handle the network or meet the budget."""
    if method in prepared.refused:
        raise MethodError(prepared.refused[method])
    chosen = METHODS[method]
    return chosen.allocate(prepared.scores[method], prepared.profile, _limits(prepared, budget), defaults(chosen))


def _make_folder(out: Path) -> None:
    """Makes the folder, and writes to it before anything costs time."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def _check_names(spec: SearchSpec, method: str, budget: str) -> None:
    if method not in METHODS:
        raise SpecError(f"no method {method!r}; expected one of {', '.join(METHODS)}; correct --method")
    known = [one.name for one in spec.budgets]
    if budget not in known:
        raise SpecError(f"no budget {budget!r} in the spec; expected one of {', '.join(known)}; correct --budget")


def _teacher(prepared: Prepared) -> dict[str, float]:
    workload = prepared.workload
    return {
        "macs": prepared.profile.macs,
        "params": prepared.profile.params,
        "top1_validation": evaluate(workload.teacher, workload.splits.validation, workload.metric),
        "top1_test": evaluate(workload.teacher, workload.splits.test, workload.metric),
    }


def _trial(spec: SearchSpec, cluster: Cluster, plan: Plan, out: Path, report: Report) -> Measured:
    """What came of the plan; the trace of a failure is written to `out`."""
    how = recipe(spec.recovery, {name: knob.default for name, knob in RECOVERY.items()})
    item = (METHODS[plan.method], plan, how, spec.search.seed, spec.devices)
    for event in cluster.run(trial.run, [item]):
        if isinstance(event, Failed):
            (out / "failure.txt").write_text(event.trace)
            raise CompressionFailed(
                f"{plan.method} failed: {event.error}; expected a compressed network; "
                f"see {out / 'failure.txt'} for where it happened"
            )
        if isinstance(event, Done):
            measured: Measured = event.value
            return measured
        report("recovering", event.value.step, event.value.steps, f"validation top-1 {event.value.top1:.4f}")
    raise AssertionError("a cluster ends every item")

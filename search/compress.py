"""One method, one budget, no search: the pipeline once, in this process, into a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cluster import Cluster, Failed, Step
from methods import METHODS
from methods.base import MethodError, defaults
from methods.pipeline import rebuild
from methods.training import evaluate
from search import trial
from search.base import Report, SpecError
from search.loop import prepare, recipe
from search.spec import SearchSpec
from search.study import RECOVERY
from search.workload import load, save_weights


def compress(
    spec: SearchSpec, make_cluster: Callable[[object], Cluster], *, method: str, budget: str, out: Path, report: Report
) -> dict[str, Any]:
    """Compresses with `method` at its defaults for `budget`; writes weights, plan, program and figures to `out`.

    Returns:
        The figures: counted costs, the three validation top-1 figures, test top-1, latency and seconds.

    Raises:
        SpecError: no such method or budget.
        Infeasible: the budget is out of the method's reach.
    """
    if method not in METHODS:
        raise SpecError(f"no method {method!r}; expected one of {', '.join(METHODS)}")
    if budget not in {one.name for one in spec.budgets}:
        known = ", ".join(one.name for one in spec.budgets)
        raise SpecError(f"no budget {budget!r} in the spec; expected one of {known}; correct --budget")
    out.mkdir(parents=True, exist_ok=True)
    workload = load(spec, report)
    cluster = make_cluster(workload.bench())
    prepared = prepare(spec, workload, cluster, report, only=[method])
    if method in prepared.refused:
        raise MethodError(prepared.refused[method])
    chosen = METHODS[method]
    limits = next(one for one in prepared.budgets if one.name == budget)
    plan = chosen.allocate(prepared.scores[method], prepared.profile, limits, defaults(chosen))
    how = recipe(spec.recovery, {name: knob.default for name, knob in RECOVERY.items()})
    measured = None
    for event in cluster.run(trial.run, [(chosen, plan, how, spec.search.seed, spec.devices)]):
        if isinstance(event, Failed):
            raise MethodError(f"{method} failed: {event.error}\n{event.trace}")
        if isinstance(event, Step):
            report("recovering", event.value.step, event.value.steps, f"validation top-1 {event.value.top1:.4f}")
        else:
            measured = event.value
    assert measured is not None
    student = rebuild(workload.teacher, chosen, plan, measured.outcome.state)
    figures = {name: value for name, value in vars(measured.outcome).items() if name != "state"}
    figures |= {
        "method": method,
        "budget": budget,
        "limits": limits.limits(),
        "top1_test": evaluate(student, workload.splits.test, workload.metric),
        "teacher": {"macs": prepared.profile.macs, "params": prepared.profile.params},
        "latency_ms": measured.latency_ms,
        "teacher_latency_ms": measured.teacher_latency_ms,
    }
    save_weights(student, out / "student.safetensors")
    (out / "plan.json").write_text(json.dumps(plan.to_json(), indent=2))
    (out / "figures.json").write_text(json.dumps(figures, indent=2))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(student, (workload.example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, out / "student.pt2")
    return figures

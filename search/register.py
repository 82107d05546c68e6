"""The end of a search: frontier members are stored as loadable programs, and each budget's winner is registered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from methods import named
from methods.pipeline import rebuild
from methods.training import evaluate
from search.base import Report
from search.frontier import BudgetResult, SearchResult, frontier
from search.tracking import Tracker
from search.workload import Workload


def register(workload: Workload, tracker: Tracker, report: Report) -> None:
    """Stores every frontier member and registers the winners; what is already there stays.

    The test set is read here and nowhere else: once for the teacher, once per registered version.
    """
    result = tracker.result()
    teacher = workload.teacher.cpu()
    if result.teacher.top1_test is None:
        test = evaluate(teacher, workload.splits.test, workload.metric)
        tracker.write_teacher(replace(result.teacher, top1_test=test))
    winners = {one.winner.run_id: one for one in result.budgets if one.winner is not None}
    members = [*winners, *(run_id for run_id in _frontier_runs(result) if run_id not in winners)]
    uris: dict[str, str] = {}
    for done, run_id in enumerate(members):
        report("storing models", done, len(members), "")
        uris[run_id] = tracker.model_uri(run_id) or tracker.log_model(
            run_id, student(workload, tracker, run_id), workload.splits.calibration[:2]
        )
    report("storing models", len(members), len(members), "")
    for budget in result.budgets:
        if budget.winner is not None and budget.alias is None:
            run_id = budget.winner.run_id
            found = student(workload, tracker, run_id)
            test = evaluate(found, workload.splits.test, workload.metric)
            tracker.register(budget.name, run_id, uris[run_id], _tags(budget, test))


def student(workload: Workload, tracker: Tracker, run_id: str) -> nn.Module:
    """The student of a trial whose weights were kept, in eval mode."""
    plan = tracker.plan(run_id)
    return rebuild(workload.teacher.cpu(), named(plan.method), plan, tracker.weights(run_id))


def _frontier_runs(result: SearchResult) -> list[str]:
    """The runs of every axis's frontier, each once, the teacher left out."""
    points = [point for axis in result.axes for point in frontier(result.teacher, result.candidates, axis)]
    return list(dict.fromkeys(point["run_id"] for point in points if point["run_id"] is not None))


def _tags(budget: BudgetResult, top1_test: float) -> Mapping[str, object]:
    """Every limit beside its measured value."""
    winner = budget.winner
    assert winner is not None
    measured = {
        "method": winner.method,
        "top1_validation": winner.top1_validation,
        "top1_test": repr(top1_test),
        "macs": winner.macs,
        "macs_expected": winner.macs_expected,
        "params": winner.params,
        "size_bytes": winner.size_bytes,
    }
    measured = {key: value for key, value in measured.items() if value is not None}
    return measured | {f"limit_{cost}": limit for cost, limit in budget.limits.items()}

"""What a person sees in the terminal: progress bars and tables."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from search.base import Report
from search.frontier import Candidate, SearchResult
from search.preflight import Preflight
from search.units import count, percent, size

out = Console()


@contextmanager
def bars(*, hidden: bool) -> Iterator[Report]:
    """A `Report` that draws one bar per stage on standard error."""
    columns = (
        TextColumn("{task.description:<20}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    with _kept_for_results(), Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:

        def report(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note="")
            progress.update(tasks[stage], completed=done, total=total, note=escape(note))

        yield report


@contextmanager
def _kept_for_results() -> Iterator[None]:
    """Sends to standard error what solvers written in C++ print meanwhile: standard output is for the result alone."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)
        os.dup2(output, 1)
        os.close(output)


MACS = {"macs": "", "macs_expected": " expected"}
GATED = {
    "macs_expected": "expected MACs, calibration set",
    "macs_expected_validation": "expected MACs, validation set",
    "macs_worst": "MACs of the worst input",
}
"""A gated model's further figures, and what they are called."""


def show_result(result: SearchResult, report: Path | None) -> None:
    """The winners, the frontier's size, the cost of the search and where to go on."""
    teacher = result.teacher
    table = Table(title=f"{result.name}: the best network for every budget", title_justify="left")
    for heading in ("budget", "method", "MACs", "params", "size", "val.", "test", "latency"):
        table.add_column(heading, justify="left" if heading in ("budget", "method") else "right", overflow="fold")
    table.add_row(
        "", "teacher", count(teacher.macs), count(teacher.params), size(teacher.size_bytes),
        percent(teacher.top1_validation), percent(teacher.top1_test), "1.00x", style="dim",
    )  # fmt: skip
    for budget in result.budgets:
        found = budget.winner
        if found is None:
            table.add_row(budget.name, "[red]nothing fits[/]", *_limits(budget.limits))
            continue
        table.add_row(
            budget.name, found.method, _macs(found, teacher.macs), _percent(found.params, teacher.params),
            size(found.size_bytes), percent(found.top1_validation), percent(budget.top1_test), _latency(found),
        )  # fmt: skip
    out.print(table)
    cost = result.cost
    failed = sum(one.state == "failed" for one in result.candidates)
    out.print(
        f"{cost.trials} trials ({failed} failed) in {cost.wall_s:.0f} s, {cost.device_s:.0f} device-seconds. "
        "Costs are shares of the teacher's (FLOPs = 2 x MACs); val. and test are top-1."
    )
    for budget in result.budgets:
        if budget.model_uri:
            out.print(f'  mlflow.pytorch.load_model("{budget.model_uri}")', highlight=False)
    if report is not None:
        out.print(f"Report: {report}", highlight=False, soft_wrap=True)


def show_preflight(found: Preflight) -> None:
    """What each method can reach, which budgets are within reach, and the expected minutes."""
    table = Table(title=f"{found.name}: {count(found.macs)} MACs, {count(found.params)} params", title_justify="left")
    for heading in ("method", "least MACs", "least params", *(budget.budget for budget in found.budgets)):
        table.add_column(heading)
    for one in found.methods:
        if one.refusal is not None:
            table.add_row(one.method, f"[red]{escape(one.refusal)}[/]")
            continue
        fits = ["[red]no[/]" if budget.reasons[one.method] else "[green]yes[/]" for budget in found.budgets]
        least = _share(one.least["macs"], found.macs), _share(one.least["params"], found.params)
        table.add_row(one.method, *least, *fits)
    out.print(table)
    for budget in found.budgets:
        for reason in filter(None, budget.reasons.values()):
            out.print(f"  {reason}", highlight=False, markup=False)
    out.print(f"A search takes about {max(1, round(found.minutes))} min on this machine.")


def show_figures(figures: Mapping[str, Any]) -> None:
    """The figures of one compression."""
    teacher = figures["teacher"]
    table = Table(title=f"{figures['method']} for {figures['budget']}", title_justify="left", show_header=False)
    rows = {
        "MACs": _share(figures["macs"], teacher["macs"]),
        **{label: _share(figures[key], teacher["macs"]) for key, label in GATED.items() if figures[key] is not None},
        "params": _share(figures["params"], teacher["params"]),
        "size": size(figures["size_bytes"]),
        "validation top-1 after surgery": percent(figures["top1_surgery"]),
        "validation top-1 after BN": percent(figures["top1_bn"]),
        "validation top-1 after recovery": _beside(figures, "top1_validation"),
        "test top-1": _beside(figures, "top1_test"),
        "seconds": f"{figures['seconds']:.1f}",
    }
    for name, times in figures["latency_ms"].items():
        beside = figures["teacher_latency_ms"][name]["p50"]
        rows[f"latency p50 on {name}"] = f"{times['p50']:.3f} ms (teacher {beside:.3f} ms)"
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)


def _beside(figures: Mapping[str, Any], name: str) -> str:
    return f"{percent(figures[name])} (teacher {percent(figures['teacher'][name])})"


def _macs(found: Candidate, teacher: int) -> str:
    """The share of MACs, and of expected ones where a model is gated."""
    expected = "" if found.macs_expected is None else f", expected {_percent(found.macs_expected, teacher)}"
    return _percent(found.macs, teacher) + expected


def _percent(value: int | None, teacher: int) -> str:
    return percent(None if value is None else value / teacher)


def _share(value: int | None, teacher: int) -> str:
    return f"{count(value)} ({_percent(value, teacher)})"


def _limits(limits: Mapping[str, int]) -> list[str]:
    macs = [f"<= {count(limits[cost])}{note}" for cost, note in MACS.items() if cost in limits]
    return [", ".join(macs), f"<= {count(limits['params'])}" if "params" in limits else ""]


def _latency(found: Candidate) -> str:
    """The first device's median, as a ratio to the teacher's."""
    for name, times in found.latency_ms.items():
        return f"{times['p50'] / found.teacher_latency_ms[name]['p50']:.2f}x"
    return ""

"""The terminal: progress bars, and a result, a preflight, a compression or a measurement as tables."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from search.base import Report, printable
from search.cli.output import SUBSTITUTES
from search.frontier import volume
from search.limits import device_of, latencies_in, latency_on
from search.report import costs
from search.report.costs import CostRow
from search.results import BudgetReach, BudgetResult, LayerReach, Preflight, SearchResult
from search.units import TOP1, Scale, count, milliseconds, percent, size

out = Console()

SILENCE_S = 10.0
"""Seconds between two looks whether a log was silent."""


@contextmanager
def bars(*, hidden: bool) -> Iterator[Report]:
    """Give a `Report` that draws one bar per stage on standard error, or writes lines if that is no terminal."""
    console = Console(stderr=True)
    if not (hidden or console.is_terminal):
        with _stdout_for_results_only(), _line_report() as report:
            yield report
        return
    columns = (
        TextColumn("{task.description:<20}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    with _stdout_for_results_only(), Progress(*columns, console=console, disable=hidden) as progress:

        def report(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note="")
            progress.update(tasks[stage], completed=done, total=total, note=escape(printable(note)))

        yield report


@contextmanager
def _line_report() -> Iterator[Report]:
    """Write a line when a stage first begins and ends and when a trial has ended, since a log keeps every line.

    While a stage other than the trials writes nothing for long, its latest line is written if it is a new one.
    """
    written: set[tuple[str, int]] = set()
    latest, last, has_spoken, is_over = "", "", False, Event()

    def write(line: str) -> None:
        nonlocal last
        last = line
        print(f"{datetime.now():%H:%M:%S} {line}".rstrip(), file=sys.stderr, flush=True)

    def report(stage: str, done: int, total: int, note: str) -> None:
        nonlocal latest, has_spoken
        line = f"{stage} {done}/{total} {printable(note)}"
        latest = "" if stage == "trials" else line
        moment = done if stage == "trials" else int(done == total)
        if (stage, moment) not in written:
            written.add((stage, moment))
            has_spoken = True
            write(line)

    def break_silence() -> None:
        nonlocal has_spoken
        while not is_over.wait(SILENCE_S):
            if latest not in ("", last) and not has_spoken:
                write(latest)
            has_spoken = False

    breaker = Thread(target=break_silence, daemon=True)
    breaker.start()
    try:
        yield report
    finally:
        is_over.set()
        breaker.join()


@contextmanager
def _stdout_for_results_only() -> Iterator[None]:
    """Send the prints of solvers written in C++ to standard error: standard output is for the result alone."""
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


GATED = {
    "macs_expected": "expected MACs, calibration set",
    "macs_expected_validation": "expected MACs, validation set",
    "macs_worst": "MACs of the worst input",
}
"""The further figures of a gated model, each with its name in the table."""


ASCII_RULES = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def _rules() -> box.Box:
    """Return the rules of a table: the one below its head, as the output can show it."""
    return ASCII_RULES if out.options.ascii_only else box.SIMPLE_HEAD


def show_result(result: SearchResult, report: Path | None) -> None:
    """Print the winners, each limit beside its measured value, the cost of the search and how to load the models."""
    columns = _shown_costs(result)
    title = f"{result.name}: the best network for every budget"
    table = Table(title=title, title_justify="left", box=_rules(), leading=1)
    for heading in ("budget", "method", "val.", "test", *(costs.name(cost, result.devices) for cost in columns)):
        is_name = heading in ("budget", "method")
        table.add_column(heading, justify="left" if is_name else "right", overflow="fold", no_wrap=is_name)
    teacher, score = result.teacher, result.metric.shown
    wholes = [_teacher_cell(result, cost) for cost in columns]
    judged = result.metric.with_error(teacher.top1_validation, teacher.top1_error)
    table.add_row("", "teacher", judged, score(teacher.top1_test), *wholes, style="dim")
    for budget in result.budgets:
        rows = costs.rows(result, budget)
        method = "[red]nothing fits[/]" if budget.winner is None else "\n+ ".join(budget.winner.method.split("+"))
        top1 = _top1_cell(result, budget, rows["top1_drop"])
        cells = [_cost_cell(rows[cost]) for cost in columns]
        table.add_row(budget.name, method, top1, score(budget.top1_test), *cells)
    out.print(table)
    if note := costs.noise_note(result):
        out.print(note, highlight=False, markup=False)
    _show_effort(result)
    for budget in result.budgets:
        if budget.model_uri:
            out.print(f'  mlflow.pytorch.load_model("{budget.model_uri}")', highlight=False)
    if report is not None:
        out.print(f"Report: {report}", highlight=False, soft_wrap=True)


def _shown_costs(result: SearchResult) -> list[str]:
    """Return the costs to show: all but latencies, and those on each device that a budget limits, or on the first."""
    found = [cost for cost in costs.columns(result) if cost != "top1_drop"]
    latencies = latencies_in(found)
    limited = [cost for cost in latencies if any(cost in budget.limits for budget in result.budgets)]
    return [cost for cost in found if cost not in latencies] + (limited or latencies[:1])


def _teacher_cell(result: SearchResult, cost: str) -> str:
    """Write a cost of the teacher, a latency with its spread below."""
    spread = costs.spread(result.teacher.latency_ms.get(device_of(cost) or ""))
    return "\n".join(filter(None, (costs.shown(cost, costs.of_teacher(result, cost)), spread)))


def _cost_cell(row: CostRow) -> str:
    """Write a cost as a share of the teacher's, its limit below, and a measured cost also in its own unit."""
    is_counted = row.cost.startswith("macs") or row.cost == "params"
    lines = [percent(row.share) if row.share is not None else costs.shown(row.cost, row.value)]
    if row.limit is not None:
        is_share = row.limit_share is not None and row.limit_share >= 0.0005
        lines.append(_limit_text(row, percent(row.limit_share) if is_share else costs.shown(row.cost, row.limit)))
    if row.share is not None and not is_counted:
        lines.append(f"[dim]{costs.shown(row.cost, row.value)}[/]")
    if row.spread is not None:
        lines.append(f"[dim]{row.spread}[/]")
    if row.is_as_the_teacher:
        lines.append("[yellow]as the teacher[/]")
    return "\n".join([*lines, *(["[yellow]noisy[/]"] if row.noise is not None else [])])


def _top1_cell(result: SearchResult, budget: BudgetResult, drop: CostRow) -> str:
    """Write the winner's validation top-1, and the least that the budget asks for."""
    score, is_falling = result.metric.shown, result.metric.best < result.metric.worst
    best = budget.winner
    lines = ["—" if best is None else result.metric.with_error(best.top1_validation, best.top1_error)]
    if drop.limit is not None:
        least = score(result.teacher.top1_validation - drop.limit)
        lines.append(_limit_text(drop, least, "≤" if is_falling else "≥"))
    return "\n".join(lines)


def _limit_text(row: CostRow, text: str, sign: str = "≤") -> str:
    """Write a limit: green if it is met, else red, and without colour if nothing was measured."""
    start = SUBSTITUTES[sign] if out.options.ascii_only else f"{sign} "  # as wide, so that the table is too
    if row.value is None:
        return f"{start}{text}"
    return f"[{'green' if row.is_inside else 'red'}]{start}{text}[/]"


def _show_effort(result: SearchResult) -> None:
    volumes = [
        f"{costs.name(axis, result.devices)} {volume(result.teacher, result.candidates, axis):.3f}"
        for axis in result.axes
    ]
    spent = costs.effort(result.candidates)
    parts = {
        "complete": spent.complete,
        f"stopped early after {spent.stopped_s:.0f} device-seconds": spent.stopped,
        "reused another's training": spent.reused,
        "infeasible": spent.infeasible,
        "failed": spent.failed,
    }
    counts = ", ".join(f"{number} {what}" for what, number in parts.items() if number)
    out.print(
        f"{result.cost.trials} trials{f' ({counts})' if counts else ''} in {result.cost.wall_s:.0f} s, "
        f"{result.cost.device_s:.0f} device-seconds (scoring {result.cost.scoring_s:.0f}, measuring "
        f"{result.cost.measuring_s:.0f}). Shares are of the teacher's (FLOPs = 2 x MACs); val. and test are "
        f"{escape(result.metric.name)}.",
        highlight=False,
    )
    out.print(f"Hypervolume: {', '.join(volumes)}.", highlight=False)
    if any(map(costs.spread, result.teacher.latency_ms.values())):
        out.print(
            "A latency is a median, with the span from the fastest call to the 95th percentile; medians that lie in "
            "each other's spans are not told apart.",
            highlight=False,
        )


def show_preflight(found: Preflight) -> None:
    """Print each method's least costs, the budgets in its reach, why others are not, and the expected minutes."""
    title = f"{found.name}: {count(found.macs)} MACs, {count(found.params)} params"
    table = Table(title=title, title_justify="left", box=_rules())
    timed = latencies_in(cost for one in found.methods for cost in one.least)
    latencies = [f"{costs.name(cost, {})}, predicted" for cost in timed]
    for heading in ("method", *(f"least {what}" for what in ("MACs", "params", *latencies))):
        is_name = heading == "method"
        table.add_column(heading, justify="left" if is_name else "right", overflow="fold", no_wrap=is_name)
    for budget in found.budgets:
        table.add_column(budget.budget, overflow="fold")
    for one in found.methods:
        if one.refusal is not None:
            table.add_row(one.method, "[red]cannot[/]")
            continue
        least = [_with_share(one.least["macs"], found.macs), _with_share(one.least["params"], found.params)]
        least += [costs.shown(cost, one.least.get(cost)) for cost in timed]
        table.add_row(one.method, *least, *(_reach_cell(budget, one.method, found.metric) for budget in found.budgets))
    out.print(table)
    if found.teacher_top1 is not None:
        out.print(
            f"Beside yes: validation {found.metric.name} of the method's first plan, without training; the teacher's "
            f"is {found.metric.shown(found.teacher_top1)}.",
            highlight=False, markup=False,
        )  # fmt: skip
    for budget in found.budgets:
        limits = [
            f"{costs.name(cost, {}, found.metric)} ≤ {costs.shown(cost, limit, found.metric)}"
            for cost, limit in budget.limits.items()
        ]
        out.print(f"{budget.budget}: {', '.join(limits)}", highlight=False, markup=False)
        for reason in filter(None, budget.reasons.values()):
            out.print(f"  {reason}", highlight=False, markup=False)
    for one in found.methods:
        if one.refusal is not None:
            out.print(f"{one.method}: {one.refusal}", highlight=False, markup=False)
    if found.explained is not None:
        _show_layers(found.explained)
    out.print(f"A search takes about {max(1, round(found.minutes))} min on this machine.")


def _reach_cell(budget: BudgetReach, method: str, metric: Scale) -> str:
    """Say whether a method's first plan fits, and what it keeps if that is known."""
    word = "[red]no[/]" if budget.reasons[method] else "[green]yes[/]"
    kept = (budget.kept or {}).get(method)
    return word if kept is None else f"{word}, {metric.shown(kept)}"


def _show_layers(layers: Sequence[LayerReach]) -> None:
    """Print, for every layer, the methods that may change it, and why the others leave it as it is."""
    table = Table(title="layers, and the methods that may change them", title_justify="left", box=_rules(), leading=1)
    for heading in ("layer", "may be changed by", "stays as it is"):
        table.add_column(heading, overflow="fold")
    for one in layers:
        able = [method for method, reason in one.reasons.items() if reason is None]
        by_reason: dict[str, list[str]] = {}
        for method, reason in one.reasons.items():
            if reason is not None:
                by_reason.setdefault(reason, []).append(method)
        reasons = "\n".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
        table.add_row(escape(one.layer), ", ".join(able) or "none", escape(reasons))
    out.print(table)


def show_figures(figures: Mapping[str, Any]) -> None:
    """Print the figures of one compression, each limit of its budget beside the value that it limits."""
    table = Table(title=f"{figures['method']} for {figures['budget']}", title_justify="left", show_header=False)
    for name, value in (_figure_rows(figures) | _latency_rows(figures)).items():
        table.add_row(name, value)
    out.print(table)


def _figure_rows(figures: Mapping[str, Any]) -> dict[str, str]:
    teacher, limits = figures["teacher"], figures["limits"]
    metric = Scale(**figures.get("metric", {}))
    gated = {key: label for key, label in GATED.items() if figures[key] is not None}
    on_macs = ["macs", *([] if gated else GATED)]  # an ungated model's MACs are also its expected ones
    return {
        "MACs": _with_share(figures["macs"], teacher["macs"]) + _limit_note(limits, *on_macs),
        **{
            label: _with_share(figures[key], teacher["macs"]) + _limit_note(limits, key) for key, label in gated.items()
        },
        "params": _with_share(figures["params"], teacher["params"]) + _limit_note(limits, "params"),
        "size": size(figures["size_bytes"]) + _limit_note(limits, "size_bytes"),
        f"validation {metric.name} after surgery": metric.shown(figures["top1_surgery"]),
        f"validation {metric.name} untrained": metric.shown(figures["top1_bn"]),
        f"validation {metric.name} after recovery": _beside_teacher(figures, "top1_validation", metric),
        "lost of it": metric.lost(figures["top1_drop"]) + _limit_note(limits, "top1_drop", metric=metric),
        f"test {metric.name}": _beside_teacher(figures, "top1_test", metric),
        "seconds": f"{figures['seconds']:.1f}",
    }


def _latency_rows(figures: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    for device, times in figures["latency_ms"].items():
        cost = latency_on(device)
        teacher = figures["teacher"]["latency_ms"][device]
        spread = "" if (found := costs.spread(times)) is None else f", {found}"
        whole = costs.shown(cost, teacher["p50"])
        ratio = f"{percent(times['p50'] / teacher['p50'])} of" if costs.are_apart(times, teacher) else "as the teacher,"
        share = f"{costs.shown(cost, times['p50'])}{spread} ({ratio} {whole})"
        noise = figures["noise"].get(device)
        noisy = "" if noise is None else f", noisy: the median lay {percent(noise)} above the fastest call"
        rows[costs.name(cost, figures["devices"])] = share + _limit_note(figures["limits"], cost) + noisy
    return rows


def show_measured(found: Mapping[str, Any]) -> None:
    """Print what `search.devices.measure` returns: a saved model's latency beside the one that its search measured."""
    kind = "predicted latency" if found["is_predicted"] else "latency"
    where = f" on {found['host']}" if found["host"] else ""
    device = f"{found['device']} ({found['runtime']}, threads: {found['threads']}, batch: {found['batch']}{where})"
    out.print(f"{found['model']}: {kind} on {device}", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=_rules())
    table.add_column("")
    for heading in ("fastest", "median", "95 %"):
        table.add_column(heading, justify="right")
    readings = {"now": found} | ({"in the search": found["searched"]} if found["searched"] else {})
    if found["teacher_latency_ms"]:
        readings["its teacher now"] = {"latency_ms": found["teacher_latency_ms"], "noise": None}
    for when, one in readings.items():
        table.add_row(when, *(milliseconds(one["latency_ms"][key]) for key in ("min", "p50", "p95")))
    out.print(table)
    if found["searched"]:
        speed = ", at the speed the teacher had then" if found["teacher_latency_ms"] else ""
        told = percent(found["searched"]["ratio"])
        out.print(f"The median now is {told} of the search's{speed}{_within(found)}.", highlight=False)
    for when, one in readings.items():
        if one["noise"] is not None:
            out.print(f"Noisy {when}: after all repeats the median lay {percent(one['noise'])} above the fastest call.")


def _within(found: Mapping[str, Any]) -> str:
    """Say of a measurement whose difference from the search's own lies within the spread that it does."""
    then, now = found["searched"], found["latency_ms"]
    scale = then["ratio"] * then["latency_ms"]["p50"] / now["p50"]
    is_apart = costs.are_apart({key: scale * value for key, value in now.items()}, then["latency_ms"])
    return "" if is_apart else ", which is within the spread of the calls"


def _limit_note(limits: Mapping[str, float], *names: str, metric: Scale = TOP1) -> str:
    """Write the limits on a value, to stand behind it."""
    return "".join(f", limit {costs.shown(name, limits[name], metric)}" for name in names if name in limits)


def _beside_teacher(figures: Mapping[str, Any], name: str, metric: Scale) -> str:
    return f"{metric.shown(figures[name])} (teacher {metric.shown(figures['teacher'][name])})"


def _with_share(value: float, teacher: float) -> str:
    return f"{count(value)} ({percent(value / teacher)})"

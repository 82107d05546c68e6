"""The report: a finished search as one HTML file that opens anywhere, offline, in light and dark.

`html` turns a `SearchResult` into views (marks, figures, plans) and hands them to `templates/report.html`, which
escapes every text and holds the style, the script and plotly.js inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from search.frontier import volume
from search.limits import device_of, latency_on
from search.report import costs
from search.report.costs import CostRow
from search.report.figures import TEACHER_MARK, figure, history_figures, method_marks
from search.report.plans import plan_view
from search.results import BudgetResult, SearchResult
from search.trials import Candidate, Times
from search.units import count, duration, knobs, milliseconds, percent, size

LEAST_SHARE = 0.005
"""Knobs that decided less than this of top-1 are left out of the report."""


@dataclass(frozen=True)
class Chart:
    """One frontier chart: the element it is drawn in, its cost, the cost's name, and the hypervolume over it."""

    id: str
    axis: str
    name: str
    hypervolume: float


def html(result: SearchResult) -> str:
    """The report of `result`: a complete HTML document with its style, script, charts and plotly.js inside.

    It loads nothing from elsewhere. Every text that came from a user is escaped.
    """
    environment = Environment(loader=PackageLoader("search.report"), autoescape=True, undefined=StrictUndefined)
    filters = (percent, count, size, duration, milliseconds, knobs)
    environment.filters |= {function.__name__: function for function in filters} | {"quoted": json.dumps}
    environment.filters |= {
        "spread": costs.spread,
        "shown": lambda value, cost: costs.shown(cost, value, result.metric),
        "title": _capitalised,
    }
    environment.filters |= {"score": result.metric.shown, "change": result.metric.change}
    winners = [budget.winner for budget in result.budgets if budget.winner]
    marks = method_marks([candidate.method for candidate in [*result.candidates, *winners]])
    charts = _charts(result)
    drawn = {chart.id: figure(result, chart.axis, marks) for chart in charts}
    drawn |= {f"history-{key}": value for key, value in history_figures(result).items()}
    return environment.get_template("report.html").render(
        result=result,
        metric=result.metric.name,
        no_worse_than="≥" if result.metric.best > result.metric.worst else "≤",
        teacher=result.teacher,
        marks=marks,
        teacher_mark=TEACHER_MARK,
        charts=charts,
        **_template_values(result),
        figures=_script_json(drawn),
        plotly=Markup(get_plotlyjs()),
    )


def _charts(result: SearchResult) -> list[Chart]:
    volumes = {axis: volume(result.teacher, result.candidates, axis) for axis in result.axes}
    return [
        Chart(f"frontier-{place}", axis, costs.name(axis, result.devices), volumes[axis])
        for place, axis in enumerate(result.axes)
    ]


def _template_values(result: SearchResult) -> dict[str, Any]:
    """The values that the template lays out beside the charts, by their names there."""
    columns = [cost for cost in costs.columns(result) if cost != "top1_drop"]
    timed = [device for cost in columns if (device := device_of(cost)) is not None]
    others = [device for device in timed if device not in result.devices]
    facts = dict.fromkeys(("runtime", "threads", "batch", "host", "processor", "is_predicted"))
    own = {budget.name: [one for one in result.candidates if one.budget == budget.name] for budget in result.budgets}
    plans = {budget.name: budget.winner.plan for budget in result.budgets if budget.winner and budget.winner.plan}
    return {
        "noise_note": costs.noise_note(result),
        "headlines": [headline(result, budget) for budget in result.budgets],
        "reasons": _reasons_without_winner(result),
        "registered": [budget for budget in result.budgets if budget.model_uri],
        "plans": {name: plan_view(plan, result.teacher) for name, plan in plans.items()},
        "cost_rows": {budget.name: costs.rows(result, budget) for budget in result.budgets},
        "tile_rows": {budget.name: _tile_rows(result, budget) for budget in result.budgets},
        "cost_names": {cost: costs.name(cost, result.devices) for cost in columns},
        "teacher_spreads": {cost: costs.spread(_teacher_times(result, cost)) for cost in columns},
        "teacher_costs": {cost: costs.of_teacher(result, cost) for cost in columns},
        "effort": costs.effort(result.candidates),
        "efforts": {name: costs.effort(candidates) for name, candidates in own.items()},
        "importance": {name: _ranked_knobs(shares) for name, shares in result.importance.items() if shares},
        "budgets_won": _budgets_by_winner(result),
        "trials": _ordered_candidates(result),
        "trial_of_run": {candidate.run_id: candidate for candidate in result.candidates},
        "failures": _candidates_by_failure(result),
        "has_expected": "macs_expected" in result.axes,
        "devices": {device: facts | dict(result.devices.get(device, {})) for device in [*result.devices, *others]},
        "latency_costs": {device: latency_on(device) for device in timed},
    }


def _teacher_times(result: SearchResult, cost: str) -> Times | None:
    return result.teacher.latency_ms.get(device_of(cost) or "")


def _capitalised(text: str) -> str:
    """`text` with its first letter large."""
    return text[:1].upper() + text[1:]


def headline(result: SearchResult, budget: BudgetResult) -> str:
    """The one-line result of a budget: its limited costs as shares of the teacher's, and the change of top-1.

    Example: `half: 49.8 % MACs at -0.3 points`.
    """
    best = budget.winner
    if best is None:
        return f"{budget.name}: no model fits"
    limited = [row for row in costs.rows(result, budget).values() if row.limit is not None]
    shares = [_limited(row) for row in limited if row.cost != "top1_drop"]
    assert best.top1_validation is not None
    change = result.metric.change(best.top1_validation - result.teacher.top1_validation)
    return f"{budget.name}: {_sentence_list(shares)} at {change}" if shares else f"{budget.name}: {change}"


def _limited(row: CostRow) -> str:
    """A cost as a share of the teacher's, unless the two are not apart."""
    return f"the teacher's {row.name}" if row.is_as_the_teacher else f"{percent(row.share)} {row.name}"


def _sentence_list(parts: Sequence[str]) -> str:
    """The parts as a sentence lists them: commas, and a last 'and'."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _tile_rows(result: SearchResult, budget: BudgetResult) -> list[CostRow]:
    """The costs in a budget's tile: limited ones, MACs and params, expected MACs of a gated winner, one latency."""
    rows = {cost: row for cost, row in costs.rows(result, budget).items() if cost != "top1_drop"}
    always = {"macs", "params"} | ({"macs_expected"} if budget.winner and budget.winner.macs_expected else set())
    latencies = [row for row in rows.values() if device_of(row.cost) is not None]
    if not any(row.limit is not None for row in latencies):
        always |= {row.cost for row in latencies[:1]}
    return [row for row in rows.values() if row.limit is not None or row.cost in always]


def _ranked_knobs(shares: Mapping[str, float]) -> dict[str, float]:
    """The knobs that decided anything, the most important first."""
    return {name: share for name, share in sorted(shares.items(), key=lambda one: -one[1]) if share >= LEAST_SHARE}


def _ordered_candidates(result: SearchResult) -> list[Candidate]:
    """All candidates, budget by budget as the spec lists them, then by trial."""
    order = {budget.name: index for index, budget in enumerate(result.budgets)}
    return sorted(result.candidates, key=lambda c: (order.get(c.budget, len(order)), c.trial, c.run_id))


def _reasons_without_winner(result: SearchResult) -> dict[str, list[str]]:
    """Per budget the reasons why methods have no plan, each with its least reachable cost; else the first trial's."""
    reasons = {budget.name: list(result.unreachable.get(budget.name, {}).values()) for budget in result.budgets}
    for candidate in _ordered_candidates(result):
        if candidate.state == "infeasible" and candidate.error and not reasons[candidate.budget]:
            reasons[candidate.budget].append(candidate.error)
    return reasons


def _candidates_by_failure(result: SearchResult) -> dict[str, list[Candidate]]:
    """The failed and infeasible candidates by message, because many trials often end with the same one."""
    failures: dict[str, list[Candidate]] = {}
    for candidate in _ordered_candidates(result):
        if candidate.state in ("failed", "infeasible"):
            failures.setdefault(candidate.error or "no message was recorded", []).append(candidate)
    return failures


def _budgets_by_winner(result: SearchResult) -> dict[str, list[str]]:
    """The names of the budgets that each winning run won."""
    wins: dict[str, list[str]] = {}
    for budget in result.budgets:
        if budget.winner:
            wins.setdefault(budget.winner.run_id, []).append(budget.name)
    return wins


def _script_json(value: object) -> Markup:
    """`value` as JSON that may stand inside a script element: no `<` of a user's text can close it."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))

"""The report: a finished search as one HTML file that opens anywhere, offline, in light and dark.

`html` turns a `SearchResult` into views (marks, figures, plans) and hands them to `templates/report.html`, which
escapes every text and holds the style, the script and plotly.js inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from search.figures import COSTS, TEACHER_MARK, figure, method_label, method_marks
from search.frontier import BudgetResult, Candidate, SearchResult, Teacher, cost_of, hypervolume
from search.units import count, duration, knobs, milliseconds, percent, plain, points, size


@dataclass(frozen=True)
class Bar:
    """What a plan keeps of one channel group."""

    name: str
    kept: int
    base: int


@dataclass(frozen=True)
class PlanView:
    """A plan made ready to be shown: bars for widths, tables for rows of equal shape, facts for the rest.

    `cost` says what the network costs after it, where it is a link of a chain.
    """

    title: str
    bars: Sequence[Bar] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
    facts: Sequence[tuple[str, str]] = ()
    links: Sequence[PlanView] = ()
    cost: str = ""


def html(result: SearchResult) -> str:
    """The report of `result`: a complete HTML document with its style, script, charts and plotly.js inside.

    It loads nothing from elsewhere. Every text that came from a user is escaped.
    """
    environment = Environment(loader=PackageLoader("search"), autoescape=True, undefined=StrictUndefined)
    filters = (percent, points, count, size, duration, milliseconds, knobs)
    environment.filters |= {function.__name__: function for function in filters} | {"quoted": json.dumps}
    winners = [budget.winner for budget in result.budgets if budget.winner]
    marks = method_marks([candidate.method for candidate in [*result.candidates, *winners]])
    return environment.get_template("report.html").render(
        result=result,
        teacher=result.teacher,
        marks=marks,
        teacher_mark=TEACHER_MARK,
        costs=COSTS,
        axes=result.axes,
        cost_of=cost_of,
        headlines=[headline(result.teacher, budget) for budget in result.budgets],
        reasons=_reasons(result),
        volumes={axis: _volume(result, axis) for axis in result.axes},
        registered=[budget for budget in result.budgets if budget.model_uri],
        plans={b.name: plan_view(b.winner.plan, result.teacher) for b in result.budgets if b.winner and b.winner.plan},
        wins=_wins(result),
        trials=_in_order(result),
        failures=_failures(result),
        devices=sorted({device for best in winners for device in best.latency_ms}),
        has_expected="macs_expected" in result.axes,
        figures=_script_json({f"frontier-{axis}": figure(result, axis, marks) for axis in result.axes}),
        plotly=Markup(get_plotlyjs()),
    )


def headline(teacher: Teacher, budget: BudgetResult) -> str:
    """The one-line result of a budget: its limited costs as shares of the teacher's, and the change of top-1.

    Example: `half: 49.8 % MACs at -0.3 points`.
    """
    best = budget.winner
    if best is None:
        return f"{budget.name}: no model fits"
    shares = [f"{percent(cost_of(best, cost) / cost_of(teacher, cost))} {COSTS[cost]}" for cost in budget.limits]
    assert best.top1_validation is not None
    return f"{budget.name}: {' and '.join(shares)} at {points(best.top1_validation - teacher.top1_validation)}"


def plan_view(plan: Mapping[str, Any], teacher: Teacher) -> PlanView:
    """A plan as bars, tables and facts, by the shapes of its choices; a shape not known here becomes a fact.

    Bars come from rows as `methods.channels.to_choices` writes them, links from the plans inside a chain's plan.
    """
    bars: list[Bar] = []
    tables: list[tuple[Sequence[str], Sequence[Sequence[str]]]] = []
    facts: list[tuple[str, str]] = []
    links: list[PlanView] = []
    for name, value in plan.get("choices", {}).items():
        rows = value if isinstance(value, list) and value else []
        records = _records(name, value)
        if rows and all(_is_width(row) for row in rows):
            bars += [Bar(*row[:3]) for row in rows]
        elif records and all("choices" in record for record in records):
            links += [replace(plan_view(record, teacher), cost=_link_cost(record, teacher)) for record in records]
        elif records:
            columns = list(dict.fromkeys(column for record in records for column in record))
            tables.append((columns, [[plain(record.get(column, "")) for column in columns] for record in records]))
        else:
            facts.append((name, plain(value)))
    facts += [("note", note) for note in plan.get("notes", [])]
    return PlanView(method_label(str(plan.get("method", ""))), bars, tables, facts, links)


def _link_cost(plan: Mapping[str, Any], teacher: Teacher) -> str:
    shares = [f"{percent(plan[cost] / getattr(teacher, cost))} {COSTS[cost]}" for cost in ("macs", "params")]
    return f"leaves {' and '.join(shares)}"


def _is_width(row: object) -> bool:
    """Whether `row` starts with a channel group's name, kept width and base width."""
    if not isinstance(row, list | tuple) or len(row) < 3 or not isinstance(row[0], str):
        return False
    return isinstance(row[1], int) and isinstance(row[2], int) and 0 <= row[1] <= row[2] and row[2] > 0


def _records(name: str, value: object) -> list[dict[str, Any]]:
    """`value` as rows with named columns: a list of mappings, a mapping of mappings or of equally long lists."""
    if isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values()):
        return [{name: key, **row} for key, row in value.items()]
    columns: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {}
    if all(isinstance(column, list) for column in columns.values()) and len(set(map(len, columns.values()))) == 1:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
        return [dict(row) for row in value]
    return []


def _in_order(result: SearchResult) -> list[Candidate]:
    """All candidates, budget by budget as the spec lists them, then by trial."""
    order = {budget.name: index for index, budget in enumerate(result.budgets)}
    return sorted(result.candidates, key=lambda c: (order.get(c.budget, len(order)), c.trial, c.run_id))


def _reasons(result: SearchResult) -> dict[str, str]:
    """Per budget the first message of a trial that found no plan; it names the least reachable cost."""
    reasons = dict.fromkeys((budget.name for budget in result.budgets), "")
    for candidate in reversed(_in_order(result)):
        if candidate.state == "infeasible" and candidate.error:
            reasons[candidate.budget] = candidate.error
    return reasons


def _failures(result: SearchResult) -> dict[str, list[Candidate]]:
    """The failed and infeasible candidates by message, because many trials often end with the same one."""
    failures: dict[str, list[Candidate]] = {}
    for candidate in _in_order(result):
        if candidate.state in ("failed", "infeasible"):
            failures.setdefault(candidate.error or "no message was recorded", []).append(candidate)
    return failures


def _wins(result: SearchResult) -> dict[str, list[str]]:
    """The names of the budgets each winning run won."""
    wins: dict[str, list[str]] = {}
    for budget in result.budgets:
        if budget.winner:
            wins.setdefault(budget.winner.run_id, []).append(budget.name)
    return wins


def _volume(result: SearchResult, axis: str) -> float:
    found = [(cost_of(c, axis), c.top1_validation or 0.0) for c in result.complete()]
    return hypervolume(found, reference_cost=cost_of(result.teacher, axis))


def _script_json(value: object) -> Markup:
    """`value` as JSON that may stand inside a script element: no `<` of a user's text can close it."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))

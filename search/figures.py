"""The frontier as plotly figures in plain values, and the mark that stands for each method in all of them.

Colours are names of the report's style sheet variables (`--mark-0`); its script puts in those of the scheme in use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from search.frontier import Candidate, SearchResult, cost_of, frontier
from search.units import count, knobs, milliseconds, percent

LABELS = {"itpruner": "ITPruner", "manidp": "ManiDP", "practise": "PRACTISE", "alds": "ALDS", "uniform": "Uniform"}
COSTS = {"macs": "MACs", "macs_expected": "expected MACs", "params": "params"}

# The methods and the baseline keep places 0 to 4 in every report; chains and others share the rest.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "hexagon", "cross", "triangle-down")


@dataclass(frozen=True)
class Mark:
    """How one method is drawn, in charts and in legends: a colour of the style sheet and a plotly symbol."""

    label: str
    colour: str
    symbol: str


TEACHER_MARK = Mark("Teacher", "--ink", "star")


def method_marks(methods: Sequence[str]) -> dict[str, Mark]:
    """A mark for every name in `methods`: fixed for those in `LABELS`, in order of name for chains and others."""
    known = list(LABELS)
    others = sorted(set(methods) - set(known))
    places = {name: known.index(name) for name in known if name in methods}
    spare = len(SYMBOLS) - len(known)
    places |= {name: len(known) + index % spare for index, name in enumerate(others)}
    return {name: Mark(method_label(name), f"--mark-{place}", SYMBOLS[place]) for name, place in places.items()}


def method_label(name: str) -> str:
    """A method's or chain's name as its authors write it.

    >>> method_label("practise+alds")
    'PRACTISE + ALDS'
    """
    return " + ".join(LABELS.get(part, part) for part in re.split(r"\s*\+\s*", name))


def figure(result: SearchResult, axis: str, marks: Mapping[str, Mark]) -> dict[str, Any]:
    """The plotly figure of the frontier over `axis`, in percent; colours are names of style sheet variables."""
    best = frontier(result.teacher, result.candidates, axis)
    whole = cost_of(result.teacher, axis)
    strong = {point["run_id"] for point in best}
    steps = [(100 * point[axis] / whole, 100 * point["top1_validation"]) for point in best]
    edge = max([100.0] + [100 * cost_of(c, axis) / whole for c in result.complete()])
    traces = [_step_line([*steps, (max(100.0, steps[-1][0]), steps[-1][1])])]
    for method, mark in marks.items():
        found = [candidate for candidate in result.complete() if candidate.method == method]
        for is_strong in (False, True):
            drawn = [candidate for candidate in found if (candidate.run_id in strong) == is_strong]
            traces.append(_dots(result, axis, drawn, mark, is_strong=is_strong))
    return {
        "data": [*traces, _rings(result, axis), _teacher_star(result)],
        "layout": _layout(result, axis, edge),
    }


def _dots(
    result: SearchResult, axis: str, drawn: Sequence[Candidate], mark: Mark, *, is_strong: bool
) -> dict[str, Any]:
    outline = {"color": "--surface", "width": 1.5 if is_strong else 0}
    return {
        **_places(result, axis, drawn),
        "mode": "markers",
        "marker": {"symbol": mark.symbol, "size": 12 if is_strong else 8, "color": mark.colour, "line": outline},
        "opacity": 1 if is_strong else 0.38,
        "hoverinfo": "text",
        "hovertext": [_hover(result, candidate) for candidate in drawn],
    }


def _places(result: SearchResult, axis: str, drawn: Sequence[Candidate]) -> dict[str, Any]:
    whole = cost_of(result.teacher, axis)
    return {
        "x": [100 * cost_of(candidate, axis) / whole for candidate in drawn],
        "y": [100 * (candidate.top1_validation or 0) for candidate in drawn],
    }


def _step_line(steps: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return {
        "x": [x for x, _ in steps],
        "y": [y for _, y in steps],
        "mode": "lines",
        "line": {"shape": "hv", "width": 2, "color": "--ink"},
        "hoverinfo": "skip",
    }


def _rings(result: SearchResult, axis: str) -> dict[str, Any]:
    winners = [budget.winner for budget in result.budgets if budget.winner]
    ring = {"symbol": "circle-open", "size": 21, "color": "--accent", "line": {"width": 2}}
    return {**_places(result, axis, winners), "mode": "markers", "marker": ring, "hoverinfo": "skip"}


def _teacher_star(result: SearchResult) -> dict[str, Any]:
    teacher = result.teacher
    text = (
        f"<b>Teacher</b><br>top-1 {percent(teacher.top1_validation)}<br>"
        f"{count(teacher.macs)} MACs · {count(teacher.params)} params"
    )
    return {
        "x": [100],
        "y": [100 * teacher.top1_validation],
        "mode": "markers",
        "marker": {"symbol": "star", "size": 15, "color": "--ink", "line": {"color": "--surface", "width": 1.5}},
        "hoverinfo": "text",
        "hovertext": [text],
    }


def _hover(result: SearchResult, candidate: Candidate) -> str:
    """What a point says of itself. Plotly reads tags in it, so the texts of users are escaped."""
    expected = "" if candidate.macs_expected is None else f" (expected {count(candidate.macs_expected)})"
    lines = [
        f"<b>{escape(method_label(candidate.method))}</b> · {escape(candidate.budget)} #{candidate.trial}",
        f"knobs: {escape(knobs(candidate.knobs))}",
        f"top-1 after surgery {percent(candidate.top1_surgery)}",
        f"top-1 after BN {percent(candidate.top1_bn)}",
        f"top-1 after recovery <b>{percent(candidate.top1_validation)}</b>",
        f"MACs {count(candidate.macs)}, {percent((candidate.macs or 0) / result.teacher.macs)}{expected}",
        f"params {count(candidate.params)}, {percent((candidate.params or 0) / result.teacher.params)}",
    ]
    times = candidate.latency_ms.items()
    return "<br>".join([*lines, *(f"{escape(device)} p50 {milliseconds(t['p50'])}" for device, t in times)])


def _layout(result: SearchResult, axis: str, edge: float) -> dict[str, Any]:
    whole = cost_of(result.teacher, axis)
    axes = {"gridcolor": "--line", "zeroline": False, "ticksuffix": " %", "fixedrange": False}
    title = {"text": f"share of the teacher's {count(whole)}", "standoff": 12}
    rows = _limit_rows(result, axis)
    return {
        "xaxis": {**axes, "range": [0, 1.04 * edge], "title": title},
        "yaxis": axes,
        "shapes": [
            {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1}
            | {"line": {"color": "--accent", "width": 1, "dash": "dot"}}
            for x, _, _ in rows
        ],
        "annotations": [
            {"x": x, "yref": "paper", "y": 1, "yanchor": "bottom", "yshift": 15 * row, "showarrow": False}
            | {"text": escape(text), "font": {"color": "--accent", "size": 12}}
            for x, text, row in rows
        ],
        "margin": {"l": 52, "r": 18, "b": 52, "t": 22 + 15 * max((row for _, _, row in rows), default=0)},
        "font": {"family": "--font", "size": 12, "color": "--muted"},
        "hoverlabel": {"bgcolor": "--surface", "bordercolor": "--line", "align": "left"}
        | {"font": {"family": "--font", "size": 12, "color": "--ink"}},
        "paper_bgcolor": "transparent",
        "plot_bgcolor": "transparent",
        "showlegend": False,
        "hovermode": "closest",
    }


def _limit_rows(result: SearchResult, axis: str) -> list[tuple[float, str, int]]:
    """Budget limits on `axis` as `(percent, names, row)`; a label too near the one before goes a row up."""
    named: dict[float, list[str]] = {}
    for budget in result.budgets:
        if axis in budget.limits:
            named.setdefault(100 * budget.limits[axis] / cost_of(result.teacher, axis), []).append(budget.name)
    rows: list[tuple[float, str, int]] = []
    for x, names in sorted(named.items()):
        is_near = bool(rows) and x - rows[-1][0] < 14
        rows.append((x, ", ".join(names), rows[-1][2] + 1 if is_near else 0))
    return rows

"""The frontier and its history as plotly figures in plain values, and the mark that stands for each method in them.

Colours are names of the report's style sheet variables (`--mark-0`); its script puts in those of the scheme in use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from search.frontier import frontier
from search.limits import device_of, latency_on
from search.report.costs import is_predicted, shown, spread
from search.results import SearchResult, history
from search.trials import Candidate, Teacher
from search.units import count, knobs, milliseconds, percent

LABELS = {
    "itpruner": "ITPruner",
    "channels": "Channels",
    "manidp": "ManiDP",
    "practise": "PRACTISE",
    "alds": "ALDS",
    "uniform": "Uniform",
}

# The methods and the baseline keep places 0 to 4 in every report; chains and others share the rest.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "hexagon", "cross", "triangle-down", "pentagon")

# The width of a label's letter in percent of a narrow chart's width.
LETTER_PERCENT = 2.2

# A budget's line in the history; dashes let a line below show through if two budgets have the same winner.
STEP_COLOURS = 5
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Mark:
    """The look of one method in charts and legends: a colour of the style sheet and a plotly symbol."""

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
    """The plotly figure of the frontier over `axis`, in percent; colours are names of style sheet variables.

    Candidates that were not measured on the device of an axis are left out of it.
    """
    best = frontier(result.teacher, result.candidates, axis)
    whole = result.teacher.costs[axis]
    strong = {point["run_id"] for point in best}
    steps = [(100 * point[axis] / whole, _height(result, point["top1_validation"])) for point in best]
    placed = _measured_on(result.models(), axis)
    edge = max([100.0] + [100 * candidate.costs[axis] / whole for candidate in placed])
    traces = [_step_line([*steps, (max(100.0, steps[-1][0]), steps[-1][1])])]
    for method, mark in marks.items():
        found = [candidate for candidate in placed if candidate.method == method]
        for is_strong in (False, True):
            drawn = [candidate for candidate in found if (candidate.run_id in strong) == is_strong]
            traces.append(_method_trace(result, axis, drawn, mark, is_strong=is_strong))
    return {
        "data": [*traces, _winner_rings(result, axis), _teacher_star(result)],
        "layout": _frontier_layout(result, axis, edge),
    }


def history_figures(result: SearchResult) -> dict[str, dict[str, Any]]:
    """Two figures over the device time spent: the hypervolume over MACs, and the best top-1 within each budget."""
    moments = history(result)
    scale, unit = _time_scale(moments[-1].device_s if moments else 0.0)
    spent = [moment.device_s / scale for moment in moments]
    volumes = [moment.hypervolume for moment in moments]
    lines = []
    for place, budget in enumerate(result.budgets):
        style = {"color": f"--step-{place % STEP_COLOURS}", "dash": DASHES[place % len(DASHES)]}
        best = [_height(result, moment.best[budget.name]) if budget.name in moment.best else None for moment in moments]
        if any(top1 is not None for top1 in best):
            lines.append(_growth_line(spent, best, style, _suffix(result)) | {"name": escape(budget.name)})
    title = f"device time, {unit}"
    volume = _growth_line(spent, volumes, {"color": "--accent"}, "") | {"hovertemplate": "%{y:.4f}<extra></extra>"}
    best_layout = _growth_layout(title, {"ticksuffix": _suffix(result), **_upwards(result)})
    return {
        "hypervolume": {"data": [volume], "layout": _growth_layout(title, {"ticksuffix": ""})},
        "best": {"data": lines, "layout": best_layout | {"showlegend": True}},
    }


def _height(result: SearchResult, share: float) -> float:
    """The place of a top-1 on an axis: in percent, or as the metric's own value."""
    return 100 * share if result.metric.is_share else result.metric.value(share)


def _suffix(result: SearchResult) -> str:
    return " %" if result.metric.is_share else ""


def _upwards(result: SearchResult) -> dict[str, str]:
    """The direction of an axis on which what is better is higher."""
    return {} if result.metric.best > result.metric.worst else {"autorange": "reversed"}


def _trained_range(result: SearchResult) -> dict[str, Any]:
    """The range of a top-1 axis that shows what was trained, where much that was not lies far below."""
    trained = [one.top1_validation for one in result.candidates if one.state == "complete"]
    found = [top1 for top1 in (result.teacher.top1_validation, *trained) if top1 is not None]
    if not trained or all(one.state == "complete" for one in result.models()):
        return {}
    room = max(0.25 * (max(found) - min(found)), 0.01)
    return {"range": [_height(result, min(found) - 2 * room), _height(result, max(found) + room)], "autorange": False}


def _time_scale(device_s: float) -> tuple[float, str]:
    """Seconds per unit of a time axis that reaches to `device_s`, and the unit's name."""
    for scale, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if device_s >= 3 * scale:
            return scale, unit
    return 1.0, "seconds"


def _growth_line(
    spent: Sequence[float], values: Sequence[float | None], style: Mapping[str, str], suffix: str
) -> dict[str, Any]:
    line = {"shape": "hv", "width": 2, **style}
    return {"x": list(spent), "y": list(values), "mode": "lines", "line": line} | {
        "hovertemplate": f"%{{fullData.name}}: %{{y:{'.1f' if suffix else '.4g'}}}{suffix}<extra></extra>"
    }


def _growth_layout(title: str, upright: Mapping[str, str]) -> dict[str, Any]:
    axes = {"gridcolor": "--line", "zeroline": False}
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": "--ink", "size": 12}}
    return _shared_layout() | {
        "xaxis": {**axes, "rangemode": "tozero", "title": {"text": title, "standoff": 12}},
        "yaxis": {**axes, **upright},
        "legend": legend,
        "margin": {"l": 52, "r": 18, "b": 52, "t": 22},
        "hovermode": "x",
    }


def _measured_on(candidates: Sequence[Candidate], axis: str) -> list[Candidate]:
    """The candidates with a cost on `axis`."""
    return [candidate for candidate in candidates if axis in candidate.costs]


def _method_trace(
    result: SearchResult, axis: str, drawn: Sequence[Candidate], mark: Mark, *, is_strong: bool
) -> dict[str, Any]:
    outline = {"color": "--surface", "width": 1.5 if is_strong else 0}
    return {
        **_coordinates(result, axis, drawn),
        **(_spread_bars(result, axis, drawn, mark) if is_strong else {}),
        "mode": "markers",
        "marker": {"symbol": mark.symbol, "size": 12 if is_strong else 8, "color": mark.colour, "line": outline},
        "opacity": 1 if is_strong else 0.38,
        "hoverinfo": "text",
        "hovertext": [_hover_text(result, candidate) for candidate in drawn],
    }


def _spread_bars(result: SearchResult, axis: str, drawn: Sequence[Candidate], mark: Mark) -> dict[str, Any]:
    """Bars from the fastest call to the 95th percentile, on an axis of measured latency."""
    device = device_of(axis)
    if device is None or is_predicted(device, result.devices):
        return {}
    times = [candidate.latency_ms[device] for candidate in drawn]
    scale = 100 / result.teacher.costs[axis]
    return {
        "error_x": {
            "array": [scale * (one["p95"] - one["p50"]) for one in times],
            "arrayminus": [scale * (one["p50"] - one["min"]) for one in times],
            "color": mark.colour,
            "thickness": 1,
            "width": 3,
        }
    }


def _coordinates(result: SearchResult, axis: str, drawn: Sequence[Candidate]) -> dict[str, Any]:
    whole = result.teacher.costs[axis]
    return {
        "x": [100 * candidate.costs[axis] / whole for candidate in drawn],
        "y": [_height(result, candidate.top1_validation or 0) for candidate in drawn],
    }


def _step_line(steps: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return {
        "x": [x for x, _ in steps],
        "y": [y for _, y in steps],
        "mode": "lines",
        "line": {"shape": "hv", "width": 2, "color": "--ink"},
        "hoverinfo": "skip",
    }


def _winner_rings(result: SearchResult, axis: str) -> dict[str, Any]:
    winners = _measured_on([budget.winner for budget in result.budgets if budget.winner], axis)
    ring = {"symbol": "circle-open", "size": 21, "color": "--accent", "line": {"width": 2}}
    return {**_coordinates(result, axis, winners), "mode": "markers", "marker": ring, "hoverinfo": "skip"}


def _teacher_star(result: SearchResult) -> dict[str, Any]:
    teacher = result.teacher
    lines = [
        "<b>Teacher</b>",
        f"{escape(result.metric.name)} {result.metric.shown(teacher.top1_validation)}",
        f"{count(teacher.macs)} MACs · {count(teacher.params)} params",
        *_latency_lines(result, teacher),
    ]
    return {
        "x": [100],
        "y": [_height(result, teacher.top1_validation)],
        "mode": "markers",
        "marker": {"symbol": "star", "size": 15, "color": "--ink", "line": {"color": "--surface", "width": 1.5}},
        "hoverinfo": "text",
        "hovertext": ["<br>".join(lines)],
    }


def _hover_text(result: SearchResult, candidate: Candidate) -> str:
    """The text of a point under the pointer. Plotly reads tags in it, so the texts of users are escaped."""
    assert candidate.top1 is not None
    name, score = escape(result.metric.name), result.metric.shown
    expected = "" if candidate.macs_expected is None else f" (expected {count(candidate.macs_expected)})"
    lines = [
        f"<b>{escape(method_label(candidate.method))}</b> · {escape(candidate.budget)} #{candidate.trial}",
        f"knobs: {escape(knobs(candidate.knobs))}",
        f"{name} after surgery {score(candidate.top1.surgery)}",
        f"{name} untrained {score(candidate.top1.bn)}",
        f"{name} after recovery <b>{score(candidate.top1.validation)}</b>",
        f"MACs {count(candidate.macs)}, {percent((candidate.macs or 0) / result.teacher.macs)}{expected}",
        f"params {count(candidate.params)}, {percent((candidate.params or 0) / result.teacher.params)}",
    ]
    return "<br>".join([*lines, *_latency_lines(result, candidate)])


def _latency_lines(result: SearchResult, one: Teacher | Candidate) -> list[str]:
    """One line of hover text per device: the median with its spread, and whether it was predicted or noisy."""
    lines = []
    for device, times in one.latency_ms.items():
        share = times["p50"] / result.teacher.costs.get(latency_on(device), math.inf)
        notes = [found] if (found := spread(times)) else []
        notes += [percent(share)] if isinstance(one, Candidate) and share else []
        notes += ["predicted"] if is_predicted(device, result.devices) else []
        notes += ["noisy"] if isinstance(one, Candidate) and one.timings[device].noise is not None else []
        lines.append(escape(f"{device} p50 {', '.join([milliseconds(times['p50']), *notes])}"))
    return lines


def _frontier_layout(result: SearchResult, axis: str, edge: float) -> dict[str, Any]:
    whole = result.teacher.costs[axis]
    axes = {"gridcolor": "--line", "zeroline": False, "ticksuffix": " %", "fixedrange": False}
    predicted = " (predicted)" if is_predicted(device_of(axis) or "", result.devices) else ""
    title = {"text": f"share of the teacher's {shown(axis, whole)}{predicted}", "standoff": 12}
    rows = _limit_rows(result, axis, edge)
    return _shared_layout() | {
        "xaxis": {**axes, "range": [0, 1.04 * edge], "title": title},
        "yaxis": {**axes, "ticksuffix": _suffix(result), **_upwards(result), **_trained_range(result)},
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
        "hovermode": "closest",
    }


def _shared_layout() -> dict[str, Any]:
    """The part of the layout that all charts share."""
    return {
        "font": {"family": "--font", "size": 12, "color": "--muted"},
        "hoverlabel": {"bgcolor": "--surface", "bordercolor": "--line", "align": "left"}
        | {"font": {"family": "--font", "size": 12, "color": "--ink"}},
        "paper_bgcolor": "transparent",
        "plot_bgcolor": "transparent",
        "showlegend": False,
    }


def _limit_rows(result: SearchResult, axis: str, edge: float) -> list[tuple[float, str, int]]:
    """Budget limits on `axis` as `(percent, names, row)`, each label in the lowest row where it hides no other.

    `edge` is the percent at the right end of the chart.
    """
    named: dict[float, list[str]] = {}
    for budget in result.budgets:
        if axis in budget.limits:
            named.setdefault(100 * budget.limits[axis] / result.teacher.costs[axis], []).append(budget.name)
    ends: dict[int, float] = {}
    rows: list[tuple[float, str, int]] = []
    for x, names in sorted(named.items()):
        text = ", ".join(names)
        half = LETTER_PERCENT * edge / 100 / 2 * (len(text) + 1)
        row = next(row for row in range(len(ends) + 1) if ends.get(row, -math.inf) <= x - half)
        ends[row] = x + half
        rows.append((x, text, row))
    return rows

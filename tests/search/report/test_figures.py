"""The charts of the report: what is drawn of candidates, limits and devices, and in which marks and colours."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import search.report
from search.limits import Limits
from search.report.figures import LABELS, TEACHER_MARK, figure, history_figures, method_marks
from search.results import BudgetResult
from tests.search.report.test_report import FOUND, TEACHER, candidate, search_result, times
from tests.support import results


def test_figures_draw_each_complete_candidate_once_and_the_limits() -> None:
    result = search_result(FOUND)
    for axis in ("macs", "params"):
        drawn = figure(result, axis, method_marks(["itpruner", "alds", "practise+alds"]))
        dots = [x for trace in drawn["data"] for x in trace["x"] if trace.get("hoverinfo") == "text"]
        shares = [100 * getattr(c, axis) / getattr(TEACHER, axis) for c in FOUND if c.state == "complete"]
        assert sorted(dots) == pytest.approx(sorted([*shares, 100]))
    limits = {a["text"]: a["x"] for a in figure(result, "params", {})["layout"]["annotations"]}
    assert limits == pytest.approx({"tiny": 40})
    texts = [
        text
        for trace in figure(result, "macs", method_marks(["itpruner"]))["data"]
        for text in trace.get("hovertext", [])
    ]
    assert any("after surgery 41.1 %" in text and "cpu-1 p50 1.20 ms" in text for text in texts)


def test_latency_charts_leave_out_what_was_not_measured_there() -> None:
    found = [candidate("a", "alds", latency_ms=times(1.2)), candidate("b", "alds")]
    result = search_result(found, teacher=replace(TEACHER, latency_ms=times(2.0)))
    drawn = figure(result, "latency_ms/cpu-1", method_marks(["alds"]))
    dots = [x for trace in drawn["data"] for x in trace["x"] if trace.get("hoverinfo") == "text"]
    assert sorted(dots) == pytest.approx([60, 100])
    assert [ring["x"] for ring in drawn["data"] if ring["mode"] == "markers"][-2] == pytest.approx([60])
    assert drawn["layout"]["xaxis"]["title"]["text"] == "share of the teacher's 2.00 ms"


def test_history_is_drawn_over_device_time_in_a_fitting_unit() -> None:
    result = results.search()
    drawn = history_figures(result)
    (volumes,) = drawn["hypervolume"]["data"]
    assert len(volumes["x"]) == len(result.candidates)
    assert volumes["x"][-1] == pytest.approx(result.cost.device_s)
    assert [line["name"] for line in drawn["best"]["data"]] == ["half", "tiny", "edge", "nano"]
    assert [line["y"][-1] for line in drawn["best"]["data"]] == pytest.approx([95.7, 92.9, 95.7, 94.1])
    assert drawn["best"]["layout"]["xaxis"]["title"]["text"] == "device time, seconds"
    slow = replace(result, candidates=[replace(one, device_s=600.0) for one in result.candidates[:2]])
    drawn = history_figures(slow)
    assert drawn["hypervolume"]["data"][0]["x"] == [10.0, 20.0]
    assert drawn["hypervolume"]["layout"]["xaxis"]["title"]["text"] == "device time, minutes"


def test_near_limits_are_labelled_one_above_the_other_and_equal_ones_together() -> None:
    limits = {"a": 0.5, "b": 0.5, "c": 0.55, "d": 0.9, "e": 0.6}
    budgets = [BudgetResult(name, Limits({"macs": int(share * TEACHER.macs)})) for name, share in limits.items()]
    drawn = figure(search_result([], budgets=budgets), "macs", {})["layout"]["annotations"]
    assert [(label["text"], label["yshift"]) for label in drawn] == [("a, b", 0), ("c", 15), ("e", 0), ("d", 0)]


def test_every_colour_a_figure_names_is_in_the_style_sheet_for_both_schemes() -> None:
    style = (Path(search.report.__path__[0]) / "templates" / "report.css").read_text()
    light, dark = (set(re.findall(r"(--[\w-]+):", rules)) for rules in style.split("@media (prefers", 1))
    marks = method_marks([*LABELS, "x", "y", "z"])
    drawn = json.dumps([figure(search_result(FOUND), "macs", marks), history_figures(results.search())])
    named = set(re.findall(r'"(--[\w-]+)"', drawn)) | {m.colour for m in [*marks.values(), TEACHER_MARK]}
    assert named <= light
    assert named - dark <= {"--font"}


def test_marks_of_the_methods_do_not_depend_on_what_else_ran() -> None:
    everything = method_marks([*LABELS, "practise+alds", "other"])
    assert len({(mark.colour, mark.symbol) for mark in everything.values()}) == len(everything)
    for name in LABELS:
        assert method_marks([name]) == {name: everything[name]}

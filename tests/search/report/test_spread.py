"""Latency in the report stands with its spread, and a difference within it is none."""

from __future__ import annotations

from dataclasses import replace

from search.limits import Limits
from search.report.figures import figure, method_marks
from search.report.html import headline, html
from search.results import BudgetResult
from tests.search.report.test_report import TEACHER, Page, candidate, search_result, times
from tests.support import results


def test_a_latency_within_the_spread_is_not_called_another_one() -> None:
    limits = Limits({"latency_ms/cpu-1": 2.1})
    found = {
        share: candidate("a", "alds", latency_ms=times(2 * share), teacher_latency_ms=times(2.0))
        for share in (0.97, 0.6)
    }
    result = search_result(list(found.values()), teacher=replace(TEACHER, latency_ms=times(2.0)))
    told = {share: headline(result, BudgetResult("edge", limits, one)) for share, one in found.items()}
    assert told[0.97].startswith("edge: the teacher's latency on cpu-1 at ")
    assert told[0.6].startswith("edge: 60.0 % latency on cpu-1 at ")
    page = Page(html(replace(result, budgets=[BudgetResult("edge", limits, found[0.97])]))).text
    assert "as the teacher" in page
    assert "neither network is called faster" in page


def test_measured_latency_has_bars_of_its_spread() -> None:
    result = results.search()
    bars = {
        axis: [trace["error_x"] for trace in figure(result, axis, method_marks(["alds"]))["data"] if "error_x" in trace]
        for axis in result.axes
    }
    assert [axis for axis in bars if bars[axis]] == ["latency_ms/cpu-1"]
    (drawn,) = bars["latency_ms/cpu-1"]
    assert len(drawn["array"]) == len(drawn["arrayminus"])
    assert all(share > 0 for share in (*drawn["array"], *drawn["arrayminus"]))

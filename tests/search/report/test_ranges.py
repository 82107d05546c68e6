"""The range of a chart's top-1 axis: what was trained is told apart, however far below the untrained lie."""

from dataclasses import replace
from typing import Any

from search.report.figures import figure, method_marks
from search.results import Cost, SearchResult
from search.trials import Candidate, Stop
from tests.support.results import TEACHER, trial


def axis(*candidates: Candidate) -> dict[str, Any]:
    """The layout of the axis of top-1 over MACs."""
    result = SearchResult("x", TEACHER, [], candidates, Cost(0, 0, 2, 0), "", "")
    found: dict[str, Any] = figure(result, "macs", method_marks([one.method for one in candidates]))["layout"]["yaxis"]
    return found


def test_the_axis_shows_what_was_trained() -> None:
    trained = trial(0, "half", "alds", 0.5, 0.95)
    untrained = replace(trial(1, "half", "manidp", 0.5, 0.2), state="stopped", stop=Stop(0, 0.2))
    assert "range" not in axis(trained)
    assert "range" not in axis(untrained)
    low, high = axis(trained, untrained)["range"]
    assert 80 < low < 95
    assert high > 100 * TEACHER.top1_validation

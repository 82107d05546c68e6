"""Laws and oracles of `search.frontier`: dominance, hypervolume, winners, and the JSON that other programs read."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.frontier import beats, frontier, hypervolume, non_dominated, standing, volume, winner
from search.limits import Limits
from search.noise import packed
from search.results import BudgetResult, Cost, Moment, SearchResult, history
from search.trials import Candidate, Teacher, Timing, Top1
from tests.support.results import nested

Point = tuple[float, float]

TEACHER = Teacher(top1_validation=0.9, top1_test=0.88, macs=1000, params=200, size_bytes=800)

# A coarse grid makes ties and duplicates common; the free floats make them rare.
grid_points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8).map(lambda n: n / 8)), max_size=8)
free_points = st.lists(st.tuples(st.floats(0, 120), st.floats(0, 1)), max_size=8)


def candidate(run_id: str = "a", **values: Any) -> Candidate:
    known: dict[str, Any] = {
        "trial": 0,
        "budget": "half",
        "method": "alds",
        "knobs": {},
        "state": "complete",
        "macs": 500,
        "params": 100,
        "size_bytes": 400,
        "top1_validation": 0.8,
    }
    return Candidate(run_id, **nested(known | values))


def dominates(one: Point, other: Point) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def swept_area(points: list[Point], reference: float) -> Fraction:
    """Return the same volume cell by cell: a cell between neighbouring coordinates counts if some point covers it."""
    costs = sorted({Fraction(0), Fraction(reference)} | {min(Fraction(c), Fraction(reference)) for c, _ in points})
    heights = sorted({Fraction(0)} | {Fraction(t) for _, t in points})
    area = Fraction(0)
    for left, right in pairwise(costs):
        for low, high in pairwise(heights):
            if any(cost <= left and top1 >= high for cost, top1 in points):
                area += (right - left) * (high - low)
    return area / Fraction(reference)


@given(grid_points | free_points)
def test_kept_points_are_exactly_the_undominated_ones_without_duplicates(points: list[Point]) -> None:
    kept = non_dominated(points)
    expected = [
        index
        for index, point in enumerate(points)
        if not any(dominates(other, point) for other in points) and point not in points[:index]
    ]
    assert sorted(kept) == expected
    assert [points[index][0] for index in kept] == sorted(points[index][0] for index in kept)


@given(grid_points | free_points)
def test_hypervolume_equals_the_cell_by_cell_sum(points: list[Point]) -> None:
    assert hypervolume(points, reference_cost=8.0) == float(swept_area(points, 8.0))


@given(st.data(), grid_points | free_points, st.tuples(st.floats(-1, 20), st.floats(-1, 2)))
def test_hypervolume_is_order_free_and_never_shrinks(data: st.DataObject, points: list[Point], more: Point) -> None:
    before = hypervolume(points, reference_cost=7.3)
    assert hypervolume(data.draw(st.permutations(points)), reference_cost=7.3) == before
    assert 0 <= before <= hypervolume([*points, more], reference_cost=7.3) <= 1


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_staircase_of_n_steps_fills_the_triangle_under_it(steps: int) -> None:
    """Points (k/n, k/n), k = 1..n, against cost 1: the sum of (1 - k/n)/n is (n - 1)/2n."""
    points = [(k / steps, k / steps) for k in range(1, steps + 1)]
    assert hypervolume(points, reference_cost=1.0) == pytest.approx((steps - 1) / (2 * steps), abs=1e-15)


def test_hypervolume_needs_a_positive_reference() -> None:
    with pytest.raises(ValueError, match=r"reference_cost is 0.*positive.*teacher"):
        hypervolume([(1.0, 0.5)], reference_cost=0)


def test_winner_may_come_from_another_budget_and_meets_every_limit() -> None:
    found = [
        candidate("over-params", top1_validation=0.95, params=151),
        candidate("over-macs", top1_validation=0.95, macs=601),
        candidate("stopped", top1_validation=0.95, state="stopped"),
        candidate("fits", top1_validation=0.85, macs=600, params=150, budget="tiny"),
        candidate("worse", top1_validation=0.84),
    ]
    best = winner(found, Limits({"macs": 600, "params": 150}))
    assert best is not None
    assert best.run_id == "fits"
    assert winner(found, Limits({"macs": 10})) is None
    assert winner([], Limits()) is None


def test_ties_go_to_macs_then_params_then_trial_then_run_id() -> None:
    ladder = [
        candidate("z", macs=499, params=300, trial=9),
        candidate("y", macs=500, params=99, trial=9),
        candidate("x", trial=1),
        candidate("b", trial=2),
        candidate("c", trial=2),
    ]
    for start in range(len(ladder)):
        for rest in (ladder[start:], ladder[start:][::-1]):
            assert winner(rest, Limits()) is ladder[start]


few = st.integers(0, 2)


def judged(run_id: str, right: int, **values: Any) -> Candidate:
    """A candidate that gets the first `right` of 400 images right."""
    hits = np.arange(400) < right
    return candidate(run_id, top1_validation=float(hits.mean()), hits=packed(hits), **values)


def test_of_equals_the_simplest_wins_on_the_axis_that_is_limited() -> None:
    """Of 400 images one that another gets right is noise, and nine are not."""
    best, near = judged("best", 390, macs=500, params=50), judged("near", 389, macs=300, params=90)
    far = judged("far", 381, macs=100, params=10)
    found = [far, best, near]
    assert winner(found, Limits(macs=500)) is near
    assert winner(found, Limits(params=100)) is best
    assert winner(found, Limits(macs=600, params=100)) is best  # near fills 90 % of params, best 83 % of MACs
    assert winner(found, Limits(macs=500), "best") is best
    assert winner(found, Limits(macs=200)) is far
    assert standing(found, Limits(macs=500)) == (3, 2)
    assert standing([candidate("one"), candidate("twin")], Limits(macs=500)) == (2, 0)


@given(
    st.lists(st.tuples(st.lists(st.booleans(), min_size=9, max_size=9), few, few), min_size=1, max_size=6),
    st.sampled_from([Limits(macs=2), Limits(macs=1, params=1), Limits()]),
)
def test_no_winner_is_dominated(drawn: list[tuple[list[bool], int, int]], limits: Limits) -> None:
    found = [
        candidate(str(place), macs=macs, params=params, top1_validation=sum(right) / 9, hits=packed(np.array(right)))
        for place, (right, macs, params) in enumerate(drawn)
    ]
    best = winner(found, limits)
    assert (best is None) == (not any(one.fits(limits) for one in found))
    assert best is None or not any(beats(one, best) for one in found)


def test_frontier_holds_the_teacher_until_a_student_beats_it() -> None:
    small, bad = candidate("small", macs=400, params=199), candidate("bad", macs=450, params=10, top1_validation=0.7)
    failed = candidate("failed", state="failed", macs=1, top1_validation=1.0)
    found = [small, bad, failed]
    assert [point["run_id"] for point in frontier(TEACHER, found, "macs")] == ["small", None]
    assert [point["run_id"] for point in frontier(TEACHER, found, "params")] == ["bad", "small", None]
    better = candidate("better", macs=1000, top1_validation=0.91)
    assert [point["run_id"] for point in frontier(TEACHER, [better], "macs")] == ["better"]


TIMED = replace(TEACHER, latency_ms={"cpu": {"p50": 9.0}, "nano": {"p50": 9.0}})
EVERY_AXIS = ("macs", "macs_expected", "params", "latency_ms/cpu", "latency_ms/nano")
LIMITED = (*EVERY_AXIS, "size_bytes", "top1_drop")


@st.composite
def candidates(draw: st.DrawFn, run_id: str) -> Candidate:
    """A candidate with every cost on a coarse grid, gated or not, measured on any of two devices."""
    top1 = draw(few) / 2
    return candidate(
        run_id,
        macs=draw(few),
        macs_expected=draw(st.none() | few),
        params=draw(few),
        size_bytes=draw(few),
        latency_ms={name: {"p50": float(draw(few))} for name in draw(st.sets(st.sampled_from(["cpu", "nano"])))},
        top1_validation=top1,
        top1_drop=TEACHER.top1_validation - top1,
        trial=draw(few),
    )


def stands(run_id: str, found: list[Candidate]) -> bool:
    """Whether a run is on any frontier."""
    return any(run_id == point["run_id"] for axis in EVERY_AXIS for point in frontier(TIMED, found, axis))


@given(
    st.integers(1, 6).flatmap(lambda count: st.tuples(*(candidates(str(place)) for place in range(count)))),
    st.dictionaries(st.sampled_from(LIMITED), few.map(float)),
)
def test_what_is_beaten_wins_nothing_and_stands_on_no_frontier(
    drawn: tuple[Candidate, ...], limits: dict[str, float]
) -> None:
    found = list(drawn)
    beaten = {other.run_id for one in found for other in found if beats(one, other)}
    best = winner(found, Limits(limits))
    assert not any(stands(run_id, found) for run_id in beaten)
    assert best is None or best.run_id not in beaten


@given(candidates("one"), candidates("other"))
def test_what_is_not_beaten_can_still_win_or_stand(one: Candidate, other: Candidate) -> None:
    """The converse: weights that nothing can ask for are not kept. Its own costs are the limits it can still win."""
    budgets = [Limits({cost: limit}) for cost, limit in other.costs.items()]
    wins = any(winner([one, other], limits) is other for limits in budgets)
    above = replace(TIMED, top1_validation=-1.0)  # a teacher that hides no student
    alone = any(other.run_id == point["run_id"] for axis in EVERY_AXIS for point in frontier(above, [other, one], axis))
    assert beats(one, other) == (not wins and not alone)


@given(candidates("one"), candidates("other"), candidates("third"))
def test_who_beats_a_beater_beats_the_beaten(one: Candidate, other: Candidate, third: Candidate) -> None:
    """So a candidate need only be compared with those that nothing beats."""
    if beats(one, other) and beats(other, third):
        assert beats(one, third)


def test_beating_looks_at_size_and_at_every_device_of_either() -> None:
    times = {"cpu-1": {"p50": 2.0}}
    first = candidate("first", latency_ms=times)
    better = candidate("better", top1_validation=0.9, latency_ms=times)
    assert beats(better, first)
    assert not beats(replace(better, size_bytes=401), first)
    assert not beats(replace(better, timings={}), first)
    assert not beats(replace(better, timings={"cpu-1": Timing({"p50": 2.1}, {})}), first)
    assert beats(better, replace(first, timings={}))
    cheaper = candidate("cheaper", macs=400, params=50, latency_ms={"cpu-1": {"p50": 1.9}})
    assert beats(cheaper, first)
    assert not beats(replace(cheaper, timings={device: Timing(found, {}) for device, found in times.items()}), first)


def test_latency_is_an_axis_for_those_measured_there() -> None:
    teacher = replace(TEACHER, latency_ms={"cpu-1": {"min": 3.0, "p50": 4.0, "p95": 5.0}})
    fast = candidate("fast", latency_ms={"cpu-1": {"min": 0.9, "p50": 1.0, "p95": 1.1}})
    lost = candidate("lost", top1_validation=0.89)
    result = SearchResult("x", teacher, [], [fast, lost], Cost(0, 0, 2, 0), "", "")
    assert result.axes == ("macs", "params", "latency_ms/cpu-1")
    points = result.to_json()["frontier"]["latency_ms/cpu-1"]
    assert [(point["run_id"], point["latency_ms/cpu-1"]) for point in points] == [("fast", 1.0), (None, 4.0)]
    assert points[0]["latency_ms"] == {"cpu-1": {"min": 0.9, "p50": 1.0, "p95": 1.1}}
    assert volume(teacher, [fast, lost], "latency_ms/cpu-1") == pytest.approx(0.75 * 0.8)
    assert winner([fast, lost], Limits({"latency_ms/cpu-1": 2.0})) is fast
    assert winner([fast, lost], Limits({"macs": 600})) is lost


def test_history_grows_in_the_order_trials_ended() -> None:
    late = candidate("late", top1_validation=0.85, device_s=10.0, ended=30.0)
    early = candidate("early", macs=250, device_s=5.0, ended=10.0, budget="tiny")
    stopped = candidate("stopped", state="stopped", macs=None, device_s=2.0, ended=20.0)
    budgets = [
        BudgetResult("half", Limits({"macs": 500})),
        BudgetResult("tiny", Limits({"macs": 300})),
        BudgetResult("no", Limits({"macs": 1})),
    ]
    result = SearchResult("x", TEACHER, budgets, [late, stopped, early], Cost(9, 17, 3, 1), "", "")
    first = {"half": 0.8, "tiny": 0.8}
    grown = pytest.approx(0.75 * 0.8 + 0.5 * 0.05)
    assert history(result) == [
        Moment(5.0, pytest.approx(0.6), first),
        Moment(7.0, pytest.approx(0.6), first),
        Moment(17.0, grown, first | {"half": 0.85}),
    ]
    assert history(result)[-1].hypervolume == volume(TEACHER, result.candidates, "macs")
    assert history(replace(result, candidates=[])) == []


@given(
    st.lists(
        st.builds(lambda macs, top1: candidate(macs=macs, top1_validation=top1), st.integers(0, 1200), st.floats(0, 1)),
        max_size=8,
    )
)
def test_history_never_falls(found: list[Candidate]) -> None:
    result = SearchResult("x", TEACHER, [BudgetResult("half", Limits({"macs": 500}))], found, Cost(0, 0, 0, 0), "", "")
    moments = history(result)
    assert len(moments) == len(found)
    for before, after in pairwise(moments):
        assert after.hypervolume >= before.hypervolume
        assert after.best.get("half", 0) >= before.best.get("half", 0)


def test_expected_macs_are_a_cost_of_their_own() -> None:
    gated = candidate("gated", macs=1010, macs_expected=400, top1_validation=0.85)
    still = candidate("still", macs=450, top1_validation=0.8)
    assert winner([gated, still], Limits({"macs": 500})) == still
    assert winner([gated, still], Limits({"macs_expected": 500})) == gated
    assert winner([gated, still], Limits({"macs_expected": 500, "macs": 1000})) == still
    assert Limits(macs=505, macs_expected=500).excess(gated.costs) == pytest.approx(
        {"macs": 1.0, "macs_expected": -0.2}
    )
    assert [point["run_id"] for point in frontier(TEACHER, [gated, still], "macs")] == ["still", None]
    assert [point["macs_expected"] for point in frontier(TEACHER, [gated, still], "macs_expected")] == [400, 1000]
    assert not beats(still, gated)
    assert not beats(gated, still)
    assert beats(still, replace(gated, macs_expected=450, top1=Top1(0.7)))


def test_beating_needs_more_than_a_tie_on_one_axis() -> None:
    first = candidate("first")
    assert beats(candidate("a", top1_validation=0.81), first)
    assert beats(candidate("a", macs=499, params=99), first)
    assert not beats(candidate("a", macs=499), first)
    assert not beats(candidate("a", top1_validation=0.81, params=101), first)
    assert not beats(first, first)


def test_complete_candidate_without_its_cost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a' is complete, but its macs is None.*state 'failed'"):
        candidate(macs=None)
    with pytest.raises(ValueError, match="top1_validation is nan"):
        candidate(top1_validation=float("nan"))
    assert not candidate(state="infeasible", macs=None, params=None).fits(Limits(macs=5))


def test_json_has_exactly_the_keys_other_programs_read() -> None:
    times = {"cpu-1": {"min": 1.0, "p50": 1.5, "p95": 2.0}}
    best = candidate("run-7", latency_ms=times, macs_expected=410, plan={"choices": {}}, knobs={"rank": 2})
    budgets = [
        BudgetResult("half", Limits({"macs": 500}), best, "models:/digits@half", "half", 0.79),
        BudgetResult("tiny", Limits({"macs": 50, "latency_ms/cpu-1": 0.5, "top1_drop": 0.01})),
    ]
    result = SearchResult("digits", TEACHER, budgets, [best], Cost(12.5, 40.0, 3, 1), "2026-01-02T03:04:05Z", "name: x")
    values = result.to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values == {
        "name": "digits",
        "teacher": {"top1_validation": 0.9, "top1_test": 0.88, "macs": 1000, "params": 200, "size_bytes": 800}
        | {"latency_ms": {}, "top1_error": None},
        "budgets": [
            {
                "name": "half",
                "limits": {"macs": 500},
                "winner": {
                    "run_id": "run-7",
                    "model_uri": "models:/digits@half",
                    "alias": "half",
                    "method": "alds",
                    "top1_validation": 0.8,
                    "top1_error": None,
                    "top1_test": 0.79,
                    "macs": 500,
                    "macs_expected": 410,
                    "params": 100,
                    "size_bytes": 400,
                    "latency_ms": times,
                },
            },
            {"name": "tiny", "limits": {"macs": 50, "latency_ms": {"cpu-1": 0.5}, "top1_drop": 0.01}, "winner": None},
        ],
        "frontier": {
            axis: [
                {
                    "run_id": "run-7",
                    "method": "alds",
                    "budget": "half",
                    "top1_validation": 0.8,
                    "top1_error": None,
                    "macs": 500,
                    "macs_expected": 410,
                    "params": 100,
                    "size_bytes": 400,
                    "latency_ms": times,
                },
                {
                    "run_id": None,
                    "method": "teacher",
                    "budget": None,
                    "top1_validation": 0.9,
                    "top1_error": None,
                    "macs": 1000,
                    "macs_expected": 1000 if axis == "macs_expected" else None,
                    "params": 200,
                    "size_bytes": 800,
                    "latency_ms": {},
                },
            ]
            for axis in ("macs", "macs_expected", "params")
        },
        "hypervolume": {"macs": 0.4, "macs_expected": pytest.approx(0.472), "params": 0.4},
        "cost": {"wall_s": 12.5, "device_s": 40.0, "trials": 3, "stopped": 1},
    }

"""The loop that meets limits on size and latency: exact laws on a device that is computed, and once on a real one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import InlineCluster
from methods import named
from methods.base import Budget, Infeasible, MethodError, Plan
from methods.chain import link_plans
from methods.network import Profile, profile
from methods.pipeline import size_bytes
from methods.protocol import defaults
from search.devices.stopwatch import Stopwatch
from search.driver.planning.bracket import Bracket, Point
from search.driver.planning.fitting import ROOM, ROUNDS, Fitter
from search.driver.planning.planner import Planner
from search.driver.planning.sizing import Request, SizedPlans, untried
from search.limits import Limits, latency_on
from search.spec import reading, schema
from search.spec.targets import Target
from search.trials import Fitted
from search.workload import Workload, loading, zoo
from search.workload.teacher import save_weights

SPEC = """
name: digits
model: {source: zoo, name: resnet8, weights: teacher.safetensors}
data: {source: digits, calibration: 64}
methods: [alds]
devices: {edge: {runtime: profile, file: edge.yaml, channels: 4}}
budgets: [{name: half, macs: 50%}]
"""
EDGE = "{macs_per_s: 2e9, bytes_per_s: 1e9, overhead_us: 20}"


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """A report nobody reads."""


@dataclass(frozen=True)
class Shop:
    """Everything a fit needs, and the teacher's figures."""

    workload: Workload
    profile: Profile
    planner: Planner
    stopwatch: Stopwatch
    teacher_ms: float

    def fit(self, *requests: Request) -> list[Fitted | MethodError]:
        return self.fitter.fit(requests)

    @property
    def fitter(self) -> Fitter:
        return Fitter(self.planner, self.stopwatch, self.workload.teacher)

    def request(
        self, method: str, *, ms: float | None = None, macs: int | None = None, params: int | None = None,
        size_bytes: int | None = None,
    ) -> Request:  # fmt: skip
        given = {"macs": macs, "params": params, "size_bytes": size_bytes, latency_on("edge"): ms}
        limits = Limits({cost: limit for cost, limit in given.items() if limit is not None})
        return Request(method, Target("tight", limits, "edge", channels=4), untried(defaults(named(method))))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """An untrained resnet8 and a device whose latency is arithmetic."""
    folder = tmp_path_factory.mktemp("shop")
    save_weights(zoo.build("resnet8", 1, 10, 0), folder / "teacher.safetensors")
    (folder / "edge.yaml").write_text(EDGE)
    wanted = reading.parse(SPEC, folder=folder)
    loaded = loading.load(wanted, quiet)
    cluster = InlineCluster(loaded.worker_inputs())
    found = profile(loaded.teacher, loaded.example)
    stopwatch = Stopwatch(wanted.devices, folder, loaded, cluster, quiet)
    teacher_ms = stopwatch.teacher()["edge"]["p50"]
    return Shop(loaded, found, Planner(loaded, found, cluster, quiet), stopwatch, teacher_ms)


def ms(found: Fitted | MethodError) -> float:
    assert isinstance(found, Fitted)
    return found.timings["edge"].latency_ms["p50"]


@pytest.fixture(scope="module")
def every(shop: Shop) -> list[tuple[Plan, float]]:
    """Uniform's plan for every ask there is, and what its student takes: the slow way to the best plan."""
    found = []
    for ask in Bracket.below(shop.profile.macs, shop.profile.macs, 1.0).asks:
        try:
            plan = shop.planner.plan("uniform", Budget("b", macs=ask, channels=4), defaults(named("uniform")))
        except Infeasible:
            continue
        found.append((plan, shop.stopwatch.predict(named("uniform").apply(shop.workload.teacher, plan), "edge")))
    return found


def test_without_limits_on_size_or_latency_the_plan_is_the_methods_own(shop: Shop) -> None:
    request = shop.request("alds", macs=shop.profile.macs // 2, params=shop.profile.params // 2)
    (found,) = shop.fit(request)
    assert isinstance(found, Fitted)
    assert found.plan == shop.planner.plan("alds", request.target.budget, request.knobs)
    assert found.rounds == 0
    assert not found.timings  # until it is worth training
    (timed,) = shop.fitter.timed([found])
    assert timed.timings.keys() == {"edge"}
    assert timed.plan == found.plan


def test_the_plans_of_a_pursuit_share_first_students(shop: Shop) -> None:
    """Each new one is profiled and scored; where nothing is pursued the share is the one that was asked for."""
    asks = [int(shop.profile.macs * 0.95**power) for power in range(10, 26)]

    def first(request: Request) -> list[Plan]:
        sized = SizedPlans(request, shop.planner, shop.workload.teacher)
        return [link_plans(sized.plan(macs, is_first=False)[0])[0] for macs in asks]

    pursued = first(shop.request("channels+alds", ms=shop.teacher_ms))
    given = first(shop.request("channels+alds", macs=shop.profile.macs))
    assert len({plan.macs for plan in pursued}) <= 5 < len({plan.macs for plan in given})
    for one, other in zip(pursued, given, strict=True):
        assert abs(one.macs - other.macs) <= 0.1 * shop.profile.macs


@settings(max_examples=40)
@given(st.floats(0.25, 1.0), st.floats(0.05, 1.0))
def test_the_largest_plan_within_the_limits_is_found(
    shop: Shop, every: list[tuple[Plan, float]], latency: float, macs: float
) -> None:
    limit, most = latency * shop.teacher_ms, int(macs * shop.profile.macs)
    (found,) = shop.fit(shop.request("uniform", ms=limit, macs=most))
    known = [plan.macs for plan, took in every if took <= limit and plan.macs <= most]
    if isinstance(found, Fitted):
        assert ms(found) <= limit
        assert found.plan.macs <= most
        assert 1 <= found.rounds <= ROUNDS
        assert found.plan.macs >= max(known, default=0) or ms(found) >= ROOM * limit
    else:
        assert isinstance(found, Infeasible)
        assert not known


@settings(max_examples=15)
@given(st.floats(0.25, 1.0), st.floats(0.25, 1.0))
def test_a_larger_limit_on_latency_never_gives_fewer_macs(shop: Shop, one: float, other: float) -> None:
    limits = sorted((one * shop.teacher_ms, other * shop.teacher_ms))
    found = shop.fit(*(shop.request("uniform", ms=limit) for limit in limits))
    macs = [fitted.plan.macs if isinstance(fitted, Fitted) else 0 for fitted in found]
    assert macs == sorted(macs)


@pytest.mark.parametrize("method", ["itpruner", "alds", "practise", "itpruner+alds"])
def test_every_method_meets_latency_and_params_at_once(shop: Shop, method: str) -> None:
    share = {"practise": 0.9}.get(method, 0.8)
    params = int(0.95 * shop.profile.params)  # one block is all that practise can drop
    requests = [
        shop.request(method, ms=share * shop.teacher_ms, params=params),
        shop.request(method, ms=shop.teacher_ms),
    ]
    tight, loose = shop.fit(*requests)
    assert ms(tight) <= share * shop.teacher_ms
    assert isinstance(tight, Fitted)
    assert tight.plan.params <= params
    assert ms(loose) <= shop.teacher_ms


def test_who_is_too_slow_is_told_by_how_much(shop: Shop, every: list[tuple[Plan, float]]) -> None:
    least = min(took for _, took in every)
    (found,) = shop.fit(shop.request("uniform", ms=least / 2))
    assert isinstance(found, Infeasible)
    assert found.least == {"latency_ms/edge": pytest.approx(least)}
    assert "uniform is predicted to take, with these knobs, at least" in str(found)
    assert "(100% more)" in str(found)
    assert "10,600 MACs" in str(found)


def test_gates_save_no_latency_here(shop: Shop) -> None:
    gated, whole = shop.fit(
        shop.request("manidp", ms=0.9 * shop.teacher_ms), shop.request("manidp", ms=shop.teacher_ms)
    )
    assert isinstance(gated, Infeasible)
    assert gated.least["latency_ms/edge"] == pytest.approx(shop.teacher_ms)
    assert isinstance(whole, Fitted)
    assert whole.plan.macs == shop.profile.macs


@settings(max_examples=10)
@given(st.floats(0.1, 1.0))
def test_the_size_of_the_weights_is_met_and_used(shop: Shop, share: float) -> None:
    limit = int(share * size_bytes(shop.workload.teacher))
    (found,) = shop.fit(shop.request("itpruner", size_bytes=limit))
    assert isinstance(found, Fitted)
    student = named("itpruner").apply(shop.workload.teacher, found.plan)
    assert size_bytes(student) <= limit
    more = replace(shop.request("itpruner").target.budget, params=found.plan.params, macs=shop.profile.macs)
    assert found.plan.loss <= shop.planner.plan("itpruner", more, defaults(named("itpruner"))).loss
    assert size_bytes(student) >= 0.8 * limit


def test_size_and_latency_are_met_together(shop: Shop) -> None:
    limit, took = size_bytes(shop.workload.teacher) // 2, 0.9 * shop.teacher_ms
    (found,) = shop.fit(shop.request("uniform", ms=took, size_bytes=limit))
    assert ms(found) <= took
    assert isinstance(found, Fitted)
    assert size_bytes(named("uniform").apply(shop.workload.teacher, found.plan)) <= limit


def test_who_is_too_large_is_told_by_how_much(shop: Shop) -> None:
    (found,) = shop.fit(shop.request("uniform", size_bytes=2000))
    assert isinstance(found, Infeasible)
    least = found.least["size_bytes"]
    assert least > 2000
    assert f"uniform reaches no less than {least / 1000:.1f} kB ({least / 2000 - 1:.0%} more)" in str(found)
    (met,) = shop.fit(shop.request("uniform", size_bytes=least))
    assert isinstance(met, Fitted)


def test_an_unmeetable_wish_spares_the_others(shop: Shop) -> None:
    beyond, fine = shop.fit(shop.request("uniform", macs=1), shop.request("uniform", macs=shop.profile.macs))
    assert isinstance(beyond, Infeasible)
    assert beyond.least["macs"] == 10_600
    assert isinstance(fine, Fitted)


def test_reach_is_told_without_measuring(shop: Shop, every: list[tuple[Plan, float]]) -> None:
    def reach(request: Request) -> Plan | str:
        return shop.fitter.reachable(request.method, request.target)

    least = min(took for _, took in every)
    plan = reach(shop.request("uniform", ms=1.01 * least))
    assert isinstance(plan, Plan)
    assert "predicted to take, with these knobs, at least" in str(reach(shop.request("uniform", ms=0.99 * least)))
    assert "predicted to take, with these knobs, at least" in str(
        reach(shop.request("manidp", ms=0.99 * shop.teacher_ms))
    )
    assert isinstance(reach(shop.request("uniform", macs=shop.profile.macs)), Plan)
    assert "reaches no less than" in str(reach(shop.request("uniform", macs=1)))
    fewest = Budget("b", macs=10_600, channels=4)
    told = shop.fitter.least_latency("uniform", fewest, ["edge"])
    assert told == {"edge": pytest.approx(least)}


def test_on_a_real_device_the_measured_student_meets_the_limit(shop: Shop) -> None:
    """Twice the teacher's own time is met whatever else runs here; a thousandth of it is not."""
    cluster = InlineCluster(shop.workload.worker_inputs())
    stopwatch = Stopwatch({"here": schema.DeviceSpec(channels=4)}, Path(), shop.workload, cluster, quiet)
    teacher_ms = stopwatch.teacher()["here"]["p50"]

    def request(limit: float) -> Request:
        return Request(
            "uniform", Target("b", Limits({latency_on("here"): limit}), "here", channels=4), defaults(named("uniform"))
        )

    easy, hard = Fitter(shop.planner, stopwatch, shop.workload.teacher).fit(
        [request(2 * teacher_ms), request(teacher_ms / 1000)]
    )
    assert isinstance(easy, Fitted)
    assert easy.rounds == 1
    assert easy.plan.macs == shop.profile.macs
    assert easy.timings["here"].latency_ms["p50"] <= 2 * teacher_ms
    assert isinstance(hard, Infeasible)
    assert "uniform takes at least" in str(hard)
    assert hard.least["latency_ms/here"] > teacher_ms / 1000


Latency = Callable[[int], float]


def closed_in(took: Latency, *, top: int, aim: float) -> tuple[int | None, int]:
    """The largest ask whose plan is not over `aim`, as the bracket finds it, and how many plans that took."""
    bracket = Bracket.below(top, top, aim)
    while (macs := bracket.next()) is not None:
        bracket.points.append(Point(macs, Plan("uniform", macs, 0, {}, 0.0), took(macs)))
    best = bracket.best()
    return best.asked if best else None, len(bracket.points)


@given(st.floats(0.0, 1.5), st.floats(0.3, 3.0), st.floats(0.0, 0.9))
def test_the_bracket_ends_at_the_largest_ask_that_fits(aim: float, power: float, intercept: float) -> None:
    top = 40_000_000

    def took(macs: int) -> float:
        return intercept + (1 - intercept) * (macs / top) ** power

    asks = Bracket.below(top, top, 1.0).asks
    found, plans = closed_in(took, top=top, aim=aim)
    fitting = bisect_right([took(ask) for ask in asks], aim)
    assert found == (asks[fitting - 1] if fitting else None)
    assert plans <= 24


def test_the_bracket_goes_no_lower_than_a_method_can() -> None:
    bracket = Bracket.below(1000, 1000, 1.0)
    bracket.points.append(Point(1000, Plan("uniform", 1000, 0, {}, 0.0), predicted=10.0))
    bracket.refuse(950, least=400)
    assert bracket.asks == [1000]
    bracket = Bracket.below(1000, 1000, 1.0)
    bracket.points.append(Point(1000, Plan("uniform", 1000, 0, {}, 0.0), predicted=10.0))
    bracket.refuse(200, least=400)
    assert bracket.asks[0] == 400
    assert bracket.asks[1] > 400

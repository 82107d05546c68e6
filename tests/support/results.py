"""A finished search as plain data, with figures such as a search of resnet8 on digits ends with."""

from collections.abc import Mapping
from typing import Any

from search.frontier import winner
from search.limits import Limits
from search.results import BudgetResult, Cost, SearchResult
from search.trials import Candidate, Latency, Stop, Teacher, Timing, Top1

DEVICES = {
    "cpu-1": {"runtime": "onnxruntime", "threads": 1, "batch": 1, "host": "bench-3", "is_predicted": False}
    | {"processor": "x86_64, 16 cores"},
    "nano": Limits(
        {"runtime": "profile", "threads": 1, "batch": 1, "host": None, "processor": None, "is_predicted": True}
    ),
}


def times(cpu: float, nano: float) -> Latency:
    """Latency with these medians in milliseconds on the two devices."""
    return {
        "cpu-1": {"min": 0.96 * cpu, "p50": cpu, "p95": 1.09 * cpu},
        "nano": {"min": nano, "p50": nano, "p95": nano},
    }


TEACHER = Teacher(0.972, 0.966, 12_500_000, 78_042, 317_400, times(0.412, 3.1))
LIMITS: dict[str, Limits] = {
    "half": Limits({"macs": 6_250_000}),
    "tiny": Limits({"macs": 3_125_000, "params": 31_216}),
    "edge": Limits({"latency_ms/cpu-1": 0.2472, "macs": 6_250_000, "top1_drop": 0.02}),
    "nano": Limits({"latency_ms/nano": 1.24, "size_bytes": 200_000}),
    "dust": Limits({"macs": 1000, "top1_drop": 0.005}),
}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a candidate, its timings, top-1 and stop made of flat ones."""
    flat = dict(values)
    latency, beside, noise = (flat.pop(name, {}) for name in ("latency_ms", "teacher_latency_ms", "noise"))
    timings = {one: Timing(times, beside.get(one, {}), noise.get(one)) for one, times in latency.items()}
    validation, surgery, bn, drop = (flat.pop(f"top1_{name}", None) for name in ("validation", "surgery", "bn", "drop"))
    top1 = None if validation is None else Top1(validation, surgery, bn, drop, flat.pop("hits", None))
    return flat | {"timings": timings, "top1": top1}


def trial(number: int, budget: str, method: str, share: float, top1: float, **values: Any) -> Candidate:
    """A complete trial that costs `share` of the teacher and ends at `top1`."""
    known: dict[str, Any] = {
        "knobs": {"recovery.learning_rate": 0.05, "recovery.distill": 0.5},
        "plan": {
            "method": method,
            "choices": {"groups": [["stem", 16, 16], ["stage1.conv", round(32 * share), 32], ["stage2.conv", 24, 64]]},
            "notes": [],
        },
        "macs": round(share * TEACHER.macs),
        "params": round(0.9 * share * TEACHER.params),
        "size_bytes": round(0.92 * share * TEACHER.size_bytes),
        "latency_ms": times(0.412 * (0.15 + 0.8 * share), 3.1 * (0.05 + 0.9 * share)),
        "teacher_latency_ms": times(0.43, 3.1),
        "top1_surgery": top1 - 0.31,
        "top1_bn": top1 - 0.08,
        "top1_validation": top1,
        "top1_drop": TEACHER.top1_validation - top1,
        "seconds": 11.2 + share,
        "device_s": 12.5 + share,
        "ended": 1_700_000_000.0 + 10 * number,
    }
    return Candidate(
        f"{budget}-{number:02d}-{method}", number, budget, method, state="complete", **nested(known | values)
    )


def stopped(number: int, budget: str, method: str, share: float, top1: float, step: int) -> Candidate:
    """A trial that was given up at `step` with this top-1."""
    return Candidate(
        f"{budget}-{number:02d}-{method}",
        number,
        budget,
        method,
        {"recovery.learning_rate": 0.19, "recovery.distill": 0.1},
        "stopped",
        macs=round(share * TEACHER.macs),
        params=round(0.9 * share * TEACHER.params),
        size_bytes=round(0.92 * share * TEACHER.size_bytes),
        timings=nested({"latency_ms": times(0.412 * (0.15 + 0.8 * share), 3.1 * (0.05 + 0.9 * share))})["timings"],
        stop=Stop(step, top1),
        device_s=3.4,
        ended=1_700_000_000.0 + 10 * number + 5,
    )


def search() -> SearchResult:
    """Five budgets: several limits at once, a predicted device, trials stopped, reused and failed, one out of reach."""
    unreachable = "budget 'dust' allows 1,000 MACs, but ITPruner needs at least 911,362; raise it or try practise"
    found = [
        trial(0, "half", "itpruner", 0.498, 0.951, knobs={"beta_rel": 0.731, "recovery.learning_rate": 0.0512}),
        trial(1, "half", "manidp", 0.71, 0.962, macs_expected=6_190_000),
        trial(2, "half", "practise", 0.485, 0.944),
        trial(3, "half", "practise+alds", 0.49, 0.957, noise={"cpu-1": 0.18}),
        stopped(4, "half", "uniform", 0.49, 0.688, 120),
        trial(5, "half", "itpruner", 0.499, 0.953, knobs={"beta_rel": 1.0, "recovery.learning_rate": 0.031}),
        trial(0, "tiny", "itpruner", 0.246, 0.921),
        trial(1, "tiny", "alds", 0.249, 0.929),
        stopped(2, "tiny", "practise", 0.24, 0.544, 60),
        trial(3, "tiny", "uniform", 0.22, 0.897),
        Candidate("tiny-04-alds", 4, "tiny", "alds", {}, "failed", device_s=2.0, error="ScoreError: 'conv1' has a NaN"),
        trial(0, "edge", "itpruner", 0.46, 0.949, noise={"cpu-1": 0.12}),
        trial(1, "edge", "practise+alds", 0.44, 0.954),
        trial(2, "edge", "practise", 0.485, 0.944, same_as="half-02-practise", device_s=0.0),
        trial(0, "nano", "alds", 0.36, 0.941),
        trial(1, "nano", "itpruner", 0.379, 0.937),
        Candidate("dust-00-itpruner", 0, "dust", "itpruner", {}, "infeasible", error=unreachable),
    ]
    budgets = []
    for name, limits in LIMITS.items():
        best = winner(found, limits)
        if best is None or best.top1_validation is None:
            budgets.append(BudgetResult(name, limits))
        else:
            budgets.append(
                BudgetResult(name, limits, best, f"models:/digits@{name}", name, best.top1_validation - 0.006)
            )
    spent = sum(one.device_s for one in found)
    cost = Cost(wall_s=104.0, device_s=spent, trials=len(found), stopped=2)
    importance = {
        "half": Limits(
            {"method": 0.55, "recovery.learning_rate": 0.27, "itpruner.beta_rel": 0.13, "recovery.distill": 0.05}
        ),
        "tiny": Limits({"method": 0.41, "alds.measure": 0.002, "recovery.distill": 0.588}),
    }
    spec = "name: digits\nmodel: {source: zoo, name: resnet8}\n"
    return SearchResult("digits", TEACHER, budgets, found, cost, "2026-03-04T05:06:07+00:00", spec, DEVICES, importance)

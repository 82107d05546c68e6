"""Costs as a person reads them: a model's beside the teacher's and its budget's limits, and the effort of trials.

The report and the terminal show the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from search.limits import TOP1_DROP, device_of, latencies_in, latency_on
from search.results import BudgetResult, SearchResult
from search.trials import Candidate, Times
from search.units import TOP1, Scale, count, milliseconds, size

NAMES = {
    "macs": "MACs",
    "macs_expected": "expected MACs",
    "params": "params",
    "size_bytes": "size",
}


@dataclass(frozen=True)
class CostRow:
    """One cost of a winner beside the teacher's own and the limit; None stands for not measured and for no limit.

    `noise` is the share by which the median lay above the fastest call, given only if that was too far. A latency has
    the `times` it is the median of, and its teacher's.
    """

    cost: str
    name: str
    value: float | None = None
    teacher: float | None = None
    limit: float | None = None
    noise: float | None = None
    times: Times | None = None
    teacher_times: Times | None = None

    @property
    def spread(self) -> str | None:
        """The span of the calls that a measured latency is the median of."""
        return spread(self.times)

    @property
    def is_as_the_teacher(self) -> bool:
        """Whether a latency is neither above nor below the teacher's: they differ by no more than their spread."""
        if self.times is None or self.teacher_times is None:
            return False
        return not are_apart(self.times, self.teacher_times)

    @property
    def share(self) -> float | None:
        """The value as a share of the teacher's."""
        return self._share_of_teacher(self.value)

    @property
    def limit_share(self) -> float | None:
        """The limit as a share of the teacher's."""
        return self._share_of_teacher(self.limit)

    @property
    def is_inside(self) -> bool:
        """Whether the value was measured and meets the limit, if there is one."""
        return self.value is not None and (self.limit is None or self.value <= self.limit)

    def _share_of_teacher(self, value: float | None) -> float | None:
        return value / self.teacher if value is not None and self.teacher else None


@dataclass(frozen=True)
class Effort:
    """The effort of some trials: their number, how many ended in each way, and seconds of devices.

    `reused` trials had the plan and the recipe of another one, and trained nothing. `stopped_s` went to trials that
    were stopped early.
    """

    trials: int
    complete: int
    stopped: int
    infeasible: int
    failed: int
    reused: int
    device_s: float
    stopped_s: float


def effort(candidates: Sequence[Candidate]) -> Effort:
    """Sum up the effort of these candidates' trials."""
    states = [candidate.state for candidate in candidates]
    return Effort(
        trials=len(states),
        complete=states.count("complete"),
        stopped=states.count("stopped"),
        infeasible=states.count("infeasible"),
        failed=states.count("failed"),
        reused=sum(candidate.same_as is not None for candidate in candidates),
        device_s=sum(candidate.device_s for candidate in candidates),
        stopped_s=sum(candidate.device_s for candidate in candidates if candidate.state == "stopped"),
    )


def noise_note(result: SearchResult) -> str:
    """Say, in a sentence, of how many candidates the noise leaves open which is the best; nothing where it is none."""
    open_ones = [budget for budget in result.budgets if budget.equal > 1]
    if not open_ones:
        return ""
    counts = ", ".join(f"{budget.name} {budget.equal} of {budget.fitting}" for budget in open_ones)
    wins = "the one that leaves most room in its limits wins" if result.rule == "simplest" else "the best as it is wins"
    return f"Within one standard error of the best {result.metric.name}: {counts} that fit; of these {wins}."


def name(cost: str, devices: Mapping[str, Mapping[str, Any]], metric: Scale = TOP1) -> str:
    """The name of a cost, which says of a predicted latency that it is one, and of a loss what is lost.

    >>> name("macs", {}), name("latency_ms/nano", {"nano": {"is_predicted": True}}), name("top1_drop", {})
    ('MACs', 'predicted latency on nano', 'top-1 lost')
    """
    if cost == TOP1_DROP:
        return f"{metric.name} lost"
    if (device := device_of(cost)) is None:
        return NAMES[cost]
    return f"{'predicted ' if is_predicted(device, devices) else ''}latency on {device}"


def is_predicted(device: str, devices: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a device's latency was computed from a roofline instead of measured."""
    return bool(devices.get(device, {}).get("is_predicted", False))


def shown(cost: str, value: float | None, metric: Scale = TOP1) -> str:
    """A cost's value in its unit.

    >>> [shown(*one) for one in (("macs", 6_100_000), ("size_bytes", 620_000), ("latency_ms/cpu-1", 1.2))]
    ['6.10M', '620.0 kB', '1.20 ms']
    """
    if value is None:
        return "—"
    if device_of(cost) is not None:
        return milliseconds(value)
    return {"size_bytes": size, TOP1_DROP: metric.lost}.get(cost, count)(value)


def spread(times: Times | None) -> str | None:
    """The span from the fastest call to the 95th percentile; None for a prediction, which has none.

    >>> spread({"min": 0.9, "p50": 1.0, "p95": 1.254}), spread({"min": 1.0, "p50": 1.0, "p95": 1.0})
    ('0.900 to 1.25 ms', None)
    """
    if times is None or times["min"] == times["p95"]:
        return None
    return f"{milliseconds(times['min']).removesuffix(' ms')} to {milliseconds(times['p95'])}"


def are_apart(one: Times, other: Times) -> bool:
    """Whether two latencies differ by more than their spread, where each median lies among the calls of the other.

    >>> are_apart({"min": 0.9, "p50": 1.0, "p95": 1.2}, {"min": 0.95, "p50": 1.1, "p95": 1.3})
    False
    """
    return not all(a["min"] <= b["p50"] <= a["p95"] for a, b in ((one, other), (other, one)))


def rows(result: SearchResult, budget: BudgetResult) -> dict[str, CostRow]:
    """Every cost that a table of winners has, by name; a budget without a winner has no values in them."""
    return {cost: _cost_row(result, budget, cost) for cost in columns(result)}


def columns(result: SearchResult) -> list[str]:
    """The costs of winners: counted ones, size, the latency on each device, and the loss of top-1.

    Expected MACs are among them only if a winner is gated or a budget limits them.
    """
    limited = {cost: None for budget in result.budgets for cost in budget.limits}
    is_gated = any(budget.winner and budget.winner.macs_expected is not None for budget in result.budgets)
    expected = ["macs_expected"] if is_gated or "macs_expected" in limited else []
    timed = dict.fromkeys([*latencies(result), *latencies_in(limited)])
    return ["macs", *expected, "params", "size_bytes", *timed, "top1_drop"]


def latencies(result: SearchResult) -> list[str]:
    """The latencies that were measured or predicted, as names of costs."""
    found = [result.teacher.latency_ms, *(candidate.latency_ms for candidate in result.models())]
    return list(dict.fromkeys(latency_on(device) for latency_ms in found for device in latency_ms))


def _cost_row(result: SearchResult, budget: BudgetResult, cost: str) -> CostRow:
    best = budget.winner
    teacher, limit = of_teacher(result, cost, best), budget.limits.get(cost)
    row = CostRow(cost, name(cost, result.devices, result.metric), teacher=teacher, limit=limit)
    if best is None:
        return row
    value = _top1_drop(result, best) if cost == TOP1_DROP else best.costs.get(cost)
    timing = best.timings.get(device := device_of(cost) or "")
    if timing is None:
        return replace(row, value=value)
    beside = result.teacher.latency_ms.get(device, timing.teacher_latency_ms or None)
    return replace(row, value=value, noise=timing.noise, times=timing.latency_ms, teacher_times=beside)


def of_teacher(result: SearchResult, cost: str, best: Candidate | None = None) -> float | None:
    """The teacher's cost; a search without its reference latency has the one that was measured beside `best`."""
    if cost == TOP1_DROP:
        return None
    timing = None if best is None else best.timings.get(device_of(cost) or "")
    beside = None if timing is None else timing.teacher_latency_ms.get("p50")
    return result.teacher.costs.get(cost, beside)


def _top1_drop(result: SearchResult, best: Candidate) -> float:
    """The winner's loss of top-1, also if the search did not record it."""
    assert best.top1 is not None
    return result.teacher.top1_validation - best.top1.validation if best.top1.drop is None else best.top1.drop

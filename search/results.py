"""The result of a search as plain data: its budgets, candidates and costs, and how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from search.frontier import Rule, frontier, hypervolume, non_dominated, plain_latency, point_of, volume
from search.limits import AXES, Limits, device_of, latency_on
from search.trials import Candidate, Teacher
from search.units import TOP1, Scale


@dataclass(frozen=True)
class BudgetResult:
    """One budget's limits in absolute units, and the candidate that won (None: nothing fits).

    `fitting` candidates meet its limits; of these `equal` are the best but for noise, the best included. `model_uri` is
    what `mlflow.pytorch.load_model` takes, `models:/NAME@ALIAS`; it and `top1_test` exist only where a
    winner is registered. Where a better model of another search holds the alias, it is None and the URI names the
    version.
    """

    name: str
    limits: Limits
    winner: Candidate | None = None
    model_uri: str | None = None
    alias: str | None = None
    top1_test: float | None = None
    fitting: int = 0
    equal: int = 0

    def to_json(self) -> dict[str, Any]:
        """The contract's `{name, limits, winner}`; a limit on latency is `latency_ms: {device: ms}`, as in a winner."""
        found = None if self.winner is None else self._winner_json(self.winner)
        limits: dict[str, Any] = {cost: limit for cost, limit in self.limits.items() if device_of(cost) is None}
        latency = {device: limit for cost, limit in self.limits.items() if (device := device_of(cost)) is not None}
        return {"name": self.name, "limits": limits | ({"latency_ms": latency} if latency else {}), "winner": found}

    def _winner_json(self, winner: Candidate) -> dict[str, Any]:
        return {
            **_pick(winner, "run_id"),
            **_pick(self, "model_uri", "alias"),
            **_pick(winner, "method", "top1_validation", "top1_error"),
            **_pick(self, "top1_test"),
            **_pick(winner, "macs", "macs_expected", "params", "size_bytes"),
            "latency_ms": plain_latency(winner.latency_ms),
        }


@dataclass(frozen=True)
class Cost:
    """The cost of a search: wall seconds, seconds summed over devices, trials run and stopped early.

    `device_s` are those of trials, of scoring and of measuring; the last two are given beside it.
    """

    wall_s: float
    device_s: float
    trials: int
    stopped: int
    scoring_s: float = 0.0
    measuring_s: float = 0.0


@dataclass(frozen=True)
class SearchResult:
    """A finished search. `started` is an ISO 8601 time, `spec` the text of the file that asked for it.

    `devices` say for each device its `runtime`, `threads`, `batch`, `host` and whether its latency `is_predicted`;
    `importance` is per budget how much each knob decided of top-1, as shares; `unreachable` is per budget why methods
    were known to be unable to meet it before any training. Every top-1 here is a share on the scale of `metric`. By
    `rule` each budget's winner was chosen.
    """

    name: str
    teacher: Teacher
    budgets: Sequence[BudgetResult]
    candidates: Sequence[Candidate]
    cost: Cost
    started: str
    spec: str
    devices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unreachable: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    metric: Scale = TOP1
    rule: Rule = "best"

    @property
    def axes(self) -> tuple[str, ...]:
        """The costs a frontier is drawn over here: counted ones, and the latency on each device that timed a candidate.

        Expected MACs are one where a model is gated or a budget limits them.
        """
        is_gated = any(candidate.macs_expected is not None for candidate in self.candidates)
        is_asked = any("macs_expected" in budget.limits for budget in self.budgets)
        counted = AXES if is_gated or is_asked else tuple(axis for axis in AXES if axis != "macs_expected")
        timed = {device for candidate in self.candidates for device in candidate.timings}
        return counted + tuple(latency_on(device) for device in self.teacher.latency_ms if device in timed)

    def models(self) -> list[Candidate]:
        """The candidates that were measured to the end."""
        return [candidate for candidate in self.candidates if candidate.is_model]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `paredown frontier --json` prints; other programs read it, so the keys are fixed.

        The scale of a metric of the user's own is there too; its values stay shares.
        """
        return {
            "name": self.name,
            "teacher": asdict(self.teacher),
            "budgets": [budget.to_json() for budget in self.budgets],
            "frontier": {axis: frontier(self.teacher, self.candidates, axis) for axis in self.axes},
            "hypervolume": {axis: volume(self.teacher, self.candidates, axis) for axis in self.axes},
            "cost": _pick(self.cost, "wall_s", "device_s", "trials", "stopped"),
            **self.metric.described,
        }


@dataclass(frozen=True)
class Moment:
    """The state of a search when one more trial ended, after `device_s` seconds of devices, scoring included.

    `hypervolume` is over MACs; `best` holds the best validation top-1 within each budget's limits, once there is one.
    """

    device_s: float
    hypervolume: float
    best: Mapping[str, float]


def history(result: SearchResult) -> list[Moment]:
    """Return one moment per trial, in the order they ended."""
    moments: list[Moment] = []
    device_s = result.cost.scoring_s + result.cost.measuring_s
    points, best = list[tuple[float, float]](), dict[str, float]()
    for found in sorted(result.candidates, key=lambda one: (one.ended, one.trial)):
        device_s += found.device_s
        if found.is_model:
            point = point_of(found, "macs")
            top1 = point[1]
            points = [*points, point]
            points = [points[index] for index in non_dominated(points)]  # the others add nothing, now or later
            met = [budget.name for budget in result.budgets if found.fits(budget.limits)]
            best = best | {name: max(top1, best.get(name, top1)) for name in met}
        moments.append(Moment(device_s, hypervolume(points, reference_cost=result.teacher.macs), best))
    return moments


def _pick(source: object, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


@dataclass(frozen=True)
class MethodReach:
    """The least cost one method brings this network to, its knobs at their defaults, or why it cannot handle it.

    The least MACs of a gated method are expected ones. Latency, `latency_ms/DEVICE` for every device where a budget
    limits it, is predicted for the plan of the least MACs.
    """

    method: str
    refusal: str | None
    least: Mapping[str, float]


@dataclass(frozen=True)
class BudgetReach:
    """One budget's limits, and per method None or why no plan of it fits.

    Nothing is trained, so a limit on what is lost of top-1 rules out no method; latency is predicted, and a method that
    is only a little over it is not ruled out either. `kept` is the top-1 of the student of each method's first plan,
    where a search trains none either.
    """

    budget: str
    limits: Limits
    reasons: Mapping[str, str | None]
    kept: Mapping[str, float] | None = None

    @property
    def is_reachable(self) -> bool:
        """Whether some method fits."""
        return None in self.reasons.values()


@dataclass(frozen=True)
class LayerReach:
    """One layer, and per method that can handle the network None or why it leaves the layer as it is."""

    layer: str
    shape: tuple[int, ...]
    macs: int
    reasons: Mapping[str, str | None]


@dataclass(frozen=True)
class Preflight:
    """The answer of `paredown check`. `minutes` is an estimate for as many workers as this machine has cores.

    `explained` has a row per layer, if it was asked for. `teacher_top1` is there to compare with what students keep, if
    that is known; both are shares on the scale of `metric`.
    """

    name: str
    macs: int
    params: int
    layers: int
    methods: tuple[MethodReach, ...]
    budgets: tuple[BudgetReach, ...]
    minutes: float
    explained: tuple[LayerReach, ...] | None = None
    teacher_top1: float | None = None
    metric: Scale = TOP1

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values, without what is not known."""
        budgets = [_known(asdict(budget)) | {"is_reachable": budget.is_reachable} for budget in self.budgets]
        found = _known(asdict(self)) | {"budgets": budgets}
        return {key: value for key, value in found.items() if key != "metric"} | self.metric.described


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}

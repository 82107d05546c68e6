"""The answers of `paredown check` that take more than a table of yes and no."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest
from torch import Tensor

from cluster import Cluster, Event, InlineCluster, Item, always
from methods import METHODS
from methods.base import Shard
from methods.names import NAMES
from methods.network import Profile
from methods.protocol import Method
from search.driver.preflight import preflight
from search.spec import reading
from search.workload import Workload

SPEC = """
name: digits
model: {source: zoo, name: resnet14, weights: train}
data: {source: digits, calibration: 64}
methods: [manidp, practise, [practise, alds]]
budgets:
  - {name: half, macs: 50%}
  - {name: light, macs_expected: 50%}
  - {name: tiny, macs: 10%}
recovery: {steps: 2}
"""


def inline(made: Workload) -> Cluster:
    return InlineCluster(made.worker_inputs())


def test_what_gates_and_chains_can_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.driver.preflight.TIMED_STEPS", 1)
    found = preflight(reading.parse(SPEC, folder=tmp_path), inline, lambda *_: None, explain=True)
    half, light, tiny = found.budgets

    assert half.is_reachable
    assert half.reasons["practise"] is None
    gated = half.reasons["manidp"]
    assert gated is not None
    assert "limits MACs, which manidp meets on average only" in gated
    assert f"{found.macs // 2:,} are expected" in gated

    assert light.limits == {"macs_expected": found.macs // 2}
    assert set(light.reasons.values()) == {None}

    assert "blocks dropped; raise it or try a chain such as [practise, alds]" in str(tiny.reasons["practise"])
    assert tiny.reasons["practise+alds"] is None
    least = {one.method: one.least["macs"] for one in found.methods}
    assert least["practise+alds"] < least["practise"] < found.macs // 2

    assert found.explained is not None
    reasons = {one.layer: one.reasons for one in found.explained}
    assert len(reasons) == found.layers
    assert {tuple(one) for one in reasons.values()} == {("manidp", "practise", "alds", "uniform")}
    assert reasons["0"] | {"practise": ""} == {
        "manidp": "it is the stem", "practise": "", "alds": None, "uniform": None,
    }  # fmt: skip
    assert found.explained[-1].reasons["manidp"] == "it is no convolution"
    assert [one.layer for one in found.explained if one.reasons["practise"] is None][:2] == ["3.0.conv1", "3.0.conv2"]


FRAGILE = """
import torch
from torch import nn


class Damped(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            self.branch.weight.copy_(-0.999 * torch.eye(8)[:, :, None, None])
            self.branch.bias.zero_()

    def forward(self, x):
        return x + self.branch(x)


class Exponential(nn.Module):
    def forward(self, x):
        return torch.exp(300 * x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), Damped(), Exponential(), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
"""


def test_a_chain_that_cannot_be_planned_is_told_and_spares_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.driver.preflight.TIMED_STEPS", 1)
    (tmp_path / "fragile.py").write_text(FRAGILE)
    model = "{source: factory, name: './fragile.py:network'}"
    text = SPEC.replace("{source: zoo, name: resnet14, weights: train}", model).replace("manidp, practise, ", "alds, ")
    found = preflight(reading.parse(text, folder=tmp_path), inline, lambda *_: None)
    assert found.budgets[0].reasons["alds"] is None
    told = found.budgets[0].reasons["practise+alds"]
    assert told is not None
    assert "infinity" in told
    assert {one.method: one.refusal for one in found.methods}["practise+alds"] is not None


VERBS = ("accepts", "shards", "score", "merge", "allocate")


class Broken:
    """The baseline, named after the one of its verbs that raises an error of no kind of ours."""

    is_last = False
    knobs = METHODS["uniform"].knobs

    def __init__(self, verb: str) -> None:
        self.name = verb

    def __getattr__(self, verb: str) -> Any:
        return self._raise if verb == self.name else getattr(METHODS["uniform"], verb)

    def _raise(self, *_: object) -> None:
        raise ZeroDivisionError(f"{self.name} divides by zero")

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """Pieces of its own, or the baseline would score them."""
        if self.name == "shards":
            self._raise()
        return [tuple(shard) for shard in METHODS["uniform"].shards(profile, calibration)]


def test_a_method_that_crashes_is_refused_and_spares_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.driver.preflight.TIMED_STEPS", 1)
    for verb in VERBS:
        monkeypatch.setitem(METHODS, verb, cast(Method, Broken(verb)))
        monkeypatch.setitem(NAMES, verb, False)
    text = SPEC.replace("manidp, practise, [practise, alds]", f"itpruner, {', '.join(VERBS)}, [score, alds]")
    found = preflight(reading.parse(text.replace("resnet14", "resnet8"), folder=tmp_path), inline, lambda *_: None)
    refusals = {one.method: one.refusal for one in found.methods}
    for verb in VERBS:
        assert f"ZeroDivisionError: {verb} divides by zero" in str(refusals[verb])
    assert refusals["score+alds"] == refusals["score"]
    assert refusals["itpruner"] is refusals["uniform"] is None
    assert found.budgets[0].reasons["itpruner"] is None
    assert found.budgets[0].reasons["uniform"] is None


@dataclass
class Deviceless:
    """A cluster on which no device may be asked for anything."""

    inner: Cluster

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        return self.inner.run(function, items, go_on)

    def alone(
        self, function: Callable[..., Any], items: Iterable[Item], resources: Mapping[str, float] = MappingProxyType({})
    ) -> Iterator[Event]:
        raise AssertionError(f"{function.__name__} was asked of a device")

    def close(self) -> None:
        self.inner.close()


DEVICES = """
name: digits
model: {source: zoo, name: resnet8, weights: train}
data: {source: digits, calibration: 64}
methods: [itpruner, practise, manidp]
devices: {cpu-1: {}, edge: {runtime: profile, file: edge.yaml, channels: 4}}
budgets:
  - {name: half, macs: 50%, device: cpu-1}
  - {name: light, size_bytes: 1k, device: cpu-1}
recovery: {steps: 2}
"""
QUICK = """
  - {name: quick, latency: 60%, device: edge, macs: 90%, top1_drop: 2%}
  - {name: instant, latency: 1us, device: edge}
"""


def test_no_device_is_asked_where_no_budget_limits_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.driver.preflight.TIMED_STEPS", 1)
    (tmp_path / "edge.yaml").write_text("{macs_per_s: 2e9, bytes_per_s: 1e9, overhead_us: 20}")
    wanted = reading.parse(DEVICES, folder=tmp_path)
    found = preflight(wanted, lambda made: Deviceless(inline(made)), lambda *_: None)
    half, light = found.budgets
    assert half.reasons["itpruner"] is None
    assert light.limits == {"size_bytes": 1000}
    assert "uniform reaches no less than" in str(light.reasons["uniform"])
    assert all(one.least.keys() == {"macs", "params"} for one in found.methods)
    assert 0 < found.minutes < 60


def test_least_latency_and_what_misses_it_by_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.driver.preflight.TIMED_STEPS", 1)
    (tmp_path / "edge.yaml").write_text("{macs_per_s: 2e9, bytes_per_s: 1e9, overhead_us: 20}")
    text = DEVICES.replace("recovery", QUICK.strip("\n") + "\nrecovery").replace("cpu-1: {}, ", "")
    wanted = reading.parse(text.replace(", device: cpu-1", ""), folder=tmp_path)
    found = preflight(wanted, lambda made: Deviceless(inline(made)), lambda *_: None)
    quick, instant = found.budgets[2:]
    limit = quick.limits["latency_ms/edge"]
    assert quick.limits.keys() == {"macs", "latency_ms/edge", "top1_drop"}
    assert quick.is_reachable
    assert quick.reasons["itpruner"] is quick.reasons["uniform"] is None
    assert not instant.is_reachable
    least = {one.method: one.least["latency_ms/edge"] for one in found.methods}
    assert least["itpruner"] < limit < least["manidp"]
    assert "manidp is predicted to take, with these knobs, at least" in str(instant.reasons["manidp"])
    assert f"({least['practise'] / 0.001 - 1:.0%} more)" in str(instant.reasons["practise"])

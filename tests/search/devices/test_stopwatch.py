"""Times of students: layers recorded where torch runs them, a table of their times, and readings that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cluster import (
    Cluster,
    Done,
    Event,
    InlineCluster,
    Item,
    LayerShape,
    RayCluster,
    Reading,
    Roofline,
    always,
    layer_times,
    measure,
    predicted_ms,
)
from methods import named
from methods.base import Budget, Plan
from methods.network import count_macs, profile
from search.base import SpecError
from search.devices.device import LatencyError
from search.devices.layer_table import BATCH, LayerTable, layers_of
from search.devices.stopwatch import Stopwatch
from search.spec import reading, schema
from search.workload import Workload, loading, zoo
from search.workload.teacher import save_weights
from tests.support.networks import NETWORKS

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

SPEC = """
name: digits
model: {source: zoo, name: resnet8, weights: teacher.safetensors}
data: {source: digits, calibration: 64}
methods: [alds]
devices: {cpu-1: {}, edge: {runtime: profile, file: edge.yaml, batch: 2}}
budgets: [{name: half, macs: 50%}]
"""
EDGE = Roofline(macs_per_s=2e9, bytes_per_s=1e9, overhead_us=20.0)


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """A report nobody reads."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("spec")
    save_weights(zoo.build("resnet8", 1, 10, 0), place / "teacher.safetensors")
    (place / "edge.yaml").write_text("{macs_per_s: 2e9, bytes_per_s: 1e9, overhead_us: 20}")
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Workload:
    return loading.load(reading.parse(SPEC, folder=folder), quiet)


@dataclass
class Counted:
    """A cluster that records the calls it gets, and may call every reading noisy."""

    inner: Cluster
    is_noisy: bool = False
    calls: list[str] = field(default_factory=list)

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        return self.inner.run(function, self._count(function, items), go_on)

    def alone(
        self, function: Callable[..., Any], items: Iterable[Item], resources: Mapping[str, float] = MappingProxyType({})
    ) -> Iterator[Event]:
        for event in self.inner.alone(function, self._count(function, items), resources):
            if self.is_noisy and isinstance(event, Done) and isinstance(event.value, Reading):
                event = replace(event, value=replace(event.value, noise=0.5, is_noisy=True))
            yield event

    def _count(self, function: Callable[..., Any], items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            self.calls.append(function.__name__)
            yield item

    def close(self) -> None:
        self.inner.close()


def stopwatch(
    loaded: Workload, folder: Path, cluster: Cluster, *devices: str, reference: Mapping[str, Any] | None = None
) -> Stopwatch:
    wanted = reading.parse(SPEC, folder=folder).devices
    return Stopwatch({name: wanted[name] for name in devices}, folder, loaded, cluster, quiet, reference=reference)


def half(loaded: Workload, divisor: int = 2) -> Plan:
    found = profile(loaded.teacher, loaded.example)
    method = named("uniform")
    return method.allocate({}, found, Budget("b", macs=found.macs // divisor), {"criterion": "l1"})


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_the_recorded_layers_hold_all_macs_of_the_network(build: Callable[[], nn.Module]) -> None:
    model = build()
    recorded = layers_of(model, IMAGES)
    assert sum(layer.macs for layer in recorded) == count_macs(model, IMAGES)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},)).module()
    assert layers_of(exported, IMAGES) == recorded


class Functional(nn.Module):
    """A strided, dilated convolution and a linear layer over rows, both without modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 5))
        self.matrix = nn.Parameter(torch.randn(7, 8))
        self.up = nn.ConvTranspose2d(8, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, stride=(2, 1), padding=(1, 4), dilation=(1, 2))
        return F.linear(self.up(x).flatten(2).transpose(1, 2), self.matrix)


def test_layers_without_a_module_are_recorded_too() -> None:
    conv = LayerShape("conv", 3, 8, (3, 5), (2, 1), (1, 4), (1, 2), 1, (16, 16))
    height, width = conv.out_hw
    rows = (height + 1) * (width + 1)
    assert layers_of(Functional(), IMAGES) == [conv, LayerShape("linear", 8, 7, in_hw=(rows, 1))]


def test_a_table_asks_once_for_each_layer_and_keeps_what_it_was_told(tmp_path: Path) -> None:
    asked: list[LayerShape] = []

    def cost(layers: list[LayerShape]) -> list[float]:
        assert len(layers) <= BATCH
        asked.extend(layers)
        return [float(layer.out_channels) for layer in layers]

    layers = [LayerShape("linear", 4, width) for width in range(1, 41)]
    path = tmp_path / "deep" / "layers.json"
    table = LayerTable(path, cost)
    assert table.ms(layers + layers) == 2 * sum(range(1, 41))
    assert len(asked) == 40
    assert LayerTable(path, cost).ms(layers[:3]) == 6.0
    assert len(asked) == 40
    other = LayerTable(path, cost)
    table.ms([LayerShape("linear", 4, 100)])
    assert other.ms([LayerShape("linear", 4, 50)]) == 50.0
    assert LayerTable(path, cost).ms([LayerShape("linear", 4, width) for width in (50, 100)]) == 150.0
    assert len(asked) == 42
    path.write_text("{half a file")
    assert LayerTable(path, cost).ms(layers[:1]) == 1.0
    assert len(asked) == 43


def test_a_device_that_is_not_there_is_arithmetic(loaded: Workload, folder: Path) -> None:
    cluster = Counted(InlineCluster(loaded.worker_inputs()))
    watch = stopwatch(loaded, folder, cluster, "edge")
    method, plan = named("uniform"), half(loaded)
    student = method.apply(loaded.teacher, plan)
    (found,) = watch.time([(method, plan)], ["edge"])
    teacher, expected = (predicted_ms(layers_of(one, loaded.example), EDGE, 2) for one in (loaded.teacher, student))
    assert found["edge"].latency_ms == {"min": expected, "p50": expected, "p95": expected}
    assert found["edge"].teacher_latency_ms["p50"] == watch.teacher()["edge"]["p50"] == teacher
    assert found["edge"].noise is None
    assert watch.predict(student, "edge") == expected < teacher
    assert watch.is_predicted("edge")
    assert watch.described()["edge"] == {
        "runtime": "profile", "threads": 1, "batch": 2, "host": None, "processor": None, "is_predicted": True,
    }  # fmt: skip
    assert cluster.calls == []
    assert watch.spent() == {"measurements": 0.0, "measuring_s": 0.0}


def test_a_wrong_roofline_is_the_specs_mistake(loaded: Workload, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "edge.yaml").write_text("{macs_per_s: fast}")
    with pytest.raises(SpecError, match=r"macs_per_s: 'fast' is no positive number"):
        Stopwatch({"edge": reading.parse(SPEC, folder=folder).devices["edge"]}, tmp_path, loaded, Counted(None), quiet)


def test_students_are_measured_beside_the_teacher_once(loaded: Workload, folder: Path) -> None:
    cluster = Counted(InlineCluster(loaded.worker_inputs()))
    reference = {"cpu-1": {"min": 1.0, "p50": 2.0, "p95": 3.0}}
    watch = stopwatch(loaded, folder, cluster, "cpu-1", reference=reference)
    students = [(named("uniform"), half(loaded, share)) for share in (1, 8)]
    whole, small = watch.time([*students, students[1]], ["cpu-1"])[:2]
    assert cluster.calls.count("measure") == 2
    assert cluster.calls.count("program") == 3
    for timing in (whole["cpu-1"], small["cpu-1"]):
        assert timing.latency_ms.keys() == {"min", "p50", "p95"}
        assert timing.latency_ms["min"] <= timing.latency_ms["p50"] <= timing.latency_ms["p95"]
    # The teacher's own shape beside the teacher: any other work here disturbs both.
    assert whole["cpu-1"].latency_ms["min"] == pytest.approx(
        2.0 * whole["cpu-1"].teacher_latency_ms["min"] / whole["cpu-1"].teacher_latency_ms["p50"], rel=0.5
    )
    assert small["cpu-1"].latency_ms["min"] < whole["cpu-1"].latency_ms["min"]
    spent = watch.spent()
    assert spent["measurements"] == 3  # the device was asked what it is
    assert spent["measuring_s"] > 0
    assert watch.spent() == {"measurements": 0.0, "measuring_s": 0.0}
    known = watch.described()["cpu-1"]
    assert known["host"]
    assert known["processor"]
    assert not known["is_predicted"]

    assert watch.time(students, ["cpu-1"]) == [whole, small]
    assert cluster.calls.count("measure") == 2
    again = stopwatch(loaded, folder, cluster, "cpu-1", reference=reference)
    assert again.time(students, ["cpu-1"]) == [whole, small]
    assert cluster.calls.count("measure") == 2
    assert cluster.calls.count("program") == 3


def test_times_are_scaled_to_what_the_teacher_took_when_the_search_began(loaded: Workload, folder: Path) -> None:
    student = (named("uniform"), half(loaded))
    cluster = Counted(InlineCluster(loaded.worker_inputs()))
    slow, slower = (
        stopwatch(loaded, folder, cluster, "cpu-1", reference={"cpu-1": {"min": ms, "p50": ms, "p95": ms}})
        for ms in (3.0, 6.0)
    )
    (first,) = slow.time([student], ["cpu-1"])
    (second,) = slower.time([student], ["cpu-1"])
    raw = first["cpu-1"].teacher_latency_ms
    if first["cpu-1"].noise is None:  # the same reading serves both; a noisy one is not shared
        assert second["cpu-1"].teacher_latency_ms == raw
        assert second["cpu-1"].latency_ms == {
            name: pytest.approx(2 * ms) for name, ms in first["cpu-1"].latency_ms.items()
        }
    share = first["cpu-1"].latency_ms["p50"] / 3.0
    assert 0 < share < 3
    assert slow.teacher()["cpu-1"]["p50"] == 3.0


def test_a_noisy_reading_is_kept_for_its_own_search_alone(loaded: Workload, folder: Path) -> None:
    student = (named("uniform"), half(loaded))
    cluster = Counted(InlineCluster(loaded.worker_inputs()), is_noisy=True)
    mine, yours = ({"cpu-1": {"min": ms, "p50": ms, "p95": ms}} for ms in (3.0, 4.0))
    (found,) = stopwatch(loaded, folder, cluster, "cpu-1", reference=mine).time([student], ["cpu-1"])
    assert found["cpu-1"].noise == 0.5
    (resumed,) = stopwatch(loaded, folder, cluster, "cpu-1", reference=mine).time([student], ["cpu-1"])
    assert resumed == found
    assert cluster.calls.count("measure") == 1
    stopwatch(loaded, folder, cluster, "cpu-1", reference=yours).time([student], ["cpu-1"])
    assert cluster.calls.count("measure") == 2


def test_a_prediction_is_the_sum_of_the_layers_times_the_teachers_error(loaded: Workload, folder: Path) -> None:
    cluster = Counted(InlineCluster(loaded.worker_inputs()))
    watch = stopwatch(loaded, folder, cluster, "cpu-1", reference={"cpu-1": {"min": 5.0, "p50": 5.0, "p95": 5.0}})
    assert watch.predict(loaded.teacher, "cpu-1") == pytest.approx(5.0)
    asked = cluster.calls.count("layer_times")
    assert asked == 1
    student = named("uniform").apply(loaded.teacher, half(loaded, 8))
    assert 0 < watch.predict(student, "cpu-1") < 5.0
    assert watch.predict(student, "cpu-1") == watch.predict(student, "cpu-1")
    assert cluster.calls.count("layer_times") == 2
    again = stopwatch(loaded, folder, cluster, "cpu-1", reference={"cpu-1": {"min": 5.0, "p50": 5.0, "p95": 5.0}})
    assert again.predict(student, "cpu-1") == watch.predict(student, "cpu-1")
    assert cluster.calls.count("layer_times") == 2
    assert {measure.__name__, layer_times.__name__} & set(cluster.calls) == {"layer_times"}


def test_a_device_of_its_own_threads_shares_no_figures(loaded: Workload, folder: Path) -> None:
    cluster = Counted(InlineCluster(loaded.worker_inputs()))
    flat = {"min": 5.0, "p50": 5.0, "p95": 5.0}
    devices = {
        "one": schema.DeviceSpec(),
        "two": schema.DeviceSpec(threads=2),
        "eager": schema.DeviceSpec(runtime="torch"),
    }
    watch = Stopwatch(devices, folder, loaded, cluster, quiet, reference=dict.fromkeys(devices, flat))
    (found,) = watch.time([(named("uniform"), half(loaded))], list(devices))
    assert found.keys() == devices.keys()
    assert cluster.calls.count("measure") == 3
    assert cluster.calls.count("program") == 4  # onnx serves two devices


class Choosy(nn.Module):
    """Cannot be exported, and runs in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.flatten(1))
        return y if float(y.sum()) > 0 else -y


def test_a_teacher_that_a_device_cannot_run_is_told(loaded: Workload, folder: Path) -> None:
    stubborn = replace(loaded, teacher=Choosy().eval())
    watch = stopwatch(stubborn, folder, InlineCluster(stubborn.worker_inputs()), "cpu-1")
    with pytest.raises(
        LatencyError, match=r"device 'cpu-1' cannot time the teacher and its layers: ExportError.*another runtime"
    ):
        watch.teacher()
    spent = watch.spent()
    assert spent["measurements"] == 0
    assert spent["measuring_s"] > 0  # of the export
    eager = Stopwatch(
        {"here": schema.DeviceSpec(runtime="torch")}, folder, stubborn, InlineCluster(stubborn.worker_inputs()), quiet
    )
    assert eager.teacher()["here"]["p50"] > 0


def test_a_student_that_a_device_cannot_run_has_a_reason(loaded: Workload, folder: Path) -> None:
    """The plan is of another network, so the worker cannot build its student."""
    foreign = profile(NETWORKS["residual"](), IMAGES)
    method = named("uniform")
    plan = method.allocate({}, foreign, Budget("b", macs=foreign.macs // 2), {"criterion": "l1"})
    watch = stopwatch(loaded, folder, InlineCluster(loaded.worker_inputs()), "cpu-1")
    broken, fine = (method, plan), (method, half(loaded))
    first, second = watch.time([broken, fine], ["cpu-1"])
    assert first == {}
    assert watch.refusal(broken, "cpu-1")
    assert second.keys() == {"cpu-1"}
    assert watch.refusal(fine, "cpu-1") is None


@pytest.mark.ray
def test_programs_are_made_on_workers_and_measured_in_a_process_of_their_own(loaded: Workload, folder: Path) -> None:
    cluster = RayCluster(loaded.worker_inputs(), max_parallel=2)
    try:
        watch = stopwatch(loaded, folder, cluster, "cpu-1")
        teacher = watch.teacher()["cpu-1"]
        students = [(named("uniform"), half(loaded, divisor)) for divisor in (2, 8)]
        found = watch.time(students, ["cpu-1"])
        here = stopwatch(loaded, folder, InlineCluster(loaded.worker_inputs()), "cpu-1", reference={"cpu-1": teacher})
        assert here.time(students, ["cpu-1"]) == found  # from the cache: it is the same device and the same reference
        assert all(row["cpu-1"].latency_ms["p50"] > 0 for row in found)
        assert watch.described() == here.described()
    finally:
        cluster.close()

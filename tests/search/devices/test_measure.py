"""`paredown measure`: every kind of saved model on every kind of device, and the messages where it cannot be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from cluster import ClusterError, Roofline, predicted_ms
from search.base import SearchError, SpecError, TrackingError
from search.devices.layer_table import layers_of
from search.devices.measure import measure
from search.export import exported, onnx_program
from search.record.logged_models import Models
from search.record.registry import Registry
from search.record.store import connect
from search.spec import load
from search.spec.schema import DeviceSpec
from tests.support.networks import NETWORKS

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STORE = "sqlite:///paredown.db"

SPEC = """
name: digits
model: {source: zoo, name: resnet8}
data: {source: digits}
methods: [alds]
devices:
  bench: {threads: 2, batch: 3}
  eager: {runtime: torch}
  edge: {runtime: profile, file: edge.yaml, batch: 2}
  board: {resources: {board: 1}}
budgets: [{name: half, macs: 50%}]
"""


@dataclass(frozen=True)
class Saved:
    """One network as a pt2 program, alone and in a folder, and as ONNX; a spec with devices."""

    model: nn.Module
    pt2: str
    folder: str
    onnx: str
    spec: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    place = tmp_path_factory.mktemp("saved")
    model = NETWORKS["residual"]()
    torch.export.save(exported(model, IMAGES[:2]), place / "student.pt2")
    (place / "student.onnx").write_bytes(onnx_program(model, IMAGES[:2]))
    (place / "spec.yaml").write_text(SPEC)
    (place / "edge.yaml").write_text("{macs_per_s: 2e9, bytes_per_s: 1e9, overhead_us: 20}")
    return Saved(model, str(place / "student.pt2"), str(place), str(place / "student.onnx"), place / "spec.yaml")


def run(model: str, device: str, spec: Path | None = None) -> dict[str, Any]:
    return measure(model, device, spec=None if spec is None else load(spec), address=None, uri=STORE)


@pytest.mark.parametrize("kind", ["pt2", "folder", "onnx"])
def test_a_saved_model_is_measured_on_threads_of_this_machine(saved: Saved, kind: str) -> None:
    model = getattr(saved, kind)
    found = run(model, "cpu-2")
    assert json.loads(json.dumps(found)) == found
    assert list(found) == [
        "model", "device", "runtime", "threads", "batch", "host", "processor", "is_predicted",
        "latency_ms", "noise", "teacher_latency_ms", "searched",
    ]  # fmt: skip
    assert (found["model"], found["device"]) == (model, "cpu-2")
    assert (found["runtime"], found["threads"], found["batch"]) == ("onnxruntime", 2, 1)
    assert found["host"]
    assert not found["is_predicted"]
    assert 0 < found["latency_ms"]["min"] <= found["latency_ms"]["p50"] <= found["latency_ms"]["p95"]
    assert found["searched"] is None


def test_a_spec_names_its_own_devices(saved: Saved) -> None:
    found = run(saved.pt2, "bench", saved.spec)
    assert (found["threads"], found["batch"]) == (2, 3)
    eager = run(saved.pt2, "eager", saved.spec)
    assert eager["runtime"] == "torch"
    assert eager["latency_ms"]["p50"] > 0


def test_a_device_that_is_not_there_is_predicted(saved: Saved) -> None:
    found = run(saved.folder, "edge", saved.spec)
    ms = predicted_ms(layers_of(saved.model, IMAGES), Roofline(2e9, 1e9, 20.0), 2)
    assert found["latency_ms"] == {"min": ms, "p50": ms, "p95": ms}
    assert found["is_predicted"]
    assert found["host"] is None


def test_a_registered_version_brings_its_device_and_what_the_search_found(saved: Saved) -> None:
    client = connect(STORE)
    run_id = client.create_run(client.create_experiment("tiny")).info.run_id
    registry = Registry(client, "tiny")
    uri = Models(client).store(run_id, saved.model, np.asarray(IMAGES))
    tags = {
        "top1_validation": 0.9, "device": "mine", "device_spec/mine": DeviceSpec(threads=2, batch=2).model_dump_json(),
        "device_spec/cpu-1": DeviceSpec().model_dump_json(),
        "device_spec/old": '{"threads": 1000000, "resources": {"node:10.0.0.5": 1.0}}',  # before there were bounds
        "host": "bench-3", "latency_ms/mine/min": 0.25, "latency_ms/mine/p50": 0.5, "latency_ms/mine/p95": 0.75,
        "latency_ms/cpu-1/p50": 0.5, "noise/mine": 0.2,
    }  # fmt: skip
    registry.register("edge", run_id, uri, tags, {})
    for name in ("models:/tiny@edge", "models:/tiny/1"):
        found = run(name, "mine")
        assert (found["threads"], found["batch"]) == (2, 2)
        assert found["searched"] == {
            "latency_ms": {"min": 0.25, "p50": 0.5, "p95": 0.75}, "noise": 0.2, "host": "bench-3",
            "ratio": found["latency_ms"]["p50"] / 0.5,
        }  # fmt: skip
        assert found["teacher_latency_ms"] is None
    elsewhere = run("models:/tiny@edge", "cpu-1")
    assert (elsewhere["threads"], elsewhere["searched"]["host"], elsewhere["searched"]["noise"]) == (1, None, None)
    assert run("models:/tiny@edge", "cpu-3")["searched"] is None
    with pytest.raises(SpecError, match="no device 'cpu'; expected mine or cpu-1 or old or cpu-N"):
        run("models:/tiny@edge", "cpu")
    with pytest.raises(TrackingError, match="there is no models:/tiny@gone"):
        run("models:/tiny@gone", "cpu-1")


def test_a_registered_version_is_measured_beside_its_teacher(saved: Saved) -> None:
    """The ratio is corrected for drift since the search: the teacher's latency then and now are known."""
    client = connect(STORE)
    experiment = client.create_experiment("tiny")
    registry = Registry(client, "tiny")
    run_id, parent = (client.create_run(experiment).info.run_id for _ in range(2))
    uri = Models(client).store(run_id, saved.model, np.asarray(IMAGES))
    tags = {
        "top1_validation": 0.9, "device": "cpu-1", "device_spec/cpu-1": DeviceSpec().model_dump_json(),
        "latency_ms/cpu-1/p50": 1.5, "teacher_latency_ms/cpu-1/p50": 3.0,
        "teacher_uri": Models(client).store(parent, saved.model, np.asarray(IMAGES)),
    }  # fmt: skip
    registry.register("edge", run_id, uri, tags, {})
    found = run("models:/tiny@edge", "cpu-1")
    ratio = found["latency_ms"]["p50"] / found["teacher_latency_ms"]["p50"]
    assert found["searched"]["ratio"] == pytest.approx(ratio * 3.0 / 1.5)


def test_a_device_nobody_knows_is_refused(saved: Saved) -> None:
    with pytest.raises(SpecError, match=r"no device 'cpu-0'; expected cpu-N.*; correct --device, or give the --spec"):
        run(saved.pt2, "cpu-0")
    for name in ("cpu-1025", f"cpu-{'9' * 900}"):
        with pytest.raises(SpecError, match=r"no device 'cpu-.*N threads, 1024 at most"):
            run(saved.pt2, name)
    with pytest.raises(SpecError, match=r"no device 'cpu-1'; expected bench or eager or edge or board; "):
        run(saved.pt2, "cpu-1", saved.spec)


@pytest.mark.ray
def test_a_device_whose_resources_are_nowhere_is_refused(saved: Saved) -> None:
    with pytest.raises(ClusterError, match="board"):
        run(saved.pt2, "board", saved.spec)


class Doubled(nn.Module):
    """Takes two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_models_that_cannot_be_measured_are_refused(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "half.pt2").write_bytes(Path(saved.pt2).read_bytes()[:1000])
    (tmp_path / "half.onnx").write_bytes(Path(saved.onnx).read_bytes()[:1000])
    torch.export.save(torch.export.export(Doubled(), (IMAGES, IMAGES)), tmp_path / "two.pt2")
    for model, told in {
        "gone.pt2": "no model at gone.pt2; expected a .pt2 or .onnx file, a folder with student.pt2",
        str(tmp_path): "no model at .*student.pt2",
        str(saved.spec): "no model at .*spec.yaml",
        "half.pt2": "cannot read half.pt2: .*; expected a program that torch.export.save wrote",
        "half.onnx": "cannot read half.onnx: .*; expected an ONNX file",
        "two.pt2": "two.pt2 does not say what images it takes; expected an exported program with one input",
    }.items():
        with pytest.raises(SearchError, match=told):
            run(model, "cpu-1")


@pytest.mark.parametrize("side", [-3, 10**7, 2**62])
def test_an_onnx_file_of_absurd_shape_is_refused(saved: Saved, side: int) -> None:
    file = onnx.load_from_string(Path(saved.onnx).read_bytes())
    for dimension in file.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = side
    onnx.save(file, "absurd.onnx")
    with pytest.raises(SearchError, match=r"absurd.onnx takes images \(3, .* bytes .*; expected sides of at least 1"):
        run("absurd.onnx", "cpu-1")


def test_a_folder_without_a_store_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"no MLflow store at sqlite:///paredown.db; expected the file paredown.db"):
        run("models:/tiny@edge", "cpu-1")
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_runs_on_onnxruntime_alone(saved: Saved) -> None:
    with pytest.raises(SearchError, match=r"the runtime torch cannot read an ONNX file; expected a .pt2 program"):
        run(saved.onnx, "eager", saved.spec)
    with pytest.raises(SearchError, match=r"a roofline cannot read an ONNX file"):
        run(saved.onnx, "edge", saved.spec)


def test_a_program_for_one_batch_alone_says_so(saved: Saved, tmp_path: Path) -> None:
    file = onnx.load_from_string(Path(saved.onnx).read_bytes())
    file.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(file, tmp_path / "one.onnx")
    assert run("one.onnx", "cpu-1")["latency_ms"]["p50"] > 0
    with pytest.raises(SearchError, match=r"cannot run the model: .*batches of 1.*; choose a device with another"):
        run("one.onnx", "bench", saved.spec)

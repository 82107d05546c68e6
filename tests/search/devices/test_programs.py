"""Students as ONNX: the same outputs at any batch size, weights that slow no processor, and reasons for failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from cluster import InlineCluster
from methods import named
from methods.base import Budget
from methods.network import profile
from methods.pipeline import WorkerInputs
from methods.training import Samples, top1
from search.devices.programs import Exporter, program
from search.export import ExportError, onnx_file, onnx_program, parity
from tests.support.networks import NETWORKS

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def quiet(stage: str, done: int, total: int, note: str) -> None:
    """A report nobody reads."""


def bench(teacher: nn.Module) -> WorkerInputs:
    """A bench without data to train on: programs need none."""
    nobody = cast(Samples, None)
    return WorkerInputs(teacher, nobody, nobody, IMAGES.numpy(), top1)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_onnx_gives_what_the_module_gives_at_any_batch_size(
    build: Callable[[], nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    model = build()
    written = onnx_program(model, IMAGES[:1])
    assert capfd.readouterr() == ("", "")
    for batch in (1, 2, 5):
        assert parity(model, written, IMAGES[:batch]) < 1e-5
    onnx.checker.check_model(onnx.load_from_string(written))


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_a_file_that_is_timed_is_made_by_a_trace(
    build: Callable[[], nn.Module], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    monkeypatch.setattr("search.export.onnx_program", None)
    written = onnx_file(model, IMAGES[:1])
    assert capfd.readouterr() == ("", "")
    for batch in (1, 2, 5):
        assert parity(model, written, IMAGES[:batch]) < 1e-5


class Choosy(nn.Module):
    """Branches on the values of its images, which no exporter can follow."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if float(pooled.sum()) > 0 else -pooled


class Restless(nn.Module):
    """Gives other outputs at every second call, while a trace gives those of one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mean((2, 3)) + self.calls % 2


@pytest.mark.parametrize("model", [Choosy(), Restless()], ids=["a branch", "other outputs"])
def test_the_other_way_takes_over_where_a_trace_is_not_the_network(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.export.onnx_program", lambda model, example: b"the other way")
    assert onnx_file(model.eval(), IMAGES) == b"the other way"


def test_parity_is_relative_to_the_largest_output() -> None:
    model = NETWORKS["plain"]()
    written = onnx_program(model, IMAGES)
    with torch.no_grad():
        largest = float(model(IMAGES).abs().max())
        cast(nn.Linear, model[-1]).bias += 0.5
        now = float(model(IMAGES).abs().max())
    assert largest > 0
    assert parity(model, written, IMAGES) == pytest.approx(0.5 / max(1.0, now), rel=1e-3)
    with torch.no_grad():
        cast(nn.Linear, model[-1]).bias += float("nan")
    assert not parity(model, written, IMAGES) <= 1e-4


def test_what_cannot_be_written_says_why() -> None:
    with pytest.raises(ExportError, match=r"cannot write the network as ONNX: .*; expected operators .* runtime torch"):
        onnx_program(Choosy().eval(), IMAGES)


def weights(written: bytes) -> list[np.ndarray]:
    return [numpy_helper.to_array(one) for one in onnx.load_from_string(written).graph.initializer]


def test_a_program_has_the_students_shapes_and_no_number_that_slows_a_processor() -> None:
    teacher = NETWORKS["residual"]()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter[0] = 1e-41  # a channel that training left dead
    found = profile(teacher, IMAGES)
    method = named("uniform")
    plan = method.allocate({}, found, Budget("half", macs=found.macs // 2), {"criterion": "l1"})
    for kind in (None, plan):
        written = program(bench(teacher), None if kind is None else method, kind, "onnx")
        assert isinstance(written, bytes)
        for values in weights(written):
            assert not ((values != 0) & (np.abs(values) < np.finfo(np.float32).tiny)).any()
    shapes = {values.shape for values in weights(written)}
    assert {tuple(one.shape) for one in method.apply(teacher, plan).parameters() if one.ndim == 4} <= shapes
    assert float(next(teacher.parameters())[0].detach().abs().max()) < 1e-40  # the teacher is as it was


def test_a_program_is_the_same_each_time() -> None:
    teacher = NETWORKS["squeeze"]()
    first, second = (program(bench(teacher), None, None, "torch") for _ in range(2))
    assert isinstance(first, nn.Module)
    assert isinstance(second, nn.Module)
    with torch.no_grad():
        assert torch.equal(first(IMAGES), second(IMAGES))
        assert torch.isfinite(first(IMAGES)).all()


def test_programs_are_made_once_and_a_refusal_stands_in_their_place() -> None:
    teacher = NETWORKS["plain"]()
    found = profile(teacher, IMAGES)
    method = named("uniform")
    plans = [
        method.allocate({}, found, Budget("b", macs=found.macs * share // 4), {"criterion": "l1"}) for share in (1, 2)
    ]
    told: list[str] = []
    exporter = Exporter(InlineCluster(bench(teacher)), lambda stage, *_: told.append(stage))
    first = exporter.of({"quarter": (method, plans[0])}, "onnx")
    both = exporter.of({"quarter": (method, plans[0]), "half": (method, plans[1])}, "onnx")
    assert both.teacher is first.teacher
    assert both.students["quarter"] is first.students["quarter"]
    assert len(cast(bytes, first.students["quarter"])) < len(cast(bytes, both.students["half"]))
    assert told == ["exporting"] * 3
    exporter.forget()
    assert exporter.of({"quarter": (method, plans[0])}, "onnx").students["quarter"] == first.students["quarter"]
    assert len(told) == 4

    refusing = Exporter(InlineCluster(bench(Choosy().eval())), quiet).of({}, "onnx")
    assert isinstance(refusing.teacher, str)
    assert refusing.teacher.startswith("ExportError: torch cannot write the network")

"""The meter against clocks set by hand, on real small networks, and against a second meter."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cluster.devices.layers import LayerShape, network_of
from cluster.devices.meter import ATTEMPTS, exclusive, identity, interleaved, measure, quietest
from cluster.devices.runtimes import Runtime, loaded

no_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is an extra")
RUNTIMES = [
    Runtime("onnxruntime"),
    pytest.param(Runtime("openvino"), marks=no_openvino),
    Runtime("torch"),
    pytest.param(Runtime("torch-compiled"), marks=pytest.mark.slow),  # it compiles
]
CPU = ("CPUExecutionProvider",)
IMAGES = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)


class Wound:
    """A clock that its own calls wind on, each by the next of its milliseconds."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.now = 0
        self._durations = durations

    def __call__(self) -> int:
        return self.now

    def call(self) -> None:
        self.now += round(next(self._durations) * 1e6)


def constant(ms: float) -> Iterator[float]:
    while True:
        yield ms


def sessions(*, fastest: float, rest: list[float]) -> Iterator[float]:
    """Durations for `quietest` with 30 rounds: a look at the speed, then sessions of one fastest call and 29 others."""
    yield from [fastest] * 10
    for ms in rest:
        yield from [ms] * 5  # warm-up
        yield from [fastest, *[ms] * 29]


def conv(outputs: int) -> LayerShape:
    return LayerShape("conv", 3, outputs, kernel=(3, 3), in_hw=(32, 32))


def test_percentiles_on_paper() -> None:
    clock = Wound(iter([99.0, 99.0, *range(20, 0, -1)]))
    (latency,) = interleaved({"call": clock.call}, rounds=20, warmup=2, clock=clock).values()
    assert latency.min == 1
    assert latency.p50 == 10.5
    assert latency.p95 == pytest.approx(19.05)  # 0.95 of the way from the first to the twentieth


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    found = interleaved({name: (lambda n=name: order.append(n)) for name in "ab"}, rounds=3, warmup=1)
    assert order == list("ab" * 4)
    assert all(0 < latency.min <= latency.p50 <= latency.p95 for latency in found.values())


def test_the_collector_rests_while_calls_are_timed() -> None:
    seen: list[bool] = []
    interleaved({"call": lambda: seen.append(gc.isenabled())}, rounds=3, warmup=1)
    assert seen == [True, False, False, False]
    assert gc.isenabled()


@pytest.mark.parametrize(("slow_ms", "rounds"), [(1.0, 250), (4.0, 100), (400.0, 30)])
def test_a_session_lasts_long_enough_and_has_enough_rounds(slow_ms: float, rounds: int) -> None:
    durations = {"quick": constant(1.0), "slow": constant(slow_ms)}
    clock = Wound(iter(()))
    calls = dict.fromkeys(durations, 0)

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            calls[name] += 1
            clock.now += round(next(durations[name]) * 1e6)

        return run

    reading = quietest({name: call(name) for name in durations}, clock=clock)
    assert calls == {"quick": 15 + rounds, "slow": 15 + rounds}  # 5 rounds to look, and two warm-ups of 5
    assert (reading.noise, reading.is_noisy) == (0, False)


def test_a_noisy_session_is_repeated() -> None:
    clock = Wound(sessions(fastest=1.0, rest=[1.5, 1.3, 1.05]))
    reading = quietest({"call": clock.call}, seconds=0.0, clock=clock)
    assert reading.latency["call"].p50 == pytest.approx(1.05)
    assert reading.noise == pytest.approx(0.05)
    assert not reading.is_noisy


def test_what_stays_noisy_is_kept_at_its_quietest_and_said() -> None:
    rest = [1.5, 1.2, 1.3, 1.4]
    assert len(rest) == ATTEMPTS  # a fifth session would find no duration left
    clock = Wound(sessions(fastest=1.0, rest=rest))
    reading = quietest({"call": clock.call}, seconds=0.0, clock=clock)
    assert reading.latency["call"].p50 == pytest.approx(1.2)
    assert reading.noise == pytest.approx(0.2)
    assert reading.is_noisy


def test_a_steady_session_of_a_slow_processor_is_noisy_too() -> None:
    first, steady, last = [1.0, *[1.5] * 29], [1.4] * 30, [1.02] * 30
    clock = Wound(iter([1.0] * 10 + [1.0] * 5 + first + [1.0] * 5 + steady + [1.0] * 5 + last))
    reading = quietest({"call": clock.call}, seconds=0.0, clock=clock)
    assert reading.latency["call"].p50 == pytest.approx(1.02)
    assert reading.noise == pytest.approx(0.02)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.kind)
def test_the_larger_network_is_slower(runtime: Runtime) -> None:
    threads = torch.get_num_threads()
    small, large = conv(8), conv(2048)  # milliseconds apart, whatever a busy machine adds to the price of a call
    reading = measure({"small": network_of(small, runtime), "large": network_of(large, runtime)}, runtime, IMAGES)
    assert list(reading.latency) == ["small", "large"]
    for latency in reading.latency.values():
        assert 0 < latency.min <= latency.p50 <= latency.p95
    assert reading.latency["large"].min > 2 * reading.latency["small"].min
    assert (torch.get_num_threads(), torch.is_inference_mode_enabled()) == (threads, False)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.kind)
def test_images_are_repeated_to_the_batch(runtime: Runtime) -> None:
    runtime = Runtime(runtime.kind, threads=2, batch=5)
    program = network_of(conv(4), runtime)
    with loaded(program, runtime, IMAGES) as call:
        outputs = np.asarray(call()).reshape(5, 4, 30, 30)
    np.testing.assert_allclose(outputs[3:], outputs[:2], rtol=1e-5, atol=1e-6)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1


def test_a_module_is_run_as_a_copy_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    network[1].running_mean.fill_(3.0)
    with loaded(network, Runtime("torch", batch=2), IMAGES) as call:
        found = call()
    assert all(module.training for module in network.modules())
    assert network[1].num_batches_tracked == 0
    with torch.inference_mode():
        torch.testing.assert_close(found, network.eval()(torch.from_numpy(IMAGES[:2])), rtol=1e-4, atol=1e-5)


def test_programs_that_a_runtime_cannot_run_are_refused() -> None:
    file, module = network_of(conv(4), Runtime("onnxruntime")), network_of(conv(4), Runtime("torch"))
    with pytest.raises(TypeError, match=r"onnxruntime cannot run a program of type Sequential.*export"):
        measure({"student": module}, Runtime("onnxruntime"), IMAGES)
    with pytest.raises(TypeError, match="torch cannot run a program of type bytes"):
        measure({"student": file}, Runtime("torch"), IMAGES)
    assert isinstance(file, bytes)
    fixed = onnx.load_from_string(file)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(ValueError, match="takes batches of 1, but the device runs batches of 2"):
        measure({"student": fixed.SerializeToString()}, Runtime("onnxruntime", batch=2), IMAGES)


def test_the_runtimes_of_files_compute_the_same() -> None:
    program, runtimes = network_of(conv(4), Runtime("onnxruntime")), [Runtime("onnxruntime", providers=CPU)]
    runtimes += [Runtime("openvino")] if importlib.util.find_spec("openvino") else []
    found = []
    for runtime in [Runtime("onnxruntime"), *runtimes]:
        with loaded(program, runtime, IMAGES) as call:
            found.append(call()[0])  # type: ignore[index]
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], rtol=1e-4, atol=1e-5)


def test_an_execution_provider_that_is_missing_is_told_and_not_replaced() -> None:
    runtime = Runtime("onnxruntime", providers=("TensorrtExecutionProvider",))
    with pytest.raises(RuntimeError, match=r"no TensorrtExecutionProvider on this device, only .*CPU.*providers"):
        measure({"student": network_of(conv(4), runtime)}, runtime, IMAGES)


def test_a_library_that_is_missing_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for use in (lambda: Runtime("openvino").version, lambda: measure({"a": b""}, Runtime("openvino"), IMAGES)):
        with pytest.raises(RuntimeError, match=r"openvino needs a package that is missing .*'\.\[openvino\]'"):
            use()


def test_readings_from_before_there_were_providers_are_found_again() -> None:
    assert Runtime("onnxruntime", 2, 3).identity() == {"kind": "onnxruntime", "threads": 2, "batch": 3}
    assert Runtime("onnxruntime", providers=CPU).identity()["providers"] == CPU


def test_without_a_compiler_nothing_is_compiled() -> None:
    import torch._inductor.config as inductor

    runtime = Runtime("torch-compiled")
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(RuntimeError, match=r"no C\+\+ compiler.*choose the runtime torch"),
    ):
        measure({"student": network_of(conv(4), runtime)}, runtime, IMAGES)


SECOND = """
import logging, pathlib, sys
from cluster.devices.meter import exclusive
logging.basicConfig(level=logging.INFO, format="%(message)s")
with exclusive():
    print(pathlib.Path(sys.argv[1]).exists())
"""


def test_a_second_meter_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mark = tmp_path / "first is done"
    root = Path(__file__).resolve().parents[3]
    with exclusive():
        second = subprocess.Popen(
            [sys.executable, "-c", SECOND, str(mark)],
            env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert "waiting" in next(line for line in second.stderr if "measures on this machine" in line)
        mark.touch()
    told, _ = second.communicate(timeout=60)
    assert (told.strip(), second.returncode) == ("True", 0)


def test_the_lock_is_free_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError), exclusive():
        _ = 1 / 0
    with exclusive():
        assert [path.name for path in tmp_path.iterdir()] == [f"paredown-meter-{os.getuid()}.lock"]


def test_a_figure_says_what_it_depends_on() -> None:
    found = {kind: identity(Runtime(kind)) for kind in ("onnxruntime", "torch", "torch-compiled")}
    for kind, told in found.items():
        assert list(told) == ["host", "processor", "runtime", "version"]
        assert all(told.values())
        assert told["runtime"] == kind
        assert json.loads(json.dumps(told)) == told
    assert found["onnxruntime"]["version"] == onnxruntime.__version__
    assert found["torch-compiled"]["version"] == torch.__version__

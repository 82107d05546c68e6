"""Single layers against torch's own arithmetic, and the roofline against numbers on paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cluster.devices.layers import GROUP, LayerShape, layer_times, network_of
from cluster.devices.roofline import Roofline, predicted_ms, roofline
from cluster.devices.runtimes import Runtime, loaded

STRIDED = LayerShape("conv", 16, 32, kernel=(3, 3), stride=(2, 2), padding=(1, 1), in_hw=(28, 28))
DENSE = LayerShape("linear", 64, 10)


@st.composite
def convolutions(draw: st.DrawFn) -> LayerShape:
    def pair(least: int, most: int) -> tuple[int, int]:
        return draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    groups = draw(st.sampled_from([1, 2, 4]))
    kernel, dilation, padding = pair(1, 4), pair(1, 2), pair(0, 2)
    reach = [far * (size - 1) + 1 for far, size in zip(dilation, kernel, strict=True)]
    height, width = (max(1, size - 2 * pad) + draw(st.integers(0, 6)) for size, pad in zip(reach, padding, strict=True))
    return LayerShape(
        kind="conv",
        in_channels=groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 5)),
        kernel=kernel,
        stride=pair(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        in_hw=(height, width),
    )


def linears() -> st.SearchStrategy[LayerShape]:
    rows = st.tuples(st.integers(1, 4), st.just(1))
    return st.builds(LayerShape, st.just("linear"), st.integers(1, 9), st.integers(1, 9), in_hw=rows)


def inputs(layer: LayerShape, batch: int) -> Tensor:
    """Noise of the shape that the layer sees inside a network."""
    rows, _ = layer.in_hw
    if layer.kind == "conv":
        shape: tuple[int, ...] = (layer.in_channels, *layer.in_hw)
    else:
        shape = (layer.in_channels,) if rows == 1 else (rows, layer.in_channels)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


def in_torch(layer: LayerShape, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if layer.kind == "linear":
        return F.linear(x, weight, bias).relu()
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups).relu()


@settings(max_examples=60)
@given(layer=convolutions() | linears(), batch=st.integers(1, 3))
def test_an_onnx_layer_computes_what_torch_computes(layer: LayerShape, batch: int) -> None:
    runtime = Runtime("onnxruntime", batch=batch)
    program, x = network_of(layer, runtime), inputs(layer, batch)
    assert isinstance(program, bytes)
    onnx.checker.check_model(program)
    stored = {
        one.name: torch.from_numpy(numpy_helper.to_array(one).copy())
        for one in onnx.load_from_string(program).graph.initializer
    }
    weight = stored["weight"]
    if layer.kind == "linear" and layer.in_hw != (1, 1):
        weight = weight.T  # MatMul takes (in, out)
    with loaded(program, runtime, x.numpy()) as call:
        (found,) = call()  # type: ignore[misc]
    with FlopCounterMode(display=False) as counter:
        expected = in_torch(layer, x, weight, stored["bias"])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert batch * layer.macs * 2 == counter.get_total_flops()
    assert batch * layer.outputs == expected.numel()
    assert batch * layer.inputs == x.numel()
    assert layer.weights == weight.numel() + len(stored["bias"])


@settings(max_examples=30)
@given(layer=convolutions() | linears())
def test_a_torch_layer_has_the_same_shapes(layer: LayerShape) -> None:
    module, x = network_of(layer, Runtime("torch")), inputs(layer, 2)
    assert isinstance(module, nn.Module)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = module.eval()(x)
    assert found.numel() == 2 * layer.outputs
    assert counter.get_total_flops() == 2 * 2 * layer.macs
    assert float(found.min()) >= 0


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_the_larger_layer_takes_longer(kind: str) -> None:
    runtime = Runtime(kind, batch=2)  # type: ignore[arg-type]
    small, large = LayerShape("conv", 16, 16, (3, 3), in_hw=(8, 8)), LayerShape("conv", 64, 256, (3, 3), in_hw=(32, 32))
    wide = [LayerShape("linear", 8, 8 + index) for index in range(GROUP)]  # more than are loaded at a time
    times = layer_times([large, small, *wide, large], runtime)
    assert len(times) == GROUP + 3
    assert times[0] == times[-1] > 3 * times[1]
    assert all(0 <= time < times[0] for time in times[1:-1])


@pytest.mark.slow  # it compiles
def test_every_compiled_layer_stays_compiled() -> None:
    """Compilations are counted by code, which all layers share; past the limit the compiler would go back to eager."""
    small, large = LayerShape("linear", 16, 16), LayerShape("linear", 1024, 1024, in_hw=(64, 1))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        times = layer_times([small, large], Runtime("torch-compiled"))
    assert times[1] > 3 * times[0]


def test_no_layers_take_no_measurement() -> None:
    assert layer_times([], Runtime("onnxruntime")) == []


def test_shapes_on_paper() -> None:
    assert STRIDED.out_hw == (14, 14)
    assert STRIDED.macs == 14 * 14 * 32 * 16 * 3 * 3 == 903_168
    assert (STRIDED.weights, STRIDED.inputs, STRIDED.outputs) == (4_640, 12_544, 6_272)
    assert (DENSE.macs, DENSE.weights, DENSE.inputs, DENSE.outputs) == (640, 650, 64, 10)


@pytest.mark.parametrize(
    ("macs_per_s", "batch", "ms"),
    [
        (1e9, 1, 0.903168 + 0.010),  # it computes longer than it moves
        (1e9, 2, 2 * 0.903168 + 0.010),
        (1e12, 1, 4e-6 * (4_640 + 18_816) + 0.010),  # it moves longer than it computes
        (1e12, 2, 4e-6 * (4_640 + 2 * 18_816) + 0.010),  # the weights are moved once
    ],
)
def test_a_roofline_on_paper(macs_per_s: float, batch: int, ms: float) -> None:
    device = Roofline(macs_per_s=macs_per_s, bytes_per_s=1e9, overhead_us=10)
    assert predicted_ms([STRIDED], device, batch) == pytest.approx(ms)
    assert predicted_ms([STRIDED, DENSE, STRIDED], device, batch) == pytest.approx(
        2 * ms + predicted_ms([DENSE], device, batch)
    )


@pytest.mark.parametrize(
    "text",
    [
        "macs_per_s: 2e9\nbytes_per_s: 5.0e+8\noverhead_us: 0",
        "{macs_per_s: 2000000000, bytes_per_s: 5e8, overhead_us: 0.0}",
    ],
)
def test_a_roofline_is_read_from_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(text)
    assert roofline(path) == Roofline(macs_per_s=2e9, bytes_per_s=5e8, overhead_us=0.0)


def test_all_mistakes_of_a_roofline_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "board.yaml"
    path.write_text("macs_per_s: 0\noverhead_us: -1\nbandwidth: 3")
    with pytest.raises(ValueError, match=r"board\.yaml") as caught:
        roofline(path)
    told = str(caught.value)
    assert "unknown key 'bandwidth'" in told
    assert "bytes_per_s: missing" in told
    assert "macs_per_s: 0 is no positive number" in told
    assert "overhead_us: -1 is no number of at least 0" in told


@pytest.mark.parametrize("value", ["true", "fast", ".nan", ".inf", "[1]", "null", "-1e9"])
def test_a_peak_is_a_positive_number(tmp_path: Path, value: str) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(f"macs_per_s: {value}\nbytes_per_s: 1e9\noverhead_us: 0")
    with pytest.raises(ValueError, match=r"macs_per_s: .* is no positive number"):
        roofline(path)


@pytest.mark.parametrize("text", ["", "- 1", "{", "7"])
def test_a_roofline_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"the roofline .*board\.yaml"):
        roofline(path)
    with pytest.raises(ValueError, match="cannot read the roofline"):
        roofline(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["[" * 5_000, "a: &a [x, x]\n" * 1_000, "macs_per_s: " + "9" * 5_000])
def test_a_file_that_no_roofline_is_like_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(text)
    for odd in (path, tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match=r"cannot read the roofline .*; expected a YAML file") as caught:
            roofline(odd)
        assert len(str(caught.value)) < 300

"""Time single layers on a device: the milliseconds from which a network's latency is predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.devices.meter import exclusive, quietest
from cluster.devices.runtimes import Program, Runtime, loaded

if TYPE_CHECKING:
    from torch import nn

Pair: TypeAlias = tuple[int, int]

GROUP = 16
"""Layers that are loaded at a time."""

SECONDS = 0.02
"""The least time of a session for one layer; a network has dozens of them."""

OPSET, IR_VERSION = 17, 8
"""The versions of the ONNX files made here: old enough for any onnxruntime that we allow."""


@dataclass(frozen=True)
class LayerShape:
    """A convolution or a linear layer, by all that its time depends on.

    Pairs are `(h, w)`. A linear layer has only channels and `in_hw`, `(rows, 1)`, the rows it sees for one input.
    """

    kind: Literal["conv", "linear"]
    in_channels: int
    out_channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    in_hw: Pair = (1, 1)

    @property
    def out_hw(self) -> Pair:
        """Height and width of the output map."""
        sizes = zip(self.in_hw, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in sizes
        )
        return height, width

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        return math.prod(self.out_hw) * math.prod(self.weight_shape)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(out, in / groups, kh, kw)`, or `(out, in)` of a linear layer."""
        if self.kind == "linear":
            return self.out_channels, self.in_channels
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    @property
    def weights(self) -> int:
        """Elements of the weight and of the bias, which most layers have once their norm is folded."""
        return math.prod(self.weight_shape) + self.out_channels

    @property
    def inputs(self) -> int:
        """Elements of one input's map."""
        return self.in_channels * math.prod(self.in_hw)

    @property
    def outputs(self) -> int:
        """Elements of one input's output map."""
        return self.out_channels * math.prod(self.out_hw)


def layer_times(layers: Sequence[LayerShape], runtime: Runtime) -> list[float]:
    """The milliseconds each layer adds to a network on this machine, over a batch of `runtime.batch` inputs.

    They are of its fastest call: a short disturbance of single layers must not stay in a table.

    A layer runs as a network of its own, as it would inside one: see `network_of`. The time of a call that computes
    nothing is taken off: a network pays it once, and over the layers of a small one it comes to twice its own time.
    """
    distinct = list(dict.fromkeys(layers))
    found: dict[LayerShape, float] = {}
    with exclusive():
        for begin in range(0, len(distinct), GROUP):
            group = distinct[begin : begin + GROUP]
            found |= zip(group, _group_times(group, runtime), strict=True)
    return [found[layer] for layer in layers]


def _group_times(layers: Sequence[LayerShape], runtime: Runtime) -> list[float]:
    """Time distinct layers in turn with the call that computes nothing, so that all are disturbed alike."""
    generator = np.random.default_rng(0)
    shapes = [(1,), *map(_in_shape, layers)]
    images = [generator.standard_normal((runtime.batch, *shape), np.float32) for shape in shapes]
    programs = [_empty_network(runtime), *(network_of(layer, runtime) for layer in layers)]
    with ExitStack() as stack:
        calls = [stack.enter_context(loaded(one, runtime, x)) for one, x in zip(programs, images, strict=True)]
        reading = quietest({str(index): call for index, call in enumerate(calls)}, seconds=SECONDS)
    empty, *fastest = (reading.latency[str(index)].min for index in range(len(calls)))
    return [max(time - empty, 0.0) for time in fastest]


def network_of(layer: LayerShape, runtime: Runtime) -> Program:
    """A network of this one layer with random weights, for `(n, c, h, w)`, `(n, rows, c)` or `(n, c)` inputs.

    A ReLU follows, which the runtimes of files run inside the layer. In torch a convolution has its batch norm too:
    there it is a step of its own, while an exporter folds it into the weights.
    """
    return _onnx(layer) if runtime.takes_files else _module(layer)


def _in_shape(layer: LayerShape) -> tuple[int, ...]:
    """The shape of one input, without the batch."""
    if layer.kind == "conv":
        return layer.in_channels, *layer.in_hw
    rows = layer.in_hw[0]
    return (layer.in_channels,) if rows == 1 else (rows, layer.in_channels)


def _onnx(layer: LayerShape) -> bytes:
    """Build the ONNX file node by node: torch's exporter takes seconds for it."""
    from onnx import helper

    generator = np.random.default_rng(0)
    scale = math.prod(layer.weight_shape[1:]) ** -0.5
    weight = generator.standard_normal(layer.weight_shape, np.float32) * np.float32(scale)
    bias = generator.standard_normal(layer.out_channels, np.float32)
    if layer.kind == "conv":
        nodes = [helper.make_node("Conv", ["x", "weight", "bias"], ["z"], **_attributes(layer))]
    elif layer.in_hw[0] == 1:
        nodes = [helper.make_node("Gemm", ["x", "weight", "bias"], ["z"], transB=1)]
    else:
        weight = np.ascontiguousarray(weight.T)
        nodes = [helper.make_node("MatMul", ["x", "weight"], ["product"])]
        nodes += [helper.make_node("Add", ["product", "bias"], ["z"])]
    return _file([*nodes, helper.make_node("Relu", ["z"], ["y"])], _in_shape(layer), {"weight": weight, "bias": bias})


def _attributes(layer: LayerShape) -> dict[str, Any]:
    return {
        "kernel_shape": layer.kernel,
        "strides": layer.stride,
        "pads": (*layer.padding, *layer.padding),
        "dilations": layer.dilation,
        "group": layer.groups,
    }


def _file(nodes: Sequence[Any], in_shape: tuple[int, ...], weights: dict[str, NDArray[np.float32]]) -> bytes:
    """Build an ONNX file that takes `x`, `(batch, *in_shape)`, and returns `y`, of as many axes."""
    from onnx import TensorProto, helper, numpy_helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *in_shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *[None] * len(in_shape)])
    stored = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "layer", [x], [y], stored)
    opset = helper.make_opsetid("", OPSET)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION).SerializeToString())


def _module(layer: LayerShape) -> nn.Module:
    from torch import nn

    if layer.kind == "linear":
        return nn.Sequential(nn.Linear(layer.in_channels, layer.out_channels), nn.ReLU())
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=False,
    )
    return nn.Sequential(conv, nn.BatchNorm2d(layer.out_channels), nn.ReLU())


def _empty_network(runtime: Runtime) -> Program:
    """The least network there is. A compiled one has to compute something, or nothing of it is left to call."""
    if runtime.takes_files:
        from onnx import helper

        return _file([helper.make_node("Relu", ["x"], ["y"])], (1,), {})
    from torch import nn

    return nn.ReLU() if runtime.kind == "torch-compiled" else nn.Identity()

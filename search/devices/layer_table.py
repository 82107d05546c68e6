"""The layers a network runs, in the meter's terms, and a table of the milliseconds each takes on a device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cluster import LayerShape
from search.cache import keep_json, read_json

BATCH = 16
"""Layers that are timed before the table is written: a killed search loses no more."""


def layers_of(model: nn.Module, example: Tensor) -> list[LayerShape]:
    """Return every call of a 2-d convolution or a linear layer when `model` reads `example[:1]`, `(1, c, h, w)`.

    Calls are recorded where torch runs them, in order, so functional calls and exported programs count too. Attention
    products and transposed convolutions are left out.
    """
    recorder = _LayerRecorder()
    with torch.no_grad(), recorder:
        model(example[:1].clone())
    return recorder.layers


class _LayerRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records in `layers` the convolutions and matrix products that torch runs while the context is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[LayerShape] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.layers += _convolution(*args[:9])
        elif func is torch.ops.aten.addmm.default:
            self.layers.append(_linear(args[1], args[2]))
        elif func is torch.ops.aten.mm.default:
            self.layers.append(_linear(args[0], args[1]))
        return func(*args, **(kwargs or {}))


def _convolution(x: Tensor, weight: Tensor, _: Tensor | None, *options: Any) -> Iterator[LayerShape]:
    """Yield the layer of a call of `aten.convolution`, if the meter can time it."""
    stride, padding, dilation, is_transposed, _output_padding, groups = options
    if weight.ndim == 4 and not is_transposed:
        yield LayerShape(
            kind="conv",
            in_channels=x.shape[1],
            out_channels=weight.shape[0],
            kernel=(weight.shape[2], weight.shape[3]),
            stride=_pair(stride),
            padding=_pair(padding),
            dilation=_pair(dilation),
            groups=groups,
            in_hw=(x.shape[2], x.shape[3]),
        )


def _linear(x: Tensor, weight: Tensor) -> LayerShape:
    rows, inputs = x.shape
    return LayerShape("linear", inputs, weight.shape[1], in_hw=(rows, 1))


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    return sizes[0], sizes[-1]


class LayerTable:
    """The milliseconds of single layers on one device, each measured when first needed, and kept in a file.

    Args:
        path: the file, JSON; several searches may share it.
        measure: times layers, in milliseconds.
    """

    def __init__(self, path: Path, measure: Callable[[list[LayerShape]], list[float]]) -> None:
        self._path = path
        self._measure = measure
        self._known: dict[str, float] = read_json(path)

    def ms(self, layers: Sequence[LayerShape]) -> float:
        """Return the sum over `layers`."""
        missing = list({_key(layer): layer for layer in layers if _key(layer) not in self._known}.values())
        for begin in range(0, len(missing), BATCH):
            batch = missing[begin : begin + BATCH]
            self._known |= {_key(layer): ms for layer, ms in zip(batch, self._measure(batch), strict=True)}
            self._keep()
        return sum(self._known[_key(layer)] for layer in layers)

    def _keep(self) -> None:
        """Write the table; entries that another search wrote meanwhile stay as they are."""
        self._known |= read_json(self._path)
        keep_json(self._path, self._known)


def _key(layer: LayerShape) -> str:
    return json.dumps(asdict(layer), sort_keys=True)

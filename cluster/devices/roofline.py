"""A device that is not there: its peaks predict the time of a network. Such figures are never measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from cluster.devices.layers import LayerShape

ELEMENT = 4
"""Bytes of one weight or activation, in fp32."""
LONGEST = 10_000
"""Characters of a roofline's file."""


@dataclass(frozen=True)
class Roofline:
    """A device's peaks: multiply-accumulates and bytes in a second, and the microseconds it takes to start a layer."""

    macs_per_s: float
    bytes_per_s: float
    overhead_us: float


def roofline(path: Path) -> Roofline:
    """The device in the YAML file at `path`, whose keys are the three of `Roofline`.

    Raises:
        ValueError: the file cannot be read or is wrong; every mistake is named.
    """
    try:
        raw = yaml.safe_load(_text(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the roofline {path}: {error}; expected a YAML file; check the path") from error
    keys = [field.name for field in fields(Roofline)]
    if not isinstance(raw, dict):
        raise ValueError(f"the roofline {path} is {raw!r}; expected the keys {', '.join(keys)}; give each a number")
    mistakes = [f"unknown key {key!r}; expected only {', '.join(keys)}" for key in raw if key not in keys]
    mistakes += [f"{key}: missing; it has to be given" for key in keys if key not in raw]
    numbers = {key: _number(raw[key]) for key in keys if key in raw}
    mistakes += [_mistake(key, raw[key]) for key, number in numbers.items() if not _is_allowed(key, number)]
    if mistakes:
        raise ValueError(f"the roofline {path} is wrong:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))
    return Roofline(**numbers)


def _text(path: Path) -> str:
    """The text of a file that is none without an end, such as a device."""
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    with path.open(encoding="utf-8") as file:
        text = file.read(LONGEST + 1)
    if len(text) > LONGEST:
        raise ValueError(f"it has over {LONGEST:,} characters")
    return text


def _number(value: object) -> float:
    """`value` as a number, or NaN; YAML takes 2e9, without a point and a sign, for text."""
    try:
        return math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        return math.nan


def _is_allowed(key: str, number: float) -> bool:
    return 0 < number < math.inf or (number == 0 and key == "overhead_us")


def _mistake(key: str, value: object) -> str:
    if key == "overhead_us":
        return f"{key}: {value!r} is no number of at least 0; write the microseconds of one layer, such as 20"
    return f"{key}: {value!r} is no positive number; write how many in a second, such as 2e9"


def predicted_ms(layers: Sequence[LayerShape], device: Roofline, batch: int) -> float:
    """The milliseconds one call takes at the device's peaks: each layer computes or moves data, whichever is longer.

    A layer of `C` MACs that moves `Q` bytes takes `max(C / macs_per_s, Q / bytes_per_s)`, and the overhead. `C` and the
    maps count once per image; the weights are read once per call.

    Source: Williams, Waterman, Patterson 2009, "Roofline: an insightful visual performance model for multicore
    architectures", CACM 52(4): attainable performance = min(peak, bandwidth x operational intensity).

    Differs: MACs take the place of FLOPs (FLOPs = 2 x MACs); every byte is moved once, in fp32, from and to memory.

    >>> layer = LayerShape("linear", 1000, 1000)
    >>> predicted_ms([layer, layer], Roofline(macs_per_s=1e9, bytes_per_s=1e9, overhead_us=0.0), batch=1)
    8.024
    """
    return sum(_seconds(layer, device, batch) for layer in layers) * 1e3


def _seconds(layer: LayerShape, device: Roofline, batch: int) -> float:
    moved = ELEMENT * (layer.weights + batch * (layer.inputs + layer.outputs))
    return max(batch * layer.macs / device.macs_per_s, moved / device.bytes_per_s) + device.overhead_us / 1e6

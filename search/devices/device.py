"""The devices of a search: one that is there measures students beside the teacher, one that is not predicts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from cluster import Runtime
from search.base import SearchError
from search.devices.programs import Kind, Student
from search.spec.schema import DeviceSpec
from search.trials import Times, Timing


class LatencyError(SearchError):
    """A device cannot run what it is given; the message says why."""


class Device(Protocol):
    """What both kinds of devices can do; `is_predicted` tells them apart. Students come by a key of their own."""

    @property
    def is_predicted(self) -> bool: ...

    def described(self) -> dict[str, Any]:
        """`runtime`, `threads`, `batch`, `host`, `processor`, `is_predicted`; what is not known is None."""
        ...

    def teacher(self) -> Times:
        """The teacher's latency when the search began."""
        ...

    def time(self, students: Mapping[str, Student]) -> dict[str, Timing | str]:
        """The latency of each student, or why it has none."""
        ...

    def predict(self, model: nn.Module) -> float:
        """The milliseconds that `model`, on the CPU, would take for one batch."""
        ...


def runtime_of(device: DeviceSpec) -> Runtime:
    """How a device that is there runs models."""
    assert device.runtime != "profile"
    return Runtime(device.runtime, device.threads, device.batch)


def kind_of(device: DeviceSpec) -> Kind:
    """What such a device runs."""
    return "onnx" if device.runtime == "onnxruntime" else "torch"


def described(spec: DeviceSpec, known: Mapping[str, str]) -> dict[str, Any]:
    """What a device is, as JSON-ready values; `known` is its identity, empty where it is not there."""
    return {
        "runtime": spec.runtime,
        "threads": spec.threads,
        "batch": spec.batch,
        "host": known.get("host"),
        "processor": known.get("processor"),
        "is_predicted": not known,
    }

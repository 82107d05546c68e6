"""The protocol of the devices of a search, and the functions that both kinds share."""

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
    """A device cannot run a network; the message says why."""


class Device(Protocol):
    """A device, measured or predicted: `is_predicted` tells which. Students come by keys of the caller's."""

    @property
    def is_predicted(self) -> bool: ...

    def described(self) -> dict[str, Any]:
        """`runtime`, `threads`, `batch`, `host`, `processor`, `is_predicted`; an unknown value is None."""
        ...

    def teacher(self) -> Times:
        """The teacher's latency when the search began."""
        ...

    def time(self, students: Mapping[str, Student]) -> dict[str, Timing | str]:
        """The latency of each student, or the reason why it has none."""
        ...

    def predict(self, model: nn.Module) -> float:
        """Predict the milliseconds that `model`, on the CPU, takes for one batch."""
        ...


def runtime_of(device: DeviceSpec) -> Runtime:
    """The runtime of a device that is there."""
    assert device.runtime != "profile"
    return Runtime(device.runtime, device.threads, device.batch, device.providers)


def kind_of(device: DeviceSpec) -> Kind:
    """The kind of program that a device which is there runs."""
    return "onnx" if runtime_of(device).takes_files else "torch"


def described(spec: DeviceSpec, known: Mapping[str, str]) -> dict[str, Any]:
    """Describe a device in JSON-ready values; `known` is its identity, empty for one that is not there."""
    return {
        "runtime": spec.runtime,
        "threads": spec.threads,
        "batch": spec.batch,
        "host": known.get("host"),
        "processor": known.get("processor"),
        "is_predicted": not known,
    }

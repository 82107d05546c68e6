"""The meter of a device: runs the cluster's measuring functions alone, in one process on the device's node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster import Cluster, Done, Failed, LayerShape, Program, Reading, identity, layer_times, measure
from search.devices.device import LatencyError, runtime_of
from search.spec.schema import DeviceSpec
from search.trials import Timing


@dataclass(frozen=True)
class Meter:
    """Measures on one device; every call takes one measurement after the other.

    Args:
        explain: makes the message of a LatencyError from the reason of a failure.

    Raises:
        LatencyError: a measurement failed. So does every method, but for `read_pairs`.
        ClusterError: no node has the device's resources. So does every method.
    """

    cluster: Cluster
    device: DeviceSpec
    explain: Callable[[str], str]

    def identity(self) -> dict[str, str]:
        """Return the facts about the device that its figures depend on: see `cluster.identity`."""
        found: dict[str, str] = self._alone(identity, runtime_of(self.device))
        return found

    def read(self, programs: Mapping[str, Program], images: NDArray[np.float32]) -> Reading:
        """Return the latency of each program, measured in turn."""
        found: Reading = self._alone(measure, programs, runtime_of(self.device), images)
        return found

    def read_pairs(self, pairs: Iterable[Mapping[str, object]], images: NDArray[np.float32]) -> Iterator[Timing | str]:
        """Yield the timing of each pair of programs, `teacher` and `student`, or the reason why it has none."""
        items = ((pair, runtime_of(self.device), images) for pair in pairs)
        for event in self.cluster.alone(measure, items, self.device.resources):
            if isinstance(event, Done):
                yield timing_of(event.value)
            elif isinstance(event, Failed):
                yield event.error

    def layer_times(self, layers: list[LayerShape]) -> list[float]:
        """Return the milliseconds of each layer by itself."""
        found: list[float] = self._alone(layer_times, layers, runtime_of(self.device))
        return found

    def _alone(self, function: Callable[..., Any], *item: object) -> Any:
        (event,) = self.cluster.alone(function, [item], self.device.resources)
        if isinstance(event, Done):
            return event.value
        assert isinstance(event, Failed)
        raise LatencyError(self.explain(event.error))


def timing_of(reading: Reading) -> Timing:
    """Return the timing in a reading of two programs, `student` and `teacher`; not corrected for drift."""
    student, teacher = (asdict(reading.latency[name]) for name in ("student", "teacher"))
    return Timing(student, teacher, reading.noise if reading.is_noisy else None)

"""The stopwatch of a search: times the teacher and students on its devices, and predicts them beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from cluster import Cluster, Event, Item, Step, always
from search.base import Report
from search.devices.device import Device
from search.devices.measured import MeasuredDevice
from search.devices.predicted import PredictedDevice
from search.devices.programs import Exporter, Student
from search.spec.schema import DeviceSpec
from search.trials import Timing
from search.workload import Workload


class Stopwatch:
    """Times the teacher and students on the devices of a search.

    Args:
        folder: relative paths of roofline files start here.
        reference: the teacher's latency when the search began, by device; a missing one is measured when needed.

    Raises:
        SpecError: a roofline file is wrong.
    """

    def __init__(
        self,
        devices: Mapping[str, DeviceSpec],
        folder: Path,
        workload: Workload,
        cluster: Cluster,
        report: Report,
        *,
        reference: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self._tally = _Tally(cluster)
        self._exporter = Exporter(self._tally, report)
        self._refusals: dict[tuple[str, str], str] = {}

        def device(name: str, spec: DeviceSpec) -> Device:
            if spec.runtime == "profile":
                return PredictedDevice(spec, folder, workload)
            begun = (reference or {}).get(name)
            return MeasuredDevice(name, spec, workload, self._tally, self._exporter, report=report, reference=begun)

        self._devices = {name: device(name, spec) for name, spec in devices.items()}

    @property
    def devices(self) -> list[str]:
        """The names of all devices."""
        return list(self._devices)

    def spent(self) -> dict[str, float]:
        """Return the cost of timing since last asked: `measurements` on devices, `measuring_s` there and of exports."""
        measurements, seconds = self._tally.taken()
        return {"measurements": float(measurements), "measuring_s": seconds}

    def is_predicted(self, device: str) -> bool:
        """Whether the device is not there, so that its roofline gives all its figures."""
        return self._devices[device].is_predicted

    def described(self) -> dict[str, dict[str, Any]]:
        """The facts about each device: `runtime`, `threads`, `batch`, `host`, `processor`, `is_predicted`."""
        return {name: device.described() for name, device in self._devices.items()}

    def teacher(self) -> dict[str, dict[str, float]]:
        """The teacher's latency on every device when the search began.

        Raises:
            LatencyError: a device cannot run it.
            ClusterError: the cluster lacks a device's resources.
        """
        return {name: dict(device.teacher()) for name, device in self._devices.items()}

    def time(self, students: Sequence[Student], devices: Collection[str]) -> list[dict[str, Timing]]:
        """The latency of each student on each of the devices; one that cannot run there has none, see `refusal`.

        Raises as `teacher` does.
        """
        keys = [_key(student) for student in students]
        table: list[dict[str, Timing]] = [{} for _ in students]
        for name in devices:
            found = self._devices[name].time(dict(zip(keys, students, strict=True)))
            for row, key in zip(table, keys, strict=True):
                timed = found[key]
                if isinstance(timed, str):
                    self._refusals[key, name] = timed
                else:
                    row[name] = timed
        self._exporter.forget()
        return table

    def refusal(self, student: Student, device: str) -> str | None:
        """The reason why a student could not be timed on a device, or None."""
        return self._refusals.get((_key(student), device))

    def predict(self, model: nn.Module, device: str) -> float:
        """Predict the milliseconds that `model`, on the CPU, takes on the device for one batch.

        On a device that is there, they are the sum of its layers' times, measured once each, times the factor by which
        that sum is wrong for the teacher.

        Raises as `teacher` does.
        """
        return self._devices[device].predict(model)


class _Tally:
    """A cluster that passes every call on to another, and counts the seconds and the items run alone."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._measurements, self._seconds = 0, 0.0

    def taken(self) -> tuple[int, float]:
        """Return the number of items that ran alone, and the seconds of all items, since last asked."""
        taken = self._measurements, self._seconds
        self._measurements, self._seconds = 0, 0.0
        return taken

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """See `Cluster.run`."""
        return self._counted(self._cluster.run(function, items, go_on), measurements=0)

    def alone(
        self, function: Callable[..., Any], items: Iterable[Item], resources: Mapping[str, float] = MappingProxyType({})
    ) -> Iterator[Event]:
        """See `Cluster.alone`."""
        return self._counted(self._cluster.alone(function, items, resources), measurements=1)

    def close(self) -> None:
        """See `Cluster.close`."""
        self._cluster.close()

    def _counted(self, events: Iterable[Event], *, measurements: int) -> Iterator[Event]:
        """Yield the events; the end of each item counts as so many measurements."""
        for event in events:
            if not isinstance(event, Step):
                self._measurements += measurements
                self._seconds += event.seconds
            yield event


def _key(student: Student) -> str:
    """The same for plans that lead to the same student."""
    method, plan = student
    return json.dumps([method.name, plan.identity()], sort_keys=True)

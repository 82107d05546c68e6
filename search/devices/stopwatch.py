"""The stopwatch of a search: what the teacher and students take on its devices, measured, or predicted beforehand."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cluster import Cluster
from search.base import Report
from search.devices.device import Device
from search.devices.measured import Present
from search.devices.predicted import Absent
from search.devices.programs import Exporter, Student
from search.spec.schema import DeviceSpec
from search.trials import Timing
from search.workload import Workload


class Stopwatch:
    """Times the teacher and students on the devices of a search.

    Args:
        folder: where relative roofline files are looked for.
        reference: the teacher's latency when the search began, by device; what it lacks is measured when needed.

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
        self._spent = {"measurements": 0.0, "measuring_s": 0.0}
        self._exporter = Exporter(cluster, report, self._spent)
        self._refusals: dict[tuple[str, str], str] = {}

        def device(name: str, spec: DeviceSpec) -> Device:
            if spec.runtime == "profile":
                return Absent(spec, folder, workload)
            begun = (reference or {}).get(name)
            return Present(
                name, spec, workload, cluster, self._exporter, report=report, reference=begun, spent=self._spent
            )

        self._devices = {name: device(name, spec) for name, spec in devices.items()}

    @property
    def devices(self) -> list[str]:
        """The names of all devices."""
        return list(self._devices)

    def spent(self) -> dict[str, float]:
        """What timing took since this was last asked: `measurements` on devices, `measuring_s` there and of exports."""
        taken = dict(self._spent)
        self._spent.update(dict.fromkeys(self._spent, 0.0))
        return taken

    def is_predicted(self, device: str) -> bool:
        """Whether the device is not there, so that all its figures are computed from its roofline."""
        return self._devices[device].is_predicted

    def described(self) -> dict[str, dict[str, Any]]:
        """What each device is: `runtime`, `threads`, `batch`, `host`, `processor` and whether it `is_predicted`."""
        return {name: device.described() for name, device in self._devices.items()}

    def teacher(self) -> dict[str, dict[str, float]]:
        """The teacher's latency on every device when the search began.

        Raises:
            LatencyError: a device cannot run it.
            ClusterError: the cluster lacks a device's resources.
        """
        return {name: dict(device.teacher()) for name, device in self._devices.items()}

    def time(self, students: Sequence[Student], devices: Collection[str]) -> list[dict[str, Timing]]:
        """The latency of each student on each of the devices; where it cannot run it has none, see `refusal`.

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
        """Why a student could not be timed on a device, or None."""
        return self._refusals.get((_key(student), device))

    def predict(self, model: nn.Module, device: str) -> float:
        """The milliseconds `model`, on the CPU, would take on the device for one batch.

        On a device that is there, it is the sum of its layers' times, measured once each, times the factor by which
        that sum is wrong for the teacher.

        Raises as `teacher` does.
        """
        return self._devices[device].predict(model)


def _key(student: Student) -> str:
    """The same for plans that lead to the same student."""
    method, plan = student
    choices = {name: value for name, value in plan.to_json().items() if name not in ("loss", "bound", "notes")}
    return json.dumps([method.name, choices], sort_keys=True)

"""A device that is there: it measures students beside the teacher, and predicts others from their layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from cluster import Cluster, LayerShape
from search.base import Report
from search.devices.device import LatencyError, described, kind_of, runtime_of
from search.devices.layer_table import LayerTable, layers_of
from search.devices.meter import Meter
from search.devices.programs import Exporter, Student
from search.devices.readings import Readings, folder_of
from search.spec.schema import DeviceSpec
from search.trials import Times, Timing
from search.workload import Workload


class MeasuredDevice:
    """A device that is there: other work disturbs it, so a student is only ever measured in turn with the teacher.

    Args:
        reference: the teacher's latency when the search began; measured when first needed if it is None.
    """

    is_predicted = False

    def __init__(
        self,
        name: str,
        spec: DeviceSpec,
        workload: Workload,
        cluster: Cluster,
        exporter: Exporter,
        *,
        report: Report,
        reference: Times | None,
    ) -> None:
        self._name = name
        self._spec = spec
        self._workload = workload
        self._meter = Meter(cluster, spec, self._refusal)
        self._exporter = exporter
        self._report = report
        self._reference = reference
        self._images = workload.splits.calibration[: spec.batch].copy()

    def described(self) -> dict[str, Any]:
        """See `Device.described`."""
        return described(self._spec, self._identity)

    def teacher(self) -> Times:
        """See `Device.teacher`.

        Raises:
            LatencyError: the device cannot run it.
            ClusterError: the cluster has no such device.
        """
        if self._reference is None:
            program = self._exporter.of({}, kind_of(self._spec)).teacher
            if isinstance(program, str):
                raise LatencyError(self._refusal(program))
            self._report("measuring", 0, 1, f"teacher on {self._name}")
            reading = self._meter.read({"teacher": program}, self._images)
            self._reference = asdict(reading.latency["teacher"])
            self._report("measuring", 1, 1, f"teacher on {self._name}: {self._reference['p50']:.3g} ms")
        return self._reference

    def time(self, students: Mapping[str, Student]) -> dict[str, Timing | str]:
        """See `Device.time`; programs are made on the cluster all at once, then measured one after the other."""
        self.teacher()
        known = {key: reading for key in students if (reading := self._readings.find(key)) is not None}
        found = known | self._measure({key: student for key, student in students.items() if key not in known})
        return {key: one if isinstance(one, str) else self._corrected(one) for key, one in found.items()}

    def predict(self, model: nn.Module) -> float:
        """See `Device.predict`: the sum of the layers' times, times the factor by which it is wrong for the teacher."""
        return self._factor * self._sum(model)

    def _measure(self, students: Mapping[str, Student]) -> dict[str, Timing | str]:
        """Measure students, each beside the teacher; return the reason in place of a timing that one cannot have."""
        if not students:
            return {}
        programs = self._exporter.of(students, kind_of(self._spec))
        found: dict[str, Timing | str] = {key: why for key, why in programs.students.items() if isinstance(why, str)}
        keys = [key for key in students if key not in found]
        pairs = [{"teacher": programs.teacher, "student": programs.students[key]} for key in keys]
        for number, reading in enumerate(self._meter.read_pairs(pairs, self._images)):
            key = keys[number]
            if isinstance(reading, Timing):
                self._readings.keep(key, reading)
            found[key] = reading
            self._report("measuring", number + 1, len(keys), f"{students[key][0].name} on {self._name}")
        return found

    def _corrected(self, reading: Timing) -> Timing:
        """Correct a reading for drift, by the teacher's latency when the search began over that in the reading."""
        scale = self.teacher()["p50"] / reading.teacher_latency_ms["p50"]
        return replace(reading, latency_ms={name: ms * scale for name, ms in reading.latency_ms.items()})

    @cached_property
    def _identity(self) -> dict[str, str]:
        return self._meter.identity()

    @cached_property
    def _folder(self) -> Path:
        return folder_of(self._identity, runtime_of(self._spec))

    @cached_property
    def _readings(self) -> Readings:
        return Readings(self._folder, self._workload.fingerprint, self.teacher())

    @cached_property
    def _table(self) -> LayerTable:
        return LayerTable(self._folder / "layers.json", self._layer_times)

    @cached_property
    def _factor(self) -> float:
        """The teacher's latency over the sum of its layers' times."""
        layers_ms = self._sum(self._workload.teacher.cpu())
        return self.teacher()["p50"] / layers_ms

    def _sum(self, model: nn.Module) -> float:
        """Return the milliseconds of the model's layers, each timed by itself."""
        return max(self._table.ms(layers_of(model, self._workload.example)), 1e-6)

    def _layer_times(self, layers: list[LayerShape]) -> list[float]:
        self._report("measuring", 0, len(layers), f"single layers on {self._name}")
        found = self._meter.layer_times(layers)
        self._report("measuring", len(layers), len(layers), f"single layers on {self._name}")
        return found

    def _refusal(self, reason: str) -> str:
        return (
            f"device {self._name!r} cannot time the teacher and its layers: {reason}; expected a network that "
            f"{self._spec.runtime} runs; give the device another runtime, or leave it out"
        )

"""A device that is not there: its roofline predicts the latency of every network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from cluster import Roofline, predicted_ms, roofline
from search.base import SpecError
from search.devices.device import described
from search.devices.layer_table import layers_of
from search.devices.programs import Student
from search.spec import SearchSpec
from search.spec.schema import DeviceSpec
from search.trials import Times, Timing
from search.workload import Workload


def roofline_of(device: DeviceSpec, folder: Path) -> Roofline:
    """The roofline of a device that is not there; a relative path of its file starts in `folder`.

    Raises:
        SpecError: the file is wrong.
    """
    assert device.file is not None
    try:
        return roofline(Path(folder, device.file).expanduser())
    except ValueError as error:
        raise SpecError(str(error)) from error


def rooflines(spec: SearchSpec) -> dict[str, dict[str, float]]:
    """The rooflines of a spec's devices that are not there, by device.

    Raises:
        SpecError: a file is wrong.
    """
    absent = {name: device for name, device in spec.devices.items() if device.runtime == "profile"}
    return {name: asdict(roofline_of(device, Path(spec.folder))) for name, device in absent.items()}


class PredictedDevice:
    """A device that is not there: its roofline gives all its figures."""

    is_predicted = True

    def __init__(self, spec: DeviceSpec, folder: Path, workload: Workload) -> None:
        self._spec = spec
        self._peaks = roofline_of(spec, folder)
        self._workload = workload
        self._reference: Times | None = None

    def described(self) -> dict[str, Any]:
        """See `Device.described`."""
        return described(self._spec, {})

    def teacher(self) -> Times:
        """See `Device.teacher`."""
        if self._reference is None:
            self._reference = flat(self.predict(self._workload.teacher.cpu()))
        return self._reference

    def time(self, students: Mapping[str, Student]) -> dict[str, Timing | str]:
        """See `Device.time`."""
        teacher, reference = self._workload.teacher.cpu(), self.teacher()
        return {
            key: Timing(flat(self.predict(method.apply(teacher, plan))), reference)
            for key, (method, plan) in students.items()
        }

    def predict(self, model: nn.Module) -> float:
        """See `Device.predict`."""
        return predicted_ms(layers_of(model, self._workload.example), self._peaks, self._spec.batch)


def flat(ms: float) -> dict[str, float]:
    """A computed latency, which has no spread."""
    return {"min": ms, "p50": ms, "p95": ms}

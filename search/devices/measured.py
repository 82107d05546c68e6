"""A device that is there: it measures students beside the teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from cluster import (
    Cluster,
    Done,
    Failed,
    Reading,
    identity,
    layer_times,
    measure,
)
from search import cache
from search.base import Report
from search.cache import keep_json, read_json
from search.devices.device import LatencyError, described, kind_of, runtime_of
from search.devices.layer_table import LayerTable, layers_of
from search.devices.programs import Exporter, Student
from search.spec.schema import DeviceSpec
from search.trials import Times, Timing
from search.workload import Workload


class Present:
    """A device that is there: other work disturbs it, so a student is only ever measured in turn with the teacher.

    What was measured is kept on disk: a quiet reading for every search of this teacher on such a device, a noisy one
    for this search alone, so that a resumed search plans as it did before.

    Args:
        reference: the teacher's latency when the search began; measured when it is first needed where it is None.
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
        self._cluster = cluster
        self._exporter = exporter
        self._report = report
        self._reference = reference
        self._runtime = runtime_of(spec)
        self._images = workload.splits.calibration[: spec.batch].copy()
        self._identity: dict[str, str] = {}
        self._table: LayerTable | None = None
        self._factor: float | None = None
        self._known: dict[str, dict[str, Any]] = {}

    def described(self) -> dict[str, Any]:
        """See `Device.described`."""
        return described(self._spec, self._identified())

    def teacher(self) -> Times:
        """See `Device.teacher`.

        Raises:
            LatencyError: the device cannot run it.
            ClusterError: the cluster has no such device.
        """
        if self._reference is None:
            program = self._exporter.of({}, kind_of(self._spec)).teacher
            if isinstance(program, str):
                raise LatencyError(self._helpless(program))
            self._report("measuring", 0, 1, f"teacher on {self._name}")
            reading: Reading = self._alone(measure, {"teacher": program}, self._runtime, self._images)
            self._reference = asdict(reading.latency["teacher"])
            self._report("measuring", 1, 1, f"teacher on {self._name}: {self._reference['p50']:.3g} ms")
        return self._reference

    def time(self, students: Mapping[str, Student]) -> dict[str, Timing | str]:
        """See `Device.time`; programs are made on the cluster all at once, then measured one after the other."""
        self.teacher()
        missing = {key: student for key, student in students.items() if not self._recall(key)}
        refused = self._measure(missing) if missing else {}
        return refused | {key: self._timing(self._known[key]) for key in students if key not in refused}

    def predict(self, model: nn.Module) -> float:
        """See `Device.predict`: the sum of its layers' times, and the factor by which that is wrong for the teacher."""
        if self._factor is None:
            teacher = self._sum(self._workload.teacher.cpu())
            self._factor = self.teacher()["p50"] / teacher
        return self._factor * self._sum(model)

    def _sum(self, model: nn.Module) -> float:
        """Milliseconds of the model's layers, each timed by itself."""
        if self._table is None:
            self._table = LayerTable(self._folder() / "layers.json", self._layer_times)
        return max(self._table.ms(layers_of(model, self._workload.example)), 1e-6)

    def _layer_times(self, layers: list[Any]) -> list[float]:
        self._report("measuring", 0, len(layers), f"single layers on {self._name}")
        found: list[float] = self._alone(layer_times, layers, self._runtime)
        self._report("measuring", len(layers), len(layers), f"single layers on {self._name}")
        return found

    def _measure(self, students: Mapping[str, Student]) -> dict[str, Timing | str]:
        """Measures students, each beside the teacher; gives the reasons of those that cannot run."""
        made = self._exporter.of(students, kind_of(self._spec))
        ready = {key: program for key, program in made.students.items() if not isinstance(program, str)}
        refused: dict[str, Timing | str] = {key: why for key, why in made.students.items() if isinstance(why, str)}
        pairs = ({"teacher": made.teacher, "student": program} for program in ready.values())
        items = ((pair, self._runtime, self._images) for pair in pairs)
        keys = list(ready)
        for event in self._cluster.alone(measure, items, self._spec.resources):
            key = keys[event.index]
            if isinstance(event, Failed):
                refused[key] = event.error
            elif isinstance(event, Done):
                self._keep(key, event.value)
            self._report("measuring", event.index + 1, len(keys), f"{students[key][0].name} on {self._name}")
        return refused

    def _timing(self, kept: Mapping[str, Any]) -> Timing:
        """What was measured, scaled by how much slower or faster the teacher was than when the search began."""
        scale = self.teacher()["p50"] / kept["teacher"]["p50"]
        return Timing({name: ms * scale for name, ms in kept["student"].items()}, kept["teacher"], kept["noise"])

    def _keep(self, key: str, reading: Reading) -> None:
        found = {name: asdict(times) for name, times in reading.latency.items()}
        self._known[key] = found | {"noise": reading.noise if reading.is_noisy else None}
        keep_json(self._path(key, is_quiet=not reading.is_noisy), self._known[key])

    def _recall(self, key: str) -> bool:
        """Whether a student was measured before; then it is among those known."""
        for path in (self._path(key, is_quiet=False), self._path(key, is_quiet=True)):  # its own first
            if key not in self._known and (found := read_json(path)):
                self._known[key] = found
        return key in self._known

    def _path(self, key: str, *, is_quiet: bool) -> Path:
        search = [] if is_quiet else sorted(self.teacher().items())  # no other search saw just these times
        return self._folder() / f"{_digest(self._workload.fingerprint, key, search)}.json"

    def _folder(self) -> Path:
        """Where the figures of all such devices are kept."""
        return cache.folder() / "latency" / _digest(self._identified(), asdict(self._runtime))

    def _identified(self) -> dict[str, str]:
        if not self._identity:
            self._identity = self._alone(identity, self._runtime)
        return self._identity

    def _alone(self, function: Any, *item: object) -> Any:
        """What `function` gives in the meter's process."""
        (event,) = self._cluster.alone(function, [item], self._spec.resources)
        if isinstance(event, Done):
            return event.value
        assert isinstance(event, Failed)
        raise LatencyError(self._helpless(event.error))

    def _helpless(self, reason: str) -> str:
        return (
            f"device {self._name!r} cannot time the teacher and its layers: {reason}; expected a network that "
            f"{self._spec.runtime} runs; give the device another runtime, or leave it out"
        )


def _digest(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

"""Teacher and students as the programs that devices run: an ONNX file, or a module on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster import Cluster, Done, Failed, Program
from methods.base import Plan
from methods.chain import AnyMethod
from methods.pipeline import WorkerInputs
from search.base import Report
from search.export import onnx_file

Kind: TypeAlias = Literal["onnx", "torch"]
"""The two kinds of programs: ONNX bytes, or a module."""

Student: TypeAlias = tuple[AnyMethod, Plan]

_Item: TypeAlias = tuple[AnyMethod | None, Plan | None, Kind]


def program(inputs: WorkerInputs, method: AnyMethod | None, plan: Plan | None, kind: Kind) -> Program:
    """Make the program of the student that `plan` describes, or of the teacher if there is no method.

    Only the shapes are the student's: its weights are drawn anew, since time must not depend on the trained ones that a
    cut left. Numbers close to zero, which dead channels have, can slow a processor down a hundred times.

    Raises:
        ExportError: the student cannot be written as ONNX.
    """
    model = copy.deepcopy(inputs.teacher).cpu()
    if method is not None and plan is not None:
        model = method.apply(model, plan)
    _draw(model.eval())
    return model if kind == "torch" else onnx_file(model, torch.from_numpy(inputs.calibration[:3].copy()))


@dataclass(frozen=True)
class Programs:
    """The teacher's program and those of students by key; the reason stands in place of one that cannot be made."""

    teacher: Program | str
    students: Mapping[str, Program | str]


class Exporter:
    """Makes programs on the cluster, all at once. It keeps the teacher's for good, and the students' until `forget`."""

    def __init__(self, cluster: Cluster, report: Report) -> None:
        self._cluster = cluster
        self._report = report
        self._teachers: dict[Kind, Program | str] = {}
        self._students: dict[tuple[str, Kind], Program | str] = {}

    def of(self, students: Mapping[str, Student], kind: Kind) -> Programs:
        """The programs of the teacher and of `students`."""
        missing = {key: one for key, one in students.items() if (key, kind) not in self._students}
        items: list[_Item] = [(method, plan, kind) for method, plan in missing.values()]
        programs = self._export(items if kind in self._teachers else [*items, (None, None, kind)])
        self._students |= {(key, kind): one for key, one in zip(missing, programs, strict=False)}
        if kind not in self._teachers:
            self._teachers[kind] = programs[-1]
        return Programs(self._teachers[kind], {key: self._students[key, kind] for key in students})

    def forget(self) -> None:
        """Drop the students' programs."""
        self._students = {}

    def _export(self, items: list[_Item]) -> list[Program | str]:
        """Make the program of each item, or find the reason why it has none; report each as it ends."""
        programs: dict[int, Program | str] = {}
        for event in self._cluster.run(program, items):
            if isinstance(event, Done | Failed):
                programs[event.index] = event.value if isinstance(event, Done) else event.error
                method = items[event.index][0]
                self._report("exporting", len(programs), len(items), "teacher" if method is None else method.name)
        return [programs[index] for index in range(len(items))]


def _draw(model: nn.Module) -> None:
    """Draw the weights anew, always the same, of a size that keeps activations in range from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

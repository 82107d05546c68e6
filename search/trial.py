"""One trial on a worker: the pipeline of `methods`, then the latency of what it made beside the teacher's."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from cluster import interleaved
from methods.base import Plan
from methods.chain import AnyMethod
from methods.pipeline import Bench, Outcome, Progress, rebuild, trial
from methods.training import Recipe
from search.spec import DeviceSpec


@dataclass(frozen=True)
class Measured:
    """An outcome and, per device, the student's and the teacher's latency in milliseconds."""

    outcome: Outcome
    latency_ms: Mapping[str, Mapping[str, float]]
    teacher_latency_ms: Mapping[str, Mapping[str, float]]


def run(
    bench: Bench, method: AnyMethod, plan: Plan, recipe: Recipe, seed: int, devices: Mapping[str, DeviceSpec]
) -> Generator[Progress, None, Measured]:
    """Runs one trial; yields progress, returns what was measured."""
    outcome = yield from trial(bench, method, plan, recipe, seed)
    student = rebuild(bench.teacher, method, plan, outcome.state)
    both = {
        name: latency({"student": student, "teacher": bench.teacher}, bench, device) for name, device in devices.items()
    }
    return Measured(
        outcome,
        latency_ms={name: found["student"] for name, found in both.items()},
        teacher_latency_ms={name: found["teacher"] for name, found in both.items()},
    )


def latency(models: Mapping[str, nn.Module], bench: Bench, device: DeviceSpec) -> dict[str, dict[str, float]]:
    """The latency of each model on this machine's CPU, measured in turn, as `min`, `p50` and `p95` milliseconds."""
    shape = (device.batch, *bench.calibration.shape[1:])
    images = torch.from_numpy(np.resize(bench.calibration, shape))  # repeated where the batch asks for more
    on_cpu = {name: copy.deepcopy(model).cpu().eval() for name, model in models.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(device.threads)
    try:
        with torch.inference_mode():
            found = interleaved({name: partial(model, images) for name, model in on_cpu.items()})
    finally:
        torch.set_num_threads(threads)
    return {name: asdict(value) for name, value in found.items()}

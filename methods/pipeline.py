"""The work of a worker: score a shard, or run one trial from a plan to a measured student."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import Plan, Scores, Shard
from methods.chain import AnyMethod, Chain, link_plans, needs_settling, student_of
from methods.network import count_macs, count_params
from methods.protocol import Method, PerInput
from methods.state import arrays_of, load_arrays
from methods.training import CLASSIFICATION, Judgement, Metric, Recipe, Samples, Task, judge, parts, reads
from methods.training.layout import running_layout

COMPARED = 512
"""Validation images on which the outputs of a student and its teacher are compared, labels aside."""


class PlanMismatch(AssertionError):
    """A student whose cost is not that of its plan: a fault of ours, never of the user's."""


Before: TypeAlias = tuple[tuple[Method, str], ...]
"""The links of a chain that were planned already, each with its plan as JSON text."""


@dataclass(frozen=True, eq=False)
class WorkerInputs:
    """The teacher and the data that a worker may see (never the test set), loaded once.

    Without `refit` the weights of students are those of their teacher, as far as the surgery left them. `task` says
    what the teacher's outputs mean.
    """

    teacher: nn.Module
    train: Samples
    validation: Samples
    calibration: np.ndarray
    metric: Metric
    refit: bool = True
    task: Task = CLASSIFICATION

    def judged(self, student: nn.Module) -> Judgement:
        """Judge a student on the validation images."""
        return judge(student, self.validation, self.metric, task=self.task)


@dataclass(frozen=True)
class Progress:
    """`top1` on the validation set after `step` of `steps` steps of recovery."""

    step: int
    steps: int
    top1: float


@dataclass(frozen=True)
class Outcome:
    """The result of a trial: top-1 on the validation set at three moments, counted costs, and the student's state.

    The three moments are after `apply`, which who only looks leaves out, after `settle` and at the end. `macs` and
    `params` are counted on the student itself. A gated student also has the mean over the calibration images, the mean
    over the validation images and the most of any calibration image. `hits` `(n,)` tells whether each validation image
    is classified right at the end, if the metric is top-1. `size_bytes` is that of its state as stored. `state` maps
    each name of `state_dict()` to its array: with the plan, it is the whole student.
    """

    top1_surgery: float | None
    top1_bn: float
    top1_validation: float
    macs: int
    params: int
    size_bytes: int
    seconds: float
    state: Mapping[str, np.ndarray]
    hits: np.ndarray | None = None
    macs_expected: int | None = None
    macs_expected_validation: int | None = None
    macs_worst: int | None = None


def score(inputs: WorkerInputs, method: Method, shard: Shard, seed: int, before: Before = ()) -> Scores:
    """Score one shard on the worker's device: of the teacher, or of the student that the links `before` lead to."""
    _, calibration = on_device(inputs)
    return method.score(shard, _student_of(inputs, before), calibration, seed)


def steps_of(methods: Sequence[Method], plans: Sequence[Plan]) -> Before:
    """Return links and their plans as `score` takes them."""
    return tuple(
        (method, json.dumps(plan.to_json(), sort_keys=True)) for method, plan in zip(methods, plans, strict=True)
    )


@lru_cache(maxsize=8)
def _student_of(inputs: WorkerInputs, before: Before) -> nn.Module:
    """Build the student of the links so far. The latest are kept: a link's shards and all tries of it start there."""
    teacher, calibration = on_device(inputs)
    steps = [(method, Plan.from_json(json.loads(text))) for method, text in before]
    return student_of(teacher, steps, calibration, refit=inputs.refit)


def trial(
    inputs: WorkerInputs, method: AnyMethod, plan: Plan, recipe: Recipe, seed: int
) -> Generator[Progress, None, Outcome]:
    """Apply, settle and recover: yields progress, first that of step 0, returns the outcome.

    Raises:
        PlanMismatch: the student's counted cost differs from the plan's.
    """
    started = time.perf_counter()
    teacher, calibration = on_device(inputs)
    student = _built(inputs, method, plan)
    last = settled = surgery = inputs.judged(student)
    if needs_settling(method, refit=inputs.refit):
        method.settle(student, plan, calibration)
        last = settled = inputs.judged(student)
    if recipe.steps:
        yield Progress(0, recipe.steps, settled.value)
    for step in method.recover(student, teacher, inputs.train, replace(recipe, task=inputs.task), seed):
        last = inputs.judged(student)
        yield Progress(step, recipe.steps, last.value)
    if isinstance(student, PerInput) and recipe.steps:  # training moved what the thresholds are compared with
        method.settle(student, plan, calibration)
        last = inputs.judged(student)
    found = _outcome(inputs, student, plan, (surgery, settled, last), started)
    return replace(found, state=arrays_of(student))


def look(inputs: WorkerInputs, method: AnyMethod, plan: Plan) -> Outcome:
    """Apply and settle, but do not train: returns the outcome of no steps of recovery, without the student's state.

    Raises:
        PlanMismatch: as `trial` does.
    """
    started = time.perf_counter()
    _, calibration = on_device(inputs)
    student = _built(inputs, method, plan)
    if needs_settling(method, refit=inputs.refit):
        method.settle(student, plan, calibration)
    settled = inputs.judged(student)
    return _outcome(inputs, student, plan, (None, settled, settled), started)


def _built(inputs: WorkerInputs, method: AnyMethod, plan: Plan) -> nn.Module:
    """Return the student of a plan, in the layout that it runs fastest in."""
    teacher, calibration = on_device(inputs)
    student = method.apply(teacher, plan, calibration if inputs.refit else None)
    macs, params = count_macs(student, calibration[:1]), count_params(student)
    if (macs, params) != (plan.macs, plan.params):
        raise PlanMismatch(
            f"{plan.method} planned {plan.macs} MACs and {plan.params} params, but the student has {macs} and {params}"
        )
    return student.to(memory_format=running_layout(student))


def _outcome(
    inputs: WorkerInputs,
    student: nn.Module,
    plan: Plan,
    moments: tuple[Judgement | None, Judgement, Judgement],
    started: float,
) -> Outcome:
    """Return what a student reached at the three moments and what it costs, without its state."""
    surgery, settled, last = moments
    return Outcome(
        top1_surgery=None if surgery is None else surgery.value,
        top1_bn=settled.value,
        top1_validation=last.value,
        hits=last.hits,
        macs=plan.macs,
        params=plan.params,
        size_bytes=size_bytes(student),
        seconds=time.perf_counter() - started,
        state={},
        **(_expected(student, inputs) if isinstance(student, PerInput) else {}),
    )


@torch.no_grad()
def distance(inputs: WorkerInputs, chain: Chain, plan: Plan) -> float:
    """Return how far a chain's untrained student is from the teacher, on at most `COMPARED` validation images.

    That is the mean of the task's measure of mimicry, as for distillation; labels are not read.
    """
    teacher, calibration = on_device(inputs)
    *plans, last = link_plans(plan)
    before = _student_of(inputs, steps_of(chain.links[:-1], plans))
    student = chain.links[-1].apply(before, last, calibration if inputs.refit else None)
    student.to(memory_format=running_layout(student))
    if needs_settling(chain, refit=inputs.refit):
        chain.settle(student, plan, calibration)
    student.eval()
    batches = (inputs.validation.batch(some)[0].to(calibration.device) for some in reads(inputs.validation, COMPARED))
    apart = [
        inputs.task.mimicry(student(images), teacher(images), Recipe(steps=0).temperature)
        for batch in batches
        for images in parts(batch)
    ]
    return float(torch.cat(apart).mean())


def _expected(student: PerInput, inputs: WorkerInputs) -> dict[str, int]:
    """Count the MACs that a student needs per image: the mean on either set, and the most."""
    _, calibration = on_device(inputs)
    calibrated = student.instance_macs(calibration).double()
    batches = (inputs.validation.batch(some)[0] for some in reads(inputs.validation))
    validated = torch.cat([student.instance_macs(part).double() for batch in batches for part in parts(batch)])
    return {
        "macs_expected": round(float(calibrated.mean())),
        "macs_expected_validation": round(float(validated.mean())),
        "macs_worst": int(calibrated.max()),
    }


def size_bytes(model: nn.Module) -> int:
    """Count the bytes of everything in the state of `model`."""
    values = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in values)


def rebuild(teacher: nn.Module, method: AnyMethod, plan: Plan, state: Mapping[str, np.ndarray]) -> nn.Module:
    """Rebuild the student of a past trial, in eval mode, from its plan and its state."""
    student = method.apply(teacher, plan).to(memory_format=torch.contiguous_format)  # as files hold it
    load_arrays(student, state)
    return student.eval()


def on_device(inputs: WorkerInputs) -> tuple[nn.Module, Tensor]:
    """Return the teacher in eval mode and in the layout that it runs fastest in, and the calibration images.

    Both are on this process's device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = inputs.teacher.to(device).to(memory_format=running_layout(inputs.teacher))
    return teacher.eval(), torch.from_numpy(inputs.calibration.copy()).to(device)

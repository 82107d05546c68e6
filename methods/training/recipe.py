"""The words of training: samples, a recipe, a metric, an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from torch import Tensor

from methods.training.task import CLASSIFICATION, Task

Metric: TypeAlias = Callable[[Tensor, Tensor], float]
"""The answers to all images, as a task has them (logits `(n, classes)` of a classifier), and labels to a scalar to
maximise."""


Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Images `(m, c, h, w)` and labels `(n, ...)` of a batch to the loss of one step; it is called once per step, in order.

The images are this process's part of the batch, the labels and the loss those of the whole batch: see
`methods.training.distributed`.
"""


Chance: TypeAlias = np.random.Generator | None
"""The generator that augmentation draws from, or none for no augmentation."""


WHOLE = slice(None)


class Samples(Protocol):
    """Labelled images that can be indexed in batches."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Return inputs `(n, c, h, w)` float32 and labels `(n, ...)`, randomly augmented if a generator is given.

        A caller may ask for a `part` of these only: its images are the same as among all of them.
        """
        ...


@dataclass(frozen=True)
class Recipe:
    """The settings of a training: SGD with Nesterov momentum on a one-cycle schedule.

    `distill` is the weight of the teacher's softened outputs beside the labels, 0 to 1. Without `labels` the student
    mimics the teacher alone: its last feature map if the cut left that and the classifier whole, its outputs
    otherwise. `images` is the number of training images that recovery may see, drawn by the seed (None: all of them).
    `report_every` is the number of steps between two evaluations; the last step is always one. `task` says what outputs
    and labels mean.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    distill: float = 0.5
    temperature: float = 4.0
    labels: bool = True
    images: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    report_every: int = 100
    task: Task = CLASSIFICATION

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that decide the training, but for the task, which is that of a whole search."""
        return {key: value for key, value in asdict(replace(self, task=CLASSIFICATION)).items() if key != "task"}

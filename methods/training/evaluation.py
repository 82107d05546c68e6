"""Judge a network on data, and re-estimate the statistics of its batch norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from methods.training import distributed
from methods.training.recipe import Metric, Samples
from methods.training.task import CLASSIFICATION, Task, top1

BatchNorm: TypeAlias = nn.modules.batchnorm._BatchNorm


def norms_of(model: nn.Module) -> list[BatchNorm]:
    """Return the batch norms that keep running statistics."""
    return [one for one in model.modules() if isinstance(one, BatchNorm) and one.track_running_stats]


@torch.no_grad()
def recalibrate(
    model: nn.Module, images: Tensor, batch_size: int = 256, *, norms: Sequence[BatchNorm] | None = None
) -> None:
    """Re-estimate the running statistics of `norms`, by default of all batch norms of `model`, over `images`, in place.

    They are plain averages over equal batches, none of which is a single image: that has no variance.
    """
    if len(images) < 2:
        return
    norms = norms_of(model) if norms is None else norms
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    device = next(model.parameters()).device
    for batch in torch.tensor_split(images, -(-len(images) // batch_size)):
        model(batch.to(device, copy=True))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


class Judgement(NamedTuple):
    """The value of a metric over some images and, where it is top-1, whether each was classified right, `(n,)` bool."""

    value: float
    hits: np.ndarray | None


READ = 512
"""Images read at a time."""

SEEN, MOST_PIXELS = 128, 1 << 21
"""Images that a network sees at a time where no gradients are kept, and their pixels: maps of more of them leave the
cache of a CPU (a ResNet-20 in pairs of factors: 1.4 times slower with 512), and 41 of 224 x 224 take 1 GiB in a
VGG-16."""


def reads(data: Samples, most: int | None = None) -> list[np.ndarray]:
    """Split the indices of the first `most` images of `data`, by default of all, into equal reads."""
    count = len(data) if most is None else min(most, len(data))
    return np.array_split(np.arange(count), max(1, -(-count // READ)))


def parts(images: Tensor) -> tuple[Tensor, ...]:
    """Split `images` `(n, c, h, w)` into parts whose maps there is memory for."""
    return torch.split(images, max(1, min(SEEN, MOST_PIXELS // max(1, math.prod(images.shape[2:])))))


def evaluate(model: nn.Module, data: Samples, metric: Metric, *, task: Task = CLASSIFICATION) -> float:
    """Return `metric` of `model` over all of `data`, as `judge` finds it."""
    return judge(model, data, metric, task=task).value


@torch.no_grad()
def judge(model: nn.Module, data: Samples, metric: Metric, *, task: Task = CLASSIFICATION) -> Judgement:
    """Judge `model` in eval mode by `metric` over all of `data`; several processes that do the same share the images.

    The metric reads the task's answers of all images at once.

    Raises:
        FloatingPointError: an output is NaN, which an argmax would take for the first class.
    """
    model.eval()
    device = next(model.parameters()).device
    answers, labels = [], []
    for indices in reads(data):
        images, truth = data.batch(indices, part=distributed.part(len(indices)))
        mine = torch.cat([_answers(model, part, task) for part in parts(images.to(device))])
        answers.append(distributed.joined(mine, len(indices)).cpu())
        labels.append(distributed.joined(truth.to(device), len(indices)).cpu())
    found, wanted = torch.cat(answers), torch.cat(labels)
    is_right = (found.argmax(1) == wanted).numpy() if metric is top1 else None
    return Judgement(float(metric(found, wanted)), is_right)


def _answers(model: nn.Module, images: Tensor, task: Task) -> Tensor:
    outputs = model(images)
    if bool(outputs.isnan().any()):
        raise FloatingPointError("the network returned NaN; expected numbers; lower the learning rate")
    return task.answers(outputs)

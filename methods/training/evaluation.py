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


MOST_IMAGES, MOST_PIXELS = 512, 1 << 21
"""Images of one pass without gradients, and their pixels: 512 of 64 x 64, or 41 of 224 x 224, whose maps take 1 GiB in
a VGG-16."""


def passes(data: Samples, count: int | None = None) -> list[np.ndarray]:
    """Split the first `count` images of `data`, by default all, into passes that memory is enough for."""
    count = len(data) if count is None else min(count, len(data))
    pixels = math.prod(data.batch(np.arange(1))[0].shape[2:]) if count else 1
    most = max(1, min(MOST_IMAGES, MOST_PIXELS // pixels))
    return np.array_split(np.arange(count), max(1, -(-count // most)))


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
    for indices in passes(data):
        images, truth = data.batch(indices, part=distributed.part(len(indices)))
        outputs = distributed.joined(model(images.to(device)), len(indices))
        if bool(outputs.isnan().any()):
            raise FloatingPointError("the network returned NaN; expected numbers; lower the learning rate")
        answers.append(task.answers(outputs).cpu())
        labels.append(distributed.joined(truth.to(device), len(indices)).cpu())
    found, wanted = torch.cat(answers), torch.cat(labels)
    is_right = (found.argmax(1) == wanted).numpy() if metric is top1 else None
    return Judgement(float(metric(found, wanted)), is_right)

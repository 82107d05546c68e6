"""Judge a network on data, and re-estimate the statistics of its batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from methods.training import distributed
from methods.training.recipe import Metric, Samples

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


@torch.no_grad()
def evaluate(model: nn.Module, data: Samples, metric: Metric, batch_size: int = 512) -> float:
    """Return `metric` of `model` in eval mode over all of `data`; several processes that do the same share the images.

    Raises:
        FloatingPointError: a logit is NaN, which an argmax would take for the first class.
    """
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for indices in np.array_split(np.arange(len(data)), max(1, -(-len(data) // batch_size))):
        images, truth = data.batch(indices, part=distributed.part(len(indices)))
        logits.append(distributed.joined(model(images.to(device)), len(indices)).float().cpu())
        labels.append(distributed.joined(truth.to(device), len(indices)).cpu())
    if any(bool(part.isnan().any()) for part in logits):
        raise FloatingPointError("the network returned NaN logits; expected numbers; lower the learning rate")
    return float(metric(torch.cat(logits), torch.cat(labels)))


def top1(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows of `logits` `(n, classes)` whose largest entry is at `labels` `(n,)`.

    >>> top1(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    0.5
    """
    return float((logits.argmax(1) == labels).double().mean())

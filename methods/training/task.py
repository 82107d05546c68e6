"""What the outputs of a network mean: how they are trained, mimicked and judged.

A task is all that training knows of outputs. Refitting, scoring, allocating and cutting need none of it: they look at
layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255
"""The label of pixels that count neither in the loss nor in the metric."""

SMALLEST_VARIANCE = 1e-12
"""Targets that vary less than this are taken to be equal."""


class Task(Protocol):
    """The meaning of a network's outputs `(n, ...)` and of the labels `(n, ...)` of its images."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss `(n,)` of each image beside its label."""
        ...

    def mimicry(self, outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return how far the outputs for each image are from the teacher's, `targets`: `(n,)`, 0 where they agree."""
        ...

    def answers(self, outputs: Tensor) -> Tensor:
        """Return what of the outputs a metric reads, `(n, ...)`: a search keeps no more of the validation set's."""
        ...

    def labels(self, outputs: Tensor) -> Tensor:
        """Return the labels `(n, ...)` that the outputs amount to, where images have no others."""
        ...

    def score(self, answers: Tensor, labels: Tensor) -> float:
        """Return how good the answers to all images are, a share from 0 to 1."""
        ...


@dataclass(frozen=True)
class Classification:
    """One label per image: outputs are logits `(n, classes)`, labels `(n,)` int64, the score is top-1."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy `(n,)`."""
        return F.cross_entropy(outputs, labels, reduction="none")

    def mimicry(self, outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the softened divergence `(n,)`, see `softened_divergence`."""
        return softened_divergence(outputs, targets, temperature)

    def answers(self, outputs: Tensor) -> Tensor:
        """Return the logits: a user's metric may read more than the class."""
        return outputs.float()

    def labels(self, outputs: Tensor) -> Tensor:
        """Return the class `(n,)` of the largest logit."""
        return outputs.argmax(1)

    def score(self, answers: Tensor, labels: Tensor) -> float:
        """Return top-1."""
        return top1(answers, labels)


CLASSIFICATION = Classification()


@dataclass(frozen=True)
class Segmentation:
    """One label per pixel: outputs are logits `(n, classes, h, w)`, labels `(n, h, w)`, the score is mean IoU.

    Pixels whose label is `IGNORED` do not count.
    """

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy `(n,)` of each image's pixels; 0 for one whose pixels are all ignored."""
        found = F.cross_entropy(outputs, labels.long(), reduction="none", ignore_index=IGNORED)
        return found.flatten(1).sum(1) / (labels != IGNORED).flatten(1).sum(1).clamp(min=1)

    def mimicry(self, outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the mean softened divergence `(n,)` of each image's pixels."""
        return softened_divergence(outputs, targets, temperature).flatten(1).mean(1)

    def answers(self, outputs: Tensor) -> Tensor:
        """Return the class of every pixel, `(n, h, w)`: uint8 where it fits."""
        return outputs.argmax(1).to(torch.uint8 if outputs.shape[1] <= IGNORED else torch.int32)

    def labels(self, outputs: Tensor) -> Tensor:
        """Return the class of every pixel, `(n, h, w)` int64."""
        return outputs.argmax(1)

    def score(self, answers: Tensor, labels: Tensor) -> float:
        """Return the mean IoU of the classes that answers or labels hold."""
        return mean_iou(answers, labels)


@dataclass(frozen=True)
class Regression:
    """Numbers of any shape: outputs and labels are `(n, ...)` alike, the score is R squared.

    Losses are squared errors as a share of the variance of the targets over the batch, so that a learning rate does as
    well for metres as for millimetres.
    """

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error `(n,)` as a share of the labels' variance."""
        return _squared_errors(outputs, labels)

    def mimicry(self, outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the mean squared error `(n,)` as a share of the targets' variance."""
        return _squared_errors(outputs, targets)

    def answers(self, outputs: Tensor) -> Tensor:
        """Return the outputs."""
        return outputs.float()

    def labels(self, outputs: Tensor) -> Tensor:
        """Return the outputs."""
        return outputs.float()

    def score(self, answers: Tensor, labels: Tensor) -> float:
        """Return R squared, 0 where it is negative."""
        return r_squared(answers, labels)


def softened_divergence(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened distributions over axis 1 times the squared temperature: `(n, c, ...)` to `(n, ...)`.

    Source: Hinton et al. 2015, section 2.1.
    """
    student = F.log_softmax(outputs.float() / temperature, dim=1)
    teacher = F.log_softmax(targets.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2


def top1(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows of `logits` `(n, classes)` whose largest entry is at `labels` `(n,)`.

    >>> top1(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    0.5
    """
    return float((logits.argmax(1) == labels).double().mean())


def mean_iou(answers: Tensor, labels: Tensor) -> float:
    """Return the mean over classes of intersection over union, of classes `(n, ...)` of all pixels, ignored ones aside.

    Intersections and unions are summed over all images; classes that occur in neither are left out. NaN without pixels.
    Source: Everingham et al. 2015, the metric of PASCAL VOC's segmentation.

    >>> mean_iou(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 255]]))
    0.5
    """
    counted = labels != IGNORED
    found, wanted = answers[counted].long(), labels[counted].long()
    classes = int(max(found.max(), wanted.max())) + 1 if len(found) else 0
    right, ours, theirs = (one.bincount(minlength=classes) for one in (wanted[found == wanted], found, wanted))
    union = ours + theirs - right
    return float((right / union)[union > 0].double().mean()) if classes else math.nan


def r_squared(answers: Tensor, labels: Tensor) -> float:
    """Return the share of the labels' variance that the answers explain, both `(n, ...)`; 0 where that is negative.

    The variance of each element is about its own mean over the images. Equal labels are explained by equal answers.

    >>> r_squared(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
    0.5
    """
    wanted = labels.double()
    error = float((answers.double() - wanted).square().mean())
    variance = float((wanted - wanted.mean(0)).square().mean())
    return max(0.0, 1 - error / max(variance, SMALLEST_VARIANCE))


def _squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    targets = targets.float()
    variance = (targets - targets.mean(0)).square().mean().clamp(min=SMALLEST_VARIANCE)
    errors = (outputs.float() - targets).square().flatten(1).mean(1) if outputs.ndim > 1 else None
    return ((outputs.float() - targets).square() if errors is None else errors) / variance

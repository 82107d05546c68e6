"""A first look at the teacher's answers: a metric that is no share is refused, and a teacher that is odd is told."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor, nn

from methods.training import Samples, Task, top1
from search.base import WorkloadError
from search.workload.usercode import UserMetric

log = logging.getLogger(__name__)

LOOKED_AT, MOST_MAPS = 128, 1 << 26
"""The training images that are looked at: fewer, where their outputs have more numbers in all."""


@torch.no_grad()
def answers(teacher: nn.Module, train: Samples) -> tuple[Tensor, Tensor]:
    """Return the outputs and labels of the first training images; warn if other calls give them other outputs."""
    with torch.random.fork_rng(devices=[]):
        one = teacher(train.batch(np.arange(1))[0])
    count = max(2, min(LOOKED_AT, MOST_MAPS // max(one.numel(), 1)))
    images, labels = train.batch(np.arange(min(count, len(train))))
    half = -(-len(images) // 2)
    with torch.random.fork_rng(devices=[]):
        logits, again = (teacher(images.clone()).float() for _ in range(2))
        fewer = teacher(images[:half].clone()).float()
    if not _is_close(logits, again):
        log.warning(
            "the teacher answers the same images differently from call to call in evaluation; expected equal outputs; "
            "look in its forward for randomness or for state that it changes, since no result can be repeated"
        )
    elif not _is_close(logits[:half], fewer):
        log.warning(
            "the teacher answers an image differently if other images are in its batch; expected an answer to each "
            "alone; look in its forward for means over the batch or for norms without running statistics, since "
            "every accuracy depends on the size of the batches"
        )
    return logits, labels


def _is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def warn_of(logits: Tensor, labels: Tensor | None) -> None:
    """Warn of a teacher that is right no more often than chance, or that answers with probabilities.

    Without labels, warn of one that has the same answer for all images.
    """
    answers = logits.argmax(1)
    if labels is None and len(answers) > 1 and len(set(answers.tolist())) == 1:
        log.warning(
            "the teacher gives all of %d training images the same answer, %d, which any network agrees with; check "
            "model.weights and the preparation of the images", len(answers), answers[0],
        )  # fmt: skip
    if labels is not None:
        _warn_of_chance(logits, labels)
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones(len(logits))):
        log.warning(
            "the teacher's outputs are probabilities already: each row sums to 1; expected logits, which training and "
            "mimicking take the softmax of; return them without the softmax"
        )


def warn_of_nothing(task: Task, outputs: Tensor, labels: Tensor) -> None:
    """Warn of a teacher whose score is none, or that answers all images alike, in any task but classification."""
    found = task.answers(outputs)
    if len(found) > 1 and bool((found == found[:1]).all()):
        log.warning(
            "the teacher answers %d training images alike; check model.weights and the preparation of the images",
            len(found),
        )
    elif task.score(found, labels) == 0:
        log.warning(
            "the teacher's score on %d training images is 0; check model.weights, the labels and the preparation of "
            "the images", len(found),
        )  # fmt: skip


def _warn_of_chance(logits: Tensor, labels: Tensor) -> None:
    right, chance = top1(logits, labels), float(labels.bincount().max()) / len(labels)
    if right <= chance + (chance * (1 - chance) / len(labels)) ** 0.5:
        log.warning(
            "the teacher is right on %.1f %% of %d training images, and the commonest label alone on %.1f %%: no more "
            "than chance; check model.weights, the order of the classes and the preparation of the images",
            100 * right, len(labels), 100 * chance,
        )  # fmt: skip


def check_metric(metric: UserMetric, logits: Tensor, labels: Tensor) -> None:
    """Refuse a metric whose values lie outside its range, or get worse as answers get better.

    It is tried on the teacher's answers, on right and on wrong ones. One that raises is told at its first use, since a
    few images may lack classes that it needs.

    Raises:
        WorkloadError: it does; the message has its values.
    """
    right = 10 * nn.functional.one_hot(labels, logits.shape[1]).float()
    try:
        found, best, worst = (metric.value(given, labels) for given in (logits, right, right.roll(1, 1)))
    except WorkloadError:
        return
    scale = metric.scale
    if all(map(metric.is_in_range, (found, best, worst))) and scale.share(worst) <= scale.share(best):
        return
    low, high = sorted((scale.worst, scale.best))
    expected = "larger" if scale.worst < scale.best else "smaller"
    raise WorkloadError(
        f"the metric {metric.name} gave {found:.3g} for the teacher, {best:.3g} for right answers and {worst:.3g} for "
        f"wrong ones; expected values from {low:g} to {high:g}, {expected} for better answers; give metric.range, such "
        "as [0, 100] of a percentage, and metric.direction: minimize of a loss"
    )

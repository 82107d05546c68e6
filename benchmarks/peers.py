"""The students of Torch-Pruning: a teacher cut to a limit of MACs by the magnitudes or the gradients of its groups."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch_pruning
from torch import Tensor, nn
from torch_pruning import importance

from methods.base import Infeasible
from methods.network import count_macs
from methods.training import Samples
from methods.training.objective import classifier_name

PEERS: dict[str, dict[str, Any]] = {
    "torch-pruning global": {"global_pruning": True},
    "torch-pruning global 8": {"global_pruning": True, "round_to": 8},
    "torch-pruning uniform": {"global_pruning": False},
    "torch-pruning taylor": {"global_pruning": True, "importance": importance.GroupTaylorImportance()},
}
"""The rows and their options: one ranking of magnitudes for all layers, the same with widths in multiples of 8, the
same share of every layer's channels, or one ranking by weights times gradients."""

TRIES = 32
"""Pruning ratios that are tried, and again as many below the first of them that fits."""

GRADED, BATCH = 512, 128
"""Labelled training images that gradients are summed over, and the number at a time."""


def within(teacher: nn.Module, row: str, limit: int, train: Samples) -> tuple[nn.Module, float]:
    """Return the student of the smallest pruning ratio that has at most `limit` MACs, as we count them, and the ratio.

    A layer that would lose all its channels keeps them all, so a larger ratio may leave more: ratios are tried, not
    bisected. Gradients are those of the cross-entropy on the first `GRADED` images of `train`, in eval mode.

    Raises:
        Infeasible: no ratio that was tried reaches the limit.
    """
    teacher, example = _graded(teacher, train), train.batch(np.arange(1))[0]
    coarse, _ = _first(teacher, row, limit, example, [index / TRIES for index in range(1, TRIES)])
    fine = [coarse - (TRIES - index) / TRIES**2 for index in range(1, TRIES + 1)]
    ratio, student = _first(teacher, row, limit, example, fine)
    return student, ratio


def _first(
    teacher: nn.Module, row: str, limit: int, example: Tensor, ratios: Sequence[float]
) -> tuple[float, nn.Module]:
    for ratio in ratios:
        student = pruned(teacher, ratio, example, PEERS[row])
        if count_macs(student, example) <= limit:
            return ratio, student
    raise Infeasible(f"no pruning ratio of {row} has at most {limit:,} MACs", {})


def _graded(teacher: nn.Module, train: Samples) -> nn.Module:
    """Return a copy of the teacher whose parameters hold their gradients."""
    teacher = copy.deepcopy(teacher).eval()
    for indices in np.split(np.arange(GRADED), GRADED // BATCH):
        images, labels = train.batch(indices)
        nn.functional.cross_entropy(teacher(images), labels, reduction="sum").backward()
    return teacher


def pruned(teacher: nn.Module, ratio: float, example: Tensor, options: Mapping[str, Any]) -> nn.Module:
    """Return a copy of the teacher, which holds gradients, without `ratio` of its channels, cut by Torch-Pruning.

    The classifier keeps its outputs. `options` replace defaults of the pruner.
    """
    student = copy.deepcopy(teacher).eval()
    for parameter, its in zip(student.parameters(), teacher.parameters(), strict=True):
        parameter.grad = None if its.grad is None else its.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's tracer
        torch_pruning.pruner.BasePruner(
            student,
            example,
            pruning_ratio=ratio,
            ignored_layers=[student.get_submodule(classifier_name(student))],
            **{"importance": importance.GroupMagnitudeImportance(), **options},
        ).step()
    return student

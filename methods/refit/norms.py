"""The statistics of a student's batch norms, from those of its teacher and from how the maps of the two differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from methods.hooks import only_input
from methods.training.evaluation import BatchNorm


class Norms:
    """The batch norms that a student has from its teacher, by name.

    Let the teacher run while it is `watched`, and then the student, in eval mode, while its norms are `following`. A
    norm that runs more than once ends with the statistics of its last run.

    Args:
        kept: by name, the teacher's channels, rising, that a norm of the student still has, where it lost some.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, kept: Mapping[str, np.ndarray]) -> None:
        theirs = _norms(teacher)
        self._pairs = {name: (norm, theirs[name]) for name, norm in _norms(student).items() if name in theirs}
        self._read: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._pairs}
        self._kept = kept

    def watched(self) -> Iterator[RemovableHandle]:
        """Hook the teacher's norms, so that the mean and the variance of what each reads are known."""
        for name, (_, norm) in self._pairs.items():
            yield norm.register_forward_pre_hook(partial(self._watch, name), with_kwargs=True)

    def following(self) -> Iterator[RemovableHandle]:
        """Hook the student's norms, so that each is set for what it is about to read."""
        for name, (norm, _) in self._pairs.items():
            yield norm.register_forward_pre_hook(partial(self._follow, name), with_kwargs=True)

    def _watch(self, name: str, _: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> None:
        if (given := only_input(inputs, named)) is not None:
            mean, variance = _moments(given)
            some = self._kept.get(name, slice(None))
            self._read[name].append((mean[some], variance[some]))

    def _follow(self, name: str, _: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> None:
        if (given := only_input(inputs, named)) is None or not self._read[name]:
            return
        (mean, variance), (their_mean, their_variance) = _moments(given), self._read[name].pop(0)
        (student, teacher), some = self._pairs[name], self._kept.get(name, slice(None))
        (running_mean, running_variance), (whole_mean, whole_variance) = _statistics(student), _statistics(teacher)
        running_mean.copy_(whole_mean[some] + mean - their_mean)
        grown = (variance + student.eps) / (their_variance + student.eps)
        running_variance.copy_((grown * (whole_variance[some] + student.eps) - student.eps).clamp(min=0))


def _norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The batch norms of a network that keep statistics, by name."""
    return {name: one for name, one in model.named_modules() if isinstance(one, BatchNorm) and one.track_running_stats}


def _statistics(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _moments(given: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance of every channel."""
    variance, mean = torch.var_mean(given, [axis for axis in range(given.ndim) if axis != 1])
    return mean, variance

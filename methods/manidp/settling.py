"""A gated network settled without training: thresholds, norms and saliencies that agree, at the scale it came with.

A mask changes the statistics of the norms and the saliencies behind it. So all are set in the order in which they run:
each gate's threshold from the saliencies that it gives, each norm from the maps that it reads, in one pass.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from methods.hooks import hooked
from methods.manidp.gates import Gate, Gated
from methods.manidp.losses import quantile_threshold
from methods.manidp.thresholds import approach, calibrate
from methods.training.evaluation import BatchNorm, norms_of, recalibrate

_log = logging.getLogger(__name__)

FLOOR = 0.1
"""Least variance of a channel as a share of what it was. Where masks silence a channel on almost every image, its
variance is next to 0, and the next image that needs it would be raised a hundredfold."""

DEVIATION = 0.5
"""The sum over all gates of the root mean square deviation of fresh saliencies from 1."""

FAR = 10.0
"""Outputs so many times as large as the ungated network's, or as 1, are none of a compressed teacher."""

BATCH = 128
"""Most images in a pass that only looks."""


class Statistics(NamedTuple):
    """The running mean and variance of a norm as they came, and what the calibration images had then."""

    mean: Tensor
    variance: Tensor
    seen_mean: Tensor
    seen_variance: Tensor


Before: TypeAlias = Mapping[BatchNorm, Statistics]


@torch.no_grad()
def quieten(student: Gated, images: Tensor) -> None:
    """Shrink the output weights of fresh gates until saliencies deviate from 1 no more than the network can bear.

    A gate multiplies its convolution's outputs by what it makes of the means of its inputs. So a change of their scale
    grows from gate to gate, the more the saliencies deviate: all of them together by a factor that does not depend on
    the number of gates if their deviations add up to `DEVIATION`.

    Source: none. Differs: the authors' gates are not fit for a trained network before they are trained themselves.
    """
    allowed = DEVIATION / len(student.gates)

    def shrink(gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(gate, Gate)
        hidden = torch.relu(gate.reduce(inputs[0].type_as(gate.reduce.weight).mean((2, 3))))
        deviation = (hidden @ gate.expand.weight.T).square().mean().sqrt()
        gate.expand.weight.mul_((allowed / deviation.clamp(min=1e-30)).clamp(max=1))

    student.eval()
    with hooked(gate.register_forward_pre_hook(shrink) for gate in student.gates):
        student(images[:BATCH].to(next(student.parameters()).device, copy=True))


@torch.no_grad()
def settle(student: Gated, images: Tensor, target: int) -> None:
    """Set thresholds and norm statistics so that `images` `(n, c, h, w)` need `target` MACs on average, or a bit less.

    A norm's statistics move by as much as those of what it reads do on `images`. The norm of a depthwise convolution
    keeps those it came with: it reads zeros where a channel is not active, but what it makes of them is masked again.
    All norms keep them where outputs were else not finite or far larger than the ungated network's. See
    `thresholds.calibrate`.

    Source: none; the authors only train.
    """
    inherited = {site.norm for site in student.sites if site.is_depthwise}
    kept = [student.network.get_submodule(name) for name in inherited if name]
    norms = [norm for norm in norms_of(student) if norm not in kept]
    with hooked(mask.register_forward_hook(lambda _, inputs, __: inputs[0]) for mask in student.masks):
        scale = _scale(student, images)
    before = _statistics_of(student, images, norms)
    if before and len(images) > 1:
        approach(student, images, target, lambda rate, _: _set_to(rate, student, images, before))
        _estimate(student, images, _behind_the_masks(student, images, list(before)), before)
    calibrate(student, images, target)
    if _scale(student, images) <= FAR * max(1.0, scale):
        return
    for norm, came in before.items():
        _set(norm, came.mean, came.variance)
    calibrate(student, images, target)
    _log.warning(
        "with norms that follow the gates, outputs are no longer of the scale they were; the norms keep the "
        "statistics they came with; calibrate on more images, or allow more MACs"
    )


def _statistics_of(student: Gated, images: Tensor, norms: Sequence[BatchNorm]) -> dict[BatchNorm, Statistics]:
    """The statistics of norms as they came, which stay, and as the images have them with the thresholds that came."""
    came = [_statistics(norm) for norm in norms]
    recalibrate(student, images, norms=norms)
    found = {norm: Statistics(*before, *_statistics(norm)) for norm, before in zip(norms, came, strict=True)}
    for norm, before in found.items():
        _set(norm, before.mean, before.variance)
    return found


def _statistics(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.clone(), norm.running_var.clone()


def _set(norm: BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _set_to(rate: float, student: Gated, images: Tensor, before: Before) -> None:
    """Set thresholds and norms for one remain rate, in the order in which they run."""
    found: list[list[Tensor]] = [[] for _ in student.masks]

    def follow(gate: int, mask: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) == 2:  # not where a depthwise convolution inherits the mask
            found[gate].append(quantile_threshold(inputs[1], rate))
            student.masks[gate].threshold.copy_(found[gate][-1])

    student.eval()
    masks = enumerate(student.masks)
    with hooked(mask.register_forward_pre_hook(partial(follow, gate)) for gate, mask in masks):
        _estimate(student, images, list(before), before)
    for mask, thresholds in zip(student.masks, found, strict=True):
        mask.threshold.copy_(torch.stack(thresholds).mean())


def _estimate(student: Gated, images: Tensor, norms: Sequence[BatchNorm], before: Before) -> None:
    """Move some norms by as much as the masks move what they read, and keep their variances from vanishing."""
    recalibrate(student, images, norms=norms)
    for norm in norms:
        came, (mean, variance) = before[norm], _statistics(norm)
        grown = (variance + norm.eps) / (came.seen_variance + norm.eps)
        moved = grown * (came.variance + norm.eps) - norm.eps
        _set(norm, came.mean + mean - came.seen_mean, torch.maximum(moved, FLOOR * came.variance))


def _behind_the_masks(student: Gated, images: Tensor, norms: Sequence[BatchNorm]) -> list[BatchNorm]:
    """The norms that run after the last mask, so that no gate sees them: its threshold was moved once more."""
    order: list[nn.Module] = []
    watched = [*student.masks, *norms]
    with hooked(one.register_forward_pre_hook(lambda module, _: order.append(module)) for one in watched):
        student(images[:1].clone())
    last = order.index(student.masks[-1])
    return [one for one in order[last:] if isinstance(one, BatchNorm)]


def _scale(student: Gated, images: Tensor) -> float:
    """The largest absolute output for `images`; infinite where one is NaN."""
    student.eval()
    device = next(student.parameters()).device
    parts = [student(batch.to(device, copy=True)) for batch in torch.split(images, BATCH)]
    largest = float(torch.cat(parts).abs().max())
    return largest if largest == largest else float("inf")

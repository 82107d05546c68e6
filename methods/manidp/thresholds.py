"""The thresholds of a gated network, set without training so that it needs a given number of MACs on average."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from methods.manidp.gates import CLAMP, Gated, active, macs_of, saliencies
from methods.manidp.losses import beside_the_best, between, quantile_threshold
from methods.manidp.sites import Site, gated_macs, widths

_log = logging.getLogger(__name__)

PASSES = 24
"""Most passes over the images that the search for the remain rate takes."""

CLOSE = 5e-3
"""Relative error of the remain rate's MACs that is left to the last gate, and the largest shortfall in the end."""

WIDE = 2e-2
"""The error that is left to the last gate in the second half of the passes."""

TOLERANCE = 1e-3
"""Relative shortfall with which a network is left as it is, and which the first half of the passes aims at."""


def calibrate(student: Gated, images: Tensor, target: int) -> None:
    """Set every threshold so that the mean MACs over `images` `(n, c, h, w)` are `target`, or up to 0.5% below.

    All gates get the quantile of one remain rate. A mask upstream changes the saliencies downstream, so every guess is
    measured, and the next one makes up for ever less of its error. The last gate, whose mask no other gate sees,
    makes up for the rest. With too many saliencies of 0, or too few images to choose between, the mean stays further
    below the target; at worst one channel per gate is kept. A calibrated network is left as it is.

    Source: none; the authors do not calibrate.
    """
    found = saliencies(student, images)
    if _meets(_spent(student, found), target, TOLERANCE):
        return
    spent = approach(student, images, target, lambda rate, found: set_quantiles(student, found, rate))
    if not _meets(spent, target, CLOSE):
        _log.warning(
            "the thresholds give %.0f expected MACs after %d passes, expected %d; calibrate on more images",
            spent,
            PASSES,
            target,
        )


def approach(student: Gated, images: Tensor, target: int, set_to: Callable[[float, Sequence[Tensor]], None]) -> float:
    """Search the remain rate as `calibrate` says; return the mean MACs that are reached, or the most below `target`.

    `set_to` sets thresholds, and whatever goes with them, to a rate, given the saliencies of the last pass.
    """
    found = saliencies(student, images)
    least, aim = least_macs(student.sites, student.fixed_macs), float(target)
    closest, kept = float(least), list[Tensor]()
    for attempt in range(PASSES):
        rate = uniform_rate(student.sites, student.fixed_macs, aim)
        set_to(rate, found)
        found = saliencies(student, images)
        spent = _spent(student, found)
        if abs(spent - target) <= (CLOSE if attempt < PASSES // 2 else WIDE) * target:
            student.masks[-1].threshold.copy_(_last_threshold(student, found, target))
        shortfall = TOLERANCE if attempt < PASSES // 2 else CLOSE
        reached = _spent(student, found)
        if _meets(reached, target, shortfall) or (rate == 1 and spent < target):
            return reached
        if closest < reached <= target:
            closest, kept = reached, [buffer.clone() for buffer in student.buffers()]
        aim = least + (aim - least) * ((target - least) / max(1.0, spent - least)) ** ((attempt + 2) ** -0.5)
    for buffer, value in zip(student.buffers(), kept, strict=False):
        buffer.copy_(value)
    for mask in () if kept else student.masks:
        mask.threshold.fill_(CLAMP + 1)
    return closest


def set_quantiles(student: Gated, found: Sequence[Tensor], rate: float) -> None:
    """Set every threshold to the quantile of its gate's saliencies `(n, c)` at one remain rate."""
    for mask, saliency in zip(student.masks, found, strict=True):
        mask.threshold.copy_(quantile_threshold(saliency, rate))


def uniform_rate(sites: Sequence[Site], fixed_macs: int, target: float) -> float:
    """The remain rate in [0, 1] at which the network needs `target` MACs, if all channels were kept independently.

    At a rate of 0 each convolution keeps one channel, at 1 all of them.

    >>> pair = [Site("a", "", "", "a", 1, 10, 11, 10, 0, -1), Site("b", "", "", "b", 1, 11, 11, 10, 1, 0)]
    >>> uniform_rate(pair, 1000, 1000 + 10 * 6 + 6 * 6)
    0.5
    """
    once, twice = 0, 0  # what rises with the rate, and with its square
    for site in sites:
        inputs = 0 if site.is_depthwise or site.source < 0 else site.inputs - 1
        fixed_inputs = site.inputs if site.source < 0 else 1
        once += site.unit * (fixed_inputs * (site.outputs - 1) + inputs)
        twice += site.unit * inputs * (site.outputs - 1)
    room = max(0.0, target - least_macs(sites, fixed_macs))
    return min(1.0, 2 * room / (once + math.sqrt(once**2 + 4 * twice * room)))


def least_macs(sites: Sequence[Site], fixed_macs: int) -> int:
    """The MACs with one active channel per gate."""
    return fixed_macs + int(gated_macs(sites, torch.ones_like(widths(sites))))


def _last_threshold(student: Gated, found: Sequence[Tensor], target: int) -> Tensor:
    """The lowest threshold of the last gate at which the mean MACs do not exceed `target`; the others stay."""
    kept = torch.stack([active(s, mask.threshold).sum(1) for s, mask in zip(found, student.masks, strict=True)], 1)
    kept[:, -1] = 1
    least = student.fixed_macs + gated_macs(student.sites, kept)
    kept[:, -1] = 2
    slope = student.fixed_macs + gated_macs(student.sites, kept) - least
    values, order = beside_the_best(found[-1]).flatten().sort(descending=True)
    spent = slope.repeat_interleave(found[-1].shape[1])[order].cumsum(0)
    return between(values, int((spent <= target * len(least) - least.sum()).sum()))


def _spent(student: Gated, found: Sequence[Tensor]) -> float:
    return float(macs_of(student, found).double().mean())


def _meets(spent: float, target: int, shortfall: float) -> bool:
    return (1 - shortfall) * target <= spent <= target

"""Students with fewer channels: the same choice of channels, cut and refit for every method that plans widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from methods.base import Choice, Scores
from methods.network import ChannelGroup
from methods.network.cut import CRITERIA, cut_to, kept_channels, outputs_kept
from methods.network.widths import chosen_channels, from_choices, to_choices
from methods.refit.fit import refit
from methods.refit.removal import kept_runs

ELIMINATION = "elimination"
CRITERION = Choice((ELIMINATION, *CRITERIA), ELIMINATION)
"""The knob that chooses the channels that stay: by `methods.refit.removal`, or by the weights alone."""


def width_choices(
    groups: Sequence[ChannelGroup], widths: Iterable[int], criterion: str, scores: Scores
) -> dict[str, Any]:
    """The `Plan.choices` of `widths`, with the channels that stay where the images chose them."""
    named = {group.name: int(width) for group, width in zip(groups, widths, strict=True)}
    cut = [group for group in groups if named[group.name] < group.width and criterion == ELIMINATION]
    return to_choices(groups, named, criterion, {one.name: kept_runs(scores, one, named[one.name]) for one in cut})


def narrowed(teacher: nn.Module, choices: Mapping[str, Any], calibration: Tensor | None) -> nn.Module:
    """A copy of the teacher, cut to the widths of a plan's `choices` and, given images, refit to the teacher."""
    groups, widths, criterion = from_choices(choices)
    if criterion == ELIMINATION:
        kept = {name: np.array(channels) for name, channels in chosen_channels(choices).items()}
    else:
        kept = kept_channels(teacher, groups, widths, criterion)
    student = cut_to(teacher, groups, kept)
    if calibration is not None and kept:
        refit(student, teacher, calibration, kept=outputs_kept(teacher, groups, kept))
    return student

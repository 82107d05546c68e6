"""What methods that cut channels in the order of their elimination do alike: all verbs but `accepts` and `allocate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from methods.base import Plan, Scores, Shard
from methods.network import Profile
from methods.network.widths import uncut
from methods.protocol import collected, recover_student, settle_norms
from methods.refit.narrow import narrowed
from methods.refit.removal import removal_keys, removal_shards, score_removal


class Narrowing:
    """Scores are the elimination of every group's channels; students are cut to a plan's widths and refit."""

    refits: ClassVar[bool] = True

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """The elimination of every group's channels; `calibration` is `(n, c, h, w)`."""
        return removal_shards(profile, len(calibration))

    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """Orders and errors of some groups, see `score_removal`; raises as it does."""
        return score_removal(shard, teacher, calibration)

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """Orders and errors of all groups.

        Raises:
            ScoreError: one is missing, or two of the same group differ.
        """
        return collected(partials, lambda _: removal_keys(profile))

    def untouched(self, scores: Scores, profile: Profile) -> Mapping[str, str]:
        """The layers whose channel groups are all fixed, with the reasons."""
        return uncut(profile)

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """A copy of the teacher, cut to the plan's widths and refit."""
        return narrowed(teacher, plan.choices, calibration)

    settle = settle_norms
    recover = recover_student

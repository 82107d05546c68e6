"""The eight verbs of a compression method, and what every `merge` starts from.

A method is a map-reduce (`shards`, `score`, `merge`), an allocation in plain numbers (`allocate`), a surgery (`apply`,
then `settle`) and a training loop (`recover`). Scores never see a budget, so one scoring pass serves every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from methods.base import Budget, Knob, KnobValue, Plan, ScoreError, Scores, Shard
from methods.training import recalibrate, recover

if TYPE_CHECKING:
    from methods.network import Profile
    from methods.training import Recipe, Samples


class Method(Protocol):
    """Eight verbs around one frozen dataclass; `METHODS` lists the implementations."""

    is_last: ClassVar[bool]
    """Whether no link of a chain may follow: what a student of this method costs depends on the input."""

    @property
    def name(self) -> str: ...

    @property
    def knobs(self) -> Mapping[str, Knob]:
        """What Optuna may vary in `allocate`; every knob has a default, which is tried first."""
        ...

    def accepts(self, profile: Profile) -> str | None:
        """`None`, or why this network cannot be handled."""
        ...

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """The pieces of scoring work; `calibration` is `(n, c, h, w)`."""
        ...

    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """One piece's partial scores; a pure function of its arguments."""
        ...

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """All partial scores as one, bit for bit the same for any order of `partials`."""
        ...

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """The best plan within every limit of `budget`.

        Raises:
            Infeasible: no plan fits; the message names the least reachable cost.
        """
        ...

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """A new module that follows the plan, which says all there is to know of its shape; the teacher is untouched.

        Where `calibration` images `(n, c, h, w)` are given, a method may fit the new weights to what they give rise to.
        """
        ...

    def settle(self, student: nn.Module, plan: Plan, calibration: Tensor) -> None:
        """Re-estimates in place what images decide without any training: the norms' statistics, a gate's threshold."""
        ...

    def recover(
        self, student: nn.Module, teacher: nn.Module, data: Samples, recipe: Recipe, seed: int
    ) -> Iterator[int]:
        """Trains `student` in place; yields the number of steps done, whenever it is fit to be evaluated."""
        ...


@runtime_checkable
class PerInput(Protocol):
    """A student whose cost depends on the input, such as a gated one."""

    def instance_macs(self, images: Tensor) -> Tensor:
        """The MACs `(n,)` that each of `images` `(n, c, h, w)` needs."""
        ...


def settle_norms(_: object, student: nn.Module, plan: Plan, calibration: Tensor) -> None:
    """Re-estimate the norms' statistics: the `settle` of every method whose student has nothing else to set."""
    recalibrate(student, calibration)


def recover_student(
    _: object, student: nn.Module, teacher: nn.Module, data: Samples, recipe: Recipe, seed: int
) -> Iterator[int]:
    """Train the student as `methods.training.recover` does: the `recover` of every method without losses of its own."""
    return recover(student, teacher, data, recipe, seed)


class Tunable(Protocol):
    """Whatever has knobs: a method, a chain."""

    @property
    def knobs(self) -> Mapping[str, Knob]: ...


def collected(partials: Sequence[Scores], expected: Callable[[Scores], Sequence[str]]) -> Scores:
    """All entries of `partials` that are `expected` of them together, in that order: what a `merge` starts from.

    Raises:
        ScoreError: one is missing, or two of the same name differ.
    """
    found: dict[str, np.ndarray] = {}
    for key, value in (item for partial in partials for item in partial.items()):
        if not np.array_equal(found.setdefault(key, value), value):
            raise ScoreError(f"two scores of {key!r} differ, expected equal ones; score it again on one device")
    names = expected(found)
    if missing := [name for name in names if name not in found]:
        raise ScoreError(f"{len(missing)} scores are missing, first {missing[0]!r}; score every shard before merging")
    return {name: found[name] for name in names}


def defaults(method: Tunable) -> dict[str, KnobValue]:
    """Every knob of `method` at its default."""
    return {name: knob.default for name, knob in method.knobs.items()}

"""The nine verbs of a compression method, and the parts that several methods share.

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
    """Nine verbs around one frozen dataclass; `METHODS` lists the implementations."""

    is_last: ClassVar[bool]
    """Whether no link of a chain may follow: the cost of this method's student depends on the input."""

    @property
    def name(self) -> str: ...

    @property
    def knobs(self) -> Mapping[str, Knob]:
        """The values that Optuna may vary in `allocate`; every knob has a default, which is tried first."""
        ...

    def accepts(self, profile: Profile) -> str | None:
        """Return `None`, or the reason why this network cannot be handled."""
        ...

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """Return the pieces of scoring work; `calibration` is `(n, c, h, w)`."""
        ...

    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """Return one piece's partial scores; a pure function of its arguments."""
        ...

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """Join all partial scores, bit for bit the same for any order of `partials`."""
        ...

    def untouched(self, scores: Scores, profile: Profile) -> Mapping[str, str]:
        """Return, by layer, why this method leaves it as it is; layers that it may change are not named."""
        ...

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """Return the best plan within every limit of `budget`.

        Raises:
            Infeasible: no plan fits; the message names the least reachable cost.
        """
        ...

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """Build a new module whose shape the plan alone decides; the teacher is untouched.

        A method may fit the new weights on `calibration` images `(n, c, h, w)`, if they are given.
        """
        ...

    def settle(self, student: nn.Module, plan: Plan, calibration: Tensor) -> None:
        """Re-estimate in place all that needs images but no training: the norms' statistics, a gate's threshold.

        It is left out where `apply` was given images and the class says `refits = True`: its norms are set then.
        """
        ...

    def recover(
        self, student: nn.Module, teacher: nn.Module, data: Samples, recipe: Recipe, seed: int
    ) -> Iterator[int]:
        """Train `student` in place; yields the number of steps done whenever the student is fit to be evaluated."""
        ...


@runtime_checkable
class PerInput(Protocol):
    """A student whose cost depends on the input, such as a gated one."""

    def instance_macs(self, images: Tensor) -> Tensor:
        """Count the MACs `(n,)` that each of `images` `(n, c, h, w)` needs."""
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
    """A method or a chain, of which only the knobs matter."""

    @property
    def knobs(self) -> Mapping[str, Knob]: ...


def collected(partials: Sequence[Scores], expected: Callable[[Scores], Sequence[str]]) -> Scores:
    """Join the entries of `partials`, as `expected` names and orders them: every `merge` starts here.

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
    """Return every knob of `method` at its default."""
    return {name: knob.default for name, knob in method.knobs.items()}

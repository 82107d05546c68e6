"""The words every compression method shares: budgets, knobs, plans, errors. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np

Scores: TypeAlias = Mapping[str, np.ndarray]
"""The measurements of a method: named arrays, so that they cache as one `.npz` and hash by content."""

Shard: TypeAlias = tuple[Any, ...]
"""A small picklable description of one piece of scoring work: a batch index, a layer, a block."""


class SharedShard(tuple[Any, ...]):
    """A shard that all methods score alike: a search does it once for all that ask for it."""


KnobValue: TypeAlias = float | int | str | bool

Tell: TypeAlias = Callable[[int, int, str], None]
"""Tells of long work: called with the steps done, the most there will be, and what they are."""


def untold(done: int, most: int, note: str) -> None:
    """Tell nobody."""


class MethodError(Exception):
    """Base of everything a method raises on purpose."""


class Unsupported(MethodError):
    """This method cannot handle this network at all."""


class ScoreError(MethodError):
    """Scoring met a value it cannot use (NaN, infinity, too few samples); the message names the layer or group."""


class Infeasible(MethodError):
    """No plan of this method fits the budget; `least` holds the least reachable value of each limited cost."""

    def __init__(self, message: str, least: Mapping[str, float]) -> None:
        super().__init__(message, least)
        self.message = message
        self.least = dict(least)

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Budget:
    """Upper limits for the whole network, in absolute units; `None` leaves a cost unlimited.

    `macs` are multiply-accumulates for any one input; `macs_expected` are their mean over inputs, which a gated
    network may meet where its `macs` do not. `params` counts every parameter. `channels` is the device's
    preferred channel multiple: pruned widths stay on that grid where the layer is wide enough (see `grid_step`).
    """

    name: str
    macs: int | None = None
    params: int | None = None
    channels: int = 1
    macs_expected: int | None = None

    def declared(self) -> dict[str, int]:
        """Return the limits as they were given, by the name of the cost."""
        named = {"macs": self.macs, "macs_expected": self.macs_expected, "params": self.params}
        return {cost: limit for cost, limit in named.items() if limit is not None}

    def limits(self) -> dict[str, int]:
        """Return the limits for a network that does the same for every input: its expected MACs are its MACs.

        >>> Budget("edge", macs=9, macs_expected=8, params=5).limits()
        {'macs': 8, 'params': 5}
        """
        macs = [limit for limit in (self.macs, self.macs_expected) if limit is not None]
        params = {} if self.params is None else {"params": self.params}
        return ({"macs": min(macs)} if macs else {}) | params


@dataclass(frozen=True)
class Choice:
    """A knob with named options."""

    options: tuple[KnobValue, ...]
    default: KnobValue


@dataclass(frozen=True)
class Range:
    """A real-valued knob in `[low, high]`, sampled on a log scale if `log`."""

    low: float
    high: float
    default: float
    log: bool = False


Knob: TypeAlias = Choice | Range


@dataclass(frozen=True)
class Plan:
    """The decisions of a method: plain JSON values, with the cost of the whole student it predicts.

    `loss` is the method's own proxy for the harm of the cut: 0 at the teacher's own cost, smaller is better, comparable
    only between plans of one method and one knob setting, where a larger budget is never worse. (A chain's sums its
    links' losses on different networks, so there it may be.) `bound` is a proven lower bound on it, where one is known.
    `macs_expected` is the target of a gated student, whose `macs` are those of all its channels and gates; it is None
    where every input costs the same.
    """

    method: str
    macs: int
    params: int
    choices: dict[str, Any]
    loss: float
    bound: float | None = None
    notes: tuple[str, ...] = field(default=())
    macs_expected: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values; `Plan.from_json` restores it."""
        return asdict(self) | {"notes": list(self.notes)}

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that decide the student: two plans of the same identity lead to the same one.

        >>> first, second = (Plan("uniform", macs=9, params=5, choices={}, loss=loss) for loss in (0.1, 0.2))
        >>> first.identity() == second.identity()
        True
        """
        return {name: value for name, value in self.to_json().items() if name not in ("loss", "bound", "notes")}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Plan:
        """Restore the plan from the values of `to_json`."""
        return Plan(**{**values, "notes": tuple(values["notes"])})


def grid_step(width: int, channels: int) -> int:
    """Return the multiple in which a group of `width` channels is pruned: the device's, an eighth of the width at most.

    >>> [grid_step(width, 8) for width in (16, 32, 64, 512)]
    [2, 4, 8, 8]
    """
    return min(channels, max(1, width // 8))

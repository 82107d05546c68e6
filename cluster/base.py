"""The one verb of a cluster: run a function over items beside a context every worker loaded once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True)
class Step:
    """Item number `index` reported `value` and goes on."""

    index: int
    value: Any


@dataclass(frozen=True)
class Done:
    """Item number `index` ended with `value`, `seconds` of a worker after it began."""

    index: int
    value: Any
    seconds: float


@dataclass(frozen=True)
class Failed:
    """Item number `index` raised, or lost its worker too often; `error` says what in one line, `trace` where.

    `seconds` are of a worker, from when the item last began.
    """

    index: int
    error: str
    trace: str
    seconds: float


Event: TypeAlias = Step | Done | Failed


class Cluster(Protocol):
    """Runs functions on workers and brings back values or errors."""

    def run(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[Event]:
        """Calls `function(context, *item)` for every item and yields events as they happen.

        A generator function's yields arrive as `Step`, its return value as `Done`. Every item ends with exactly one
        `Done` or `Failed`; an item may run again after its worker died, so functions must be pure.
        """
        ...

    def close(self) -> None:
        """Stops the workers; the cluster cannot be used again."""
        ...


def values(function: Callable[..., Any], context: object, item: tuple[Any, ...]) -> Generator[tuple[bool, Any]]:
    """What one call gives, in order, each with whether it is the last: how both clusters tell steps from results."""
    result = function(context, *item)
    if not isinstance(result, GeneratorType):
        yield True, result
        return
    while True:
        try:
            step = next(result)
        except StopIteration as stop:
            yield True, stop.value
            return
        yield False, step

"""The two verbs of a cluster: run a function over items beside a context every worker loaded once, and run it alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import GeneratorType, MappingProxyType
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True)
class Step:
    """Item number `index` reported `value` and goes on."""

    index: int
    value: Any


@dataclass(frozen=True)
class Done:
    """Item number `index` ended with `value`, `seconds` of a worker after it began.

    Where several processes shared it, here and below, they are those of all of them.
    """

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


@dataclass(frozen=True)
class Stopped:
    """Item number `index` was told to stop at its last step, `seconds` of a worker after it began."""

    index: int
    seconds: float


Event: TypeAlias = Step | Done | Failed | Stopped

Item: TypeAlias = tuple[Any, ...]


class ClusterError(Exception):
    """The cluster cannot be reached, has too little of what was asked for, or its workers cannot start."""


def always(index: int, value: object) -> bool:
    """Every item goes on."""
    return True


class Cluster(Protocol):
    """Runs functions on workers and brings back values or errors."""

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """Calls `function(context, *item)` for every item and yields events as they happen.

        A generator function's yields arrive as `Step`, its return value as `Done`. Every item ends with exactly one
        `Done`, `Failed` or `Stopped`; an item may run again after its worker died, so functions must be pure.

        Args:
            items: taken one by one, each when a worker is free for it; taking one may run others in between.
            go_on: asked with an item's number and value right after its `Step` was handed on, while the item waits;
                where it says no, the item's generator is closed and it ends as `Stopped`.
        """
        ...

    def alone(
        self,
        function: Callable[..., Any],
        items: Iterable[Item],
        resources: Mapping[str, float] = MappingProxyType({}),
    ) -> Iterator[Event]:
        """Calls `function(*item)` for every item, one after the other, in one process of their own.

        The process sits on a node that has `resources` and holds them for as long as it lives, so no other search
        measures there; without any it sits beside the driver.

        Raises:
            ClusterError: no node has these resources.
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

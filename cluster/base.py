"""The two verbs of a cluster: run a function over items beside a context every worker loaded once, and run it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True)
class Step:
    """Item number `index` reported `value` and continues."""

    index: int
    value: Any


@dataclass(frozen=True)
class Done:
    """Item number `index` ended with `value`, `seconds` of a worker after it began.

    Where several processes shared the item, here and below, the seconds of all of them are added up.
    """

    index: int
    value: Any
    seconds: float


@dataclass(frozen=True)
class Failed:
    """Item number `index` raised, or lost its worker too often; `error` is the message in one line, `trace` the whole.

    `seconds` are of a worker, from the item's last begin.
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
    """The cluster cannot be reached, lacks the resources that were asked for, or cannot start its workers."""


def always(index: int, value: object) -> bool:
    """Let every item continue."""
    return True


class Cluster(Protocol):
    """Runs functions on workers and brings back values or errors."""

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """Call `function(context, *item)` for every item and yield events as they happen.

        A generator function's yields arrive as `Step`, its return value as `Done`. Every item ends with exactly one
        `Done`, `Failed` or `Stopped`; an item may run again after its worker died, so functions must be pure.

        Args:
            items: taken one by one, each when a worker is free for it; taking one may run others in between.
            go_on: called with an item's number and value right after its `Step` was yielded, while the item waits; if
                it returns False, the item's generator is closed and the item ends as `Stopped`.
        """
        ...

    def alone(
        self,
        function: Callable[..., Any],
        items: Iterable[Item],
        resources: Mapping[str, float] = MappingProxyType({}),
    ) -> Iterator[Event]:
        """Call `function(*item)` for every item, one after the other, in one process of their own.

        The process sits on a node that has `resources` and holds them for as long as it lives, so no other search
        measures there; without any it sits beside the driver.

        Raises:
            ClusterError: no node has these resources.
        """
        ...

    def close(self) -> None:
        """Stop the workers; the cluster cannot be used again."""
        ...

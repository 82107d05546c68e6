"""A cluster of one: the same verbs in this process, for tests, debugging and small jobs; every Ray worker holds one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from cluster.base import ClusterError, Done, Event, Failed, Item, Step, Stopped, always, values


class InlineCluster:
    """Runs every item in this process, one after the other."""

    def __init__(self, context: object) -> None:
        self._context = context

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """See `Cluster.run`."""
        for index, item in enumerate(items):
            yield from _events(index, values(function, self._context, item), go_on)

    def alone(
        self,
        function: Callable[..., Any],
        items: Iterable[Item],
        resources: Mapping[str, float] = MappingProxyType({}),
    ) -> Iterator[Event]:
        """See `Cluster.alone`; here the process is this one.

        Raises:
            ClusterError: `resources` are asked for, and a process has none.
        """
        if resources:
            raise ClusterError(
                f"this process has no {listed(resources)}; expected a Ray cluster with a node that has it; "
                "give its --address"
            )
        yield from InlineCluster(None).run(partial(bare, function), items)

    def close(self) -> None:
        """Nothing to stop."""


def bare(function: Callable[..., Any], context: object, *item: object) -> object:
    """What `function` gives for `item` alone, without the context."""
    return function(*item)


def listed(resources: Mapping[str, float]) -> str:
    """Resources as a person reads them: `1 dut, 2 CPU`."""
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items())) or "nothing"


def _events(
    index: int, told: Generator[tuple[bool, Any]], go_on: Callable[[int, Any], bool]
) -> Generator[Event, None, None]:
    """The events of one item. Only what the item raises is its result: an error of `go_on` is the caller's own."""
    began = time.monotonic()
    while True:
        try:
            is_last, value = next(told)
        except Exception as error:  # noqa: BLE001 - whatever an item raises is its result
            seconds = time.monotonic() - began
            yield Failed(index, f"{type(error).__name__}: {error}", traceback.format_exc(), seconds)
            return
        if is_last:
            yield Done(index, value, time.monotonic() - began)
            return
        yield Step(index, value)
        if not go_on(index, value):
            told.close()
            yield Stopped(index, time.monotonic() - began)
            return

"""A cluster of one: the same verbs in this process, for tests, debugging and small jobs; every Ray worker holds one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from types import GeneratorType, MappingProxyType
from typing import Any

from cluster.base import ClusterError, Done, Event, Failed, Item, Step, Stopped, always


class InlineCluster:
    """Runs every item in this process, one after the other."""

    def __init__(self, context: object) -> None:
        self._context = context

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """See `Cluster.run`."""
        for index, item in enumerate(items):
            yield from _events(index, _outputs(function, self._context, item), go_on)

    def alone(
        self,
        function: Callable[..., Any],
        items: Iterable[Item],
        resources: Mapping[str, float] = MappingProxyType({}),
    ) -> Iterator[Event]:
        """See `Cluster.alone`; here the process is this one.

        Raises:
            ClusterError: `resources` are asked for, and this process has none.
        """
        if resources:
            raise ClusterError(
                f"this process has no {resources_text(resources)}; expected a Ray cluster with a node that has it; "
                "give its --address"
            )
        yield from InlineCluster(None).run(partial(without_context, function), items)

    def close(self) -> None:
        """Do nothing: there is no worker to stop."""


def without_context(function: Callable[..., Any], context: object, *item: object) -> object:
    """Call `function` with the item alone."""
    return function(*item)


def resources_text(resources: Mapping[str, float]) -> str:
    """Resources as a person reads them: `1 dut, 2 CPU`."""
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items())) or "nothing"


def _events(
    index: int, outputs: Generator[tuple[bool, Any]], go_on: Callable[[int, Any], bool]
) -> Generator[Event, None, None]:
    """Yield the events of one item. An error of the item is its result, an error of `go_on` is the caller's own."""
    began = time.monotonic()
    while True:
        try:
            is_last, value = next(outputs)
        except BaseException as error:  # any error of an item is its result, an exit that a user's code asks for too
            if isinstance(error, KeyboardInterrupt) or getattr(error, "is_ray_terminate", False):
                raise  # one that Ray asks for is not
            seconds = time.monotonic() - began
            yield Failed(index, f"{type(error).__name__}: {error}", traceback.format_exc(), seconds)
            return
        if is_last:
            yield Done(index, value, time.monotonic() - began)
            return
        yield Step(index, value)
        if not go_on(index, value):
            outputs.close()
            yield Stopped(index, time.monotonic() - began)
            return


def _outputs(function: Callable[..., Any], context: object, item: Item) -> Generator[tuple[bool, Any]]:
    """Yield the steps of one call and then its result, each with whether it is the result."""
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

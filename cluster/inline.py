"""A cluster of one: the same verb in this process, for tests, debugging and small jobs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.base import Done, Event, Failed, Step, values


class InlineCluster:
    """Runs every item in this process, one after the other."""

    def __init__(self, context: object) -> None:
        self._context = context

    def run(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[Event]:
        """See `Cluster.run`."""
        for index, item in enumerate(items):
            began = time.monotonic()
            try:
                for is_last, value in values(function, self._context, item):
                    yield Done(index, value, time.monotonic() - began) if is_last else Step(index, value)
            except Exception as error:  # noqa: BLE001 - whatever an item raises is its result
                seconds = time.monotonic() - began
                yield Failed(index, f"{type(error).__name__}: {error}", traceback.format_exc(), seconds)

    def close(self) -> None:
        """Nothing to stop."""

"""One Ray worker process, the items it is given, and what the driver hears of them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from cluster.base import Event, Failed, Item, always
from cluster.inline import InlineCluster


class Worker:
    """One process with the context loaded: a cluster of one, whose events the driver hears as they happen.

    Made an actor with a concurrency group `control`, so that an answer gets in while an item waits for it.
    """

    def __init__(self, context: object, *, sees_gpus: bool) -> None:
        if not sees_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves every GPU visible to an actor that asked for none
        self._here = InlineCluster(context)
        self._answers: SimpleQueue[bool] = SimpleQueue()

    def ping(self) -> None:
        """Answers."""

    @ray.method(num_returns="streaming")
    def run(self, function: Callable[..., Any], item: Item, asks: bool) -> Iterator[Event]:
        """The events of one item, numbered 0; one that `asks` waits for an `answer` after every step."""
        yield from self._here.run(function, [item], self._answered if asks else always)

    @ray.method(concurrency_group="control")
    def answer(self, goes_on: bool) -> None:
        """Tells the item that waits whether it goes on."""
        self._answers.put(goes_on)

    def _answered(self, index: int, value: object) -> bool:
        return self._answers.get()


@dataclass(frozen=True)
class Room:
    """What item number `index` holds beside its worker: `needs` of Ray's resources, for which it waits until they are
    there."""

    index: int
    group: PlacementGroup
    needs: Mapping[str, float]
    is_there: bool


@dataclass(frozen=True)
class Work:
    """An item on a worker, for the `attempt`-th time, when it began and when it last told something (monotonic)."""

    worker: Any
    index: int
    item: Item
    attempt: int
    began: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    room: Room | None = None

    @property
    def waits(self) -> bool:
        """Whether it cannot begin yet, so that its silence tells nothing."""
        return self.room is not None and not self.room.is_there


class Queue:
    """Items to be done: taken from their source one at a time, those that must run again first."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._source = enumerate(items)
        self._again: deque[tuple[int, Item, int]] = deque()
        self._is_dry = False

    @property
    def is_over(self) -> bool:
        """Whether nothing is left, as far as asking has shown."""
        return self._is_dry and not self._again

    def take(self) -> tuple[int, Item, int] | None:
        """The next item with its number and which attempt this is; asking the source may run anything."""
        if self._again:
            return self._again.popleft()
        for index, item in self._source:
            return index, item, 1
        self._is_dry = True
        return None

    def put_back(self, index: int, item: Item, attempt: int) -> None:
        """Has an item taken next."""
        self._again.appendleft((index, item, attempt))


class ProcessLost(Exception):
    """One of the processes that share an item is gone, and so is what the others had of it."""


def heard(stream: Any, work: Work) -> tuple[Event | Room, bool]:
    """The next event of an item, or its room; and whether its worker is lost."""
    try:
        event: Event | Room = ray.get(next(stream))
    except RayTaskError as error:  # the item's own errors are events: this one is of a value that does not pickle
        seconds = time.monotonic() - work.began
        is_lost = isinstance(error.cause, ProcessLost)
        return Failed(work.index, f"{type(error.cause).__name__}: {error.cause}", str(error), seconds), is_lost
    except RayError as error:
        seconds = time.monotonic() - work.began
        return Failed(work.index, f"lost its worker {work.attempt} times: {line(error)}", str(error), seconds), True
    return replace(event, index=work.index), False


def stalled(work: Work) -> Failed:
    """What an item comes to whose worker is alive and tells nothing."""
    now = time.monotonic()
    error = f"told nothing for {now - work.heard:.0f} s, attempt {work.attempt}; expected a step or an end before that"
    return Failed(work.index, f"{error}; mend what hangs, or raise cluster.stall_timeout", "", now - work.began)


def line(error: Exception) -> str:
    """The line of an error that says what happened: Ray's last one, but the first where memory ran out."""
    lines = [one.strip() for one in str(error).splitlines() if one.strip()]
    if isinstance(error, OutOfMemoryError) and lines:
        return f"{lines[0]}; expected room for it; lower cluster.max_parallel, or give the nodes more memory"
    return lines[-1] if lines else type(error).__name__

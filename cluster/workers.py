"""One Ray worker process, the items it is given, and the events that the driver reads from it."""

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
    """One process with the context loaded: a cluster of one, whose events reach the driver as they happen.

    The pool makes it an actor with a concurrency group `control`, so that an answer gets in while an item waits for it.
    """

    def __init__(self, context: object, *, sees_gpus: bool) -> None:
        if not sees_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves every GPU visible to an actor that asked for none
        self._here = InlineCluster(context)
        self._answers: SimpleQueue[bool] = SimpleQueue()

    def ping(self) -> None:
        """Return, once the context is loaded."""

    @ray.method(num_returns="streaming")
    def run(self, function: Callable[..., Any], item: Item, awaits_answers: bool) -> Iterator[Event]:
        """Yield the events of one item, numbered 0; if it `awaits_answers`, it waits for one after every step."""
        yield from self._here.run(function, [item], self._wait_for_answer if awaits_answers else always)

    @ray.method(concurrency_group="control")
    def answer(self, continues: bool) -> None:
        """Tell the waiting item whether it continues."""
        self._answers.put(continues)

    def _wait_for_answer(self, index: int, value: object) -> bool:
        return self._answers.get()


@dataclass(frozen=True)
class Room:
    """The room that item number `index` holds in Ray beside its worker: `needs`, reserved by the placement `group`.

    The item waits until the room is ready.
    """

    index: int
    group: PlacementGroup
    needs: Mapping[str, float]
    is_ready: bool


@dataclass(frozen=True)
class Work:
    """An item on a worker, for the `attempt`-th time; when it began, and when its last event came (monotonic)."""

    worker: Any
    index: int
    item: Item
    attempt: int
    began: float = field(default_factory=time.monotonic)
    last_event: float = field(default_factory=time.monotonic)
    room: Room | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it still waits for its room, so that its silence means nothing."""
        return self.room is not None and not self.room.is_ready


class Queue:
    """The items to run: taken from their source one at a time, those that must run again first."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._source = enumerate(items)
        self._again: deque[tuple[int, Item, int]] = deque()
        self._is_exhausted = False

    @property
    def is_over(self) -> bool:
        """Whether no item is left, as far as the source was asked."""
        return self._is_exhausted and not self._again

    def take(self) -> tuple[int, Item, int] | None:
        """Take the next item: its number, the item, and the number of this attempt; the source may run anything."""
        if self._again:
            return self._again.popleft()
        for index, item in self._source:
            return index, item, 1
        self._is_exhausted = True
        return None

    def put_back(self, index: int, item: Item, attempt: int) -> None:
        """Put an item in front, to be taken next."""
        self._again.appendleft((index, item, attempt))


def count_waiting(needs: Mapping[str, float]) -> int:
    """Count the requests for exactly `needs` that Ray has no room for now, those of other drivers too.

    Ray calls an actor pending from its creation to its first word, with room or without; only its queues tell the two
    apart. It writes amounts in ten-thousandths.
    """
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    wanted = {name: round(amount, 4) for name, amount in needs.items() if amount}
    state = get_cluster_resource_state(internal_kv_get_gcs_client())  # type: ignore[no-untyped-call]
    return sum(
        int(one.count)
        for one in state.pending_resource_requests
        if {name: round(amount, 4) for name, amount in one.request.resources_bundle.items()} == wanted
    )


class ProcessLost(Exception):
    """One of the processes that share an item is gone, so the work of the others on it is lost."""


def next_event(stream: Any, work: Work) -> tuple[Event | Room, bool]:
    """Read the next event of an item, or its room; also return whether its worker is lost."""
    try:
        event: Event | Room = ray.get(next(stream))
    except RayTaskError as error:  # the item's own errors are events: this one is of a value that does not pickle
        seconds = time.monotonic() - work.began
        is_lost = isinstance(error.cause, ProcessLost)
        return Failed(work.index, f"{type(error.cause).__name__}: {error.cause}", str(error), seconds), is_lost
    except RayError as error:
        seconds = time.monotonic() - work.began
        return Failed(work.index, f"lost its worker {work.attempt} times: {summary(error)}", str(error), seconds), True
    return replace(event, index=work.index), False


def stalled(work: Work) -> Failed:
    """Build the failure of an item whose worker is alive but silent for too long."""
    now = time.monotonic()
    error = (
        f"told nothing for {now - work.last_event:.0f} s, attempt {work.attempt}; expected a step or an end before that"
    )
    return Failed(work.index, f"{error}; mend what hangs, or raise cluster.stall_timeout", "", now - work.began)


def summary(error: Exception) -> str:
    """Pick the line of an error that says most: Ray's last one, but the first where memory ran out."""
    lines = [one.strip() for one in str(error).splitlines() if one.strip()]
    if isinstance(error, OutOfMemoryError) and lines:
        return f"{lines[0]}; expected room for it; lower cluster.max_parallel, or give the nodes more memory"
    return lines[-1] if lines else type(error).__name__

"""Workers of one kind: started when they are needed, given one item at a time, replaced when they are lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import length_hint
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from cluster.base import ClusterError, Event, Failed, Item, Step, always
from cluster.inline import listed
from cluster.workers import Queue, Room, Work, Worker, heard, line, stalled

log = logging.getLogger(__name__)

ATTEMPTS = 3
PATIENCE_S = 60


class Pool:
    """As many as `size` workers with `context` in memory.

    Several runs may be under way at once, one begun between the events of another: they share the workers, and a worker
    belongs to the run whose item it has until that item ends.

    Args:
        context: what every worker holds, or a reference to it in the object store.
        size: the most workers.
        needs: what each holds of Ray's resources; one that needs no GPU sees none.
        strategy: where Ray puts them.
        stall_s: the seconds after which an item that has told nothing is taken from its worker, as if that had died.
        worker: what each of them is; `Coordinator` for one that has a group of processes do its items.
        lent: how many workers fewer there may be now, since others have their room.
    """

    def __init__(
        self,
        context: Any,
        *,
        size: int,
        needs: Mapping[str, float],
        strategy: Any,
        stall_s: float = math.inf,
        worker: type = Worker,
        lent: Callable[[], int] = lambda: 0,
    ) -> None:
        options: dict[str, Any] = {
            "num_cpus": needs.get("CPU", 0),
            "num_gpus": needs.get("GPU", 0),
            "resources": {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU")},
            "scheduling_strategy": strategy,
            "concurrency_groups": {"control": 1, "group": 1},
        }
        self._actor: Any = ray.remote(**options)(worker)
        self._context = context
        self._size = size
        self._needs = dict(needs)
        self._stall_s = stall_s
        self._lent = lent
        self._living: set[Any] = set()
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._deaths = 0
        self._is_open = True

    @property
    def busy(self) -> int:
        """How many workers have an item."""
        return len(self._living) - len(self._idle) - len(self._starting)

    def fill(self) -> None:
        """Asks Ray for the workers that are missing.

        One gets work only once it has answered, so one that finds no room holds nothing up.
        """
        while len(self._living) < max(1, self._size - self._lent()):
            worker = self._actor.remote(self._context, sees_gpus=self._needs.get("GPU", 0) > 0)
            self._living.add(worker)
            self._starting[worker.ping.remote()] = worker

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """See `Cluster.run`: one item per worker at a time; an item that loses `ATTEMPTS` workers counts as failed.

        A run that is given up has its workers killed: what they were at is nobody's any more.

        Raises:
            ClusterError: the workers die before they can take any work; or all are busy with the run that this one
                began in, so that waiting would never end; or the cluster was closed.
        """
        if length_hint(items, 1) == 0:
            return  # nothing to do needs no worker, and so waits for none
        asks = go_on is not always
        queue = Queue(items)
        active: dict[Any, Work] = {}
        try:
            while True:
                self._hand_out(function, queue, active, asks)
                if queue.is_over and not active:
                    return
                event, worker = self._news(queue, active)
                if event is None:
                    continue
                yield event
                if asks and isinstance(event, Step):
                    self.check_open()
                    worker.answer.remote(go_on(event.index, event.value))
        finally:
            for work in active.values():
                self._take_away(work)

    def close(self) -> None:
        """Kills the workers, whatever they do."""
        self._is_open = False
        self.rest()
        for worker in tuple(self._living):
            self._drop(worker)

    def rest(self) -> None:
        """Lets go of the workers that have no item, and of what they hold; the next run starts them anew."""
        for worker in (*self._idle, *self._starting.values()):
            self._drop(worker)
        self._idle, self._starting = [], {}

    def _hand_out(self, function: Callable[..., Any], queue: Queue, active: dict[Any, Work], asks: bool) -> None:
        """Gives every idle worker an item."""
        self.check_open()
        while self._idle and (taken := queue.take()) is not None:
            if not self._idle:  # a run that came between lost the worker
                queue.put_back(*taken)
                break
            worker = self._idle.pop()
            index, item, attempt = taken
            active[worker.run.remote(function, item, asks)] = Work(worker, index, item, attempt)
        if not queue.is_over:
            self.fill()

    def _news(self, queue: Queue, active: dict[Any, Work]) -> tuple[Event | None, Any]:
        """The next event and whose it is, or None where a worker has only answered, or an item is to run again."""
        news, has_news = self._first(active, () if queue.is_over else self._starting)
        if news in self._starting:
            self._greet(news)
            return None, None
        work = active[news]
        event, is_lost = heard(news, work) if has_news else (stalled(work), True)
        if isinstance(event, Room):
            active[news] = replace(work, began=time.monotonic(), heard=time.monotonic(), room=event)
            return None, None
        if isinstance(event, Step):
            active[news] = replace(work, heard=time.monotonic())
            return event, work.worker
        del active[news]
        if not is_lost:
            self._idle.append(work.worker)
            return event, work.worker
        log.warning(
            "item %d, attempt %d: %s", work.index, work.attempt, event.error if isinstance(event, Failed) else event
        )
        self._take_away(work)
        self._doubt()
        if work.attempt == ATTEMPTS:
            return event, work.worker
        queue.put_back(work.index, work.item, work.attempt + 1)
        return None, None

    def _doubt(self) -> None:
        """Has idle workers answer anew before they get work: those of a lost node would each cost an attempt."""
        for worker in self._idle:
            self._starting[worker.ping.remote()] = worker
        self._idle = []

    def _greet(self, ping: Any) -> None:
        """Takes a worker that has answered into the pool, or leaves its place to another where it died at once."""
        worker = self._starting.pop(ping)
        try:
            ray.get(ping)
        except RayError as error:
            self._drop(worker)
            self._deaths += 1
            if self._deaths > ATTEMPTS + self._size:  # as many as one loss can take, and some more
                raise ClusterError(
                    f"{self._deaths} workers died while starting: {line(error)}; expected them to load what they "
                    "are sent; check that the workers can import what the model and the data are made of"
                ) from error
        else:
            self._deaths = 0
            self._idle.append(worker)

    def _first(self, active: Mapping[Any, Work], starting: Iterable[Any]) -> tuple[Any, bool]:
        """The first of these to have news, or one that has been silent for too long, and which of both it is.

        Says so where workers find no room, since Ray waits for that in silence.
        """
        if not (awaited := [*active, *starting]):
            raise ClusterError(
                f"all {self._size} workers are busy with another run of this cluster; expected one to be free, "
                "as it is while an item is taken and after one has ended; begin this run then, or end the other"
            )
        while True:
            begun = [one for one, work in active.items() if not work.waits]
            oldest = min(begun, key=lambda one: active[one].heard, default=None)
            left_s = math.inf if oldest is None else max(1.0, active[oldest].heard + self._stall_s - time.monotonic())
            ready, _ = ray.wait(awaited, num_returns=1, timeout=min(PATIENCE_S, left_s), fetch_local=False)
            if ready:
                return ready[0], True
            if left_s <= PATIENCE_S:
                return oldest, False
            rooms = [work.room for work in active.values() if work.room and work.waits]
            if self._starting or rooms:
                self._say_that_there_is_no_room(rooms)

    def _say_that_there_is_no_room(self, rooms: Sequence[Room]) -> None:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        needs = rooms[0].needs if rooms else self._needs
        log.warning(
            "no news for %d s; %d of %d %s have no room yet: each needs %s, free are %s",
            PATIENCE_S,
            len(rooms) or len(self._starting),
            self._size,
            "groups" if rooms else "workers",
            listed(needs),
            listed({name: free.get(name, 0) for name in needs}),
        )

    def _take_away(self, work: Work) -> None:
        """Kills a worker that has an item, and gives back the item's room, which outlives it."""
        if work.worker in self._living:
            self._drop(work.worker)
            if work.room is not None:
                remove_placement_group(work.room.group)

    def _drop(self, worker: Any) -> None:
        """Kills a worker, unless that has been done."""
        if worker in self._living:
            self._living.discard(worker)
            ray.kill(worker)

    def check_open(self) -> None:
        """Raises ClusterError after `close`: Ray would start anew by itself where something is asked of it then."""
        if not self._is_open:
            raise ClusterError("this cluster was closed; expected an open one; make another")

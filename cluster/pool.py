"""Workers of one kind: started when they are needed, given one item at a time, replaced when they are lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from operator import length_hint
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from cluster.base import ClusterError, Event, Failed, Item, Step, always
from cluster.inline import resources_text
from cluster.workers import Queue, Room, Work, Worker, count_waiting, next_event, stalled, summary

log = logging.getLogger(__name__)

ATTEMPTS = 3
PATIENCE_S = 60
"""Silence after which the log says which workers or groups find no room, or are starting."""


class Pool:
    """As many as `size` workers with `context` in memory.

    Several runs may be under way at once, one begun between the events of another: they share the workers, and a worker
    belongs to the run of its item until that item ends.

    Args:
        context: the object that every worker holds, or a reference to it in the object store.
        size: the most workers.
        needs: the share of Ray's resources that each holds; one that needs no GPU sees none.
        strategy: Ray's scheduling strategy, by which it places them.
        stall_s: the seconds of silence after which an item is taken from its worker, as if that had died.
        worker: the class of each; `Coordinator` for one that has a group of processes run its items.
        occupied: returns the number of workers whose room others have now; there may be so many fewer.
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
        occupied: Callable[[], int] = lambda: 0,
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
        self._occupied = occupied
        self._living: set[Any] = set()
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._deaths = 0
        self._is_open = True

    @property
    def busy(self) -> int:
        """The number of workers that have an item."""
        return len(self._living) - len(self._idle) - len(self._starting)

    def fill(self) -> None:
        """Ask Ray for the workers that are missing.

        A worker gets an item only once it has answered, so one that finds no room holds nothing up.
        """
        while len(self._living) < max(1, self._size - self._occupied()):
            worker = self._actor.remote(self._context, sees_gpus=self._needs.get("GPU", 0) > 0)
            self._living.add(worker)
            self._starting[worker.ping.remote()] = worker

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """See `Cluster.run`: one item per worker at a time; an item that loses `ATTEMPTS` workers counts as failed.

        A run that its caller stops early has its workers killed: nobody waits for their items any more.

        Raises:
            ClusterError: the workers die before they can take an item; or all are busy with the run that this one
                began in, so that waiting would never end; or the cluster was closed.
        """
        if length_hint(items, 1) == 0:
            return  # no items need no worker, so the run waits for none
        awaits_answers = go_on is not always
        queue = Queue(items)
        active: dict[Any, Work] = {}
        try:
            while True:
                self._hand_out(function, queue, active, awaits_answers)
                if queue.is_over and not active:
                    return
                event, worker = self._next_event(queue, active)
                if event is None:
                    continue
                yield event
                if awaits_answers and isinstance(event, Step):
                    self.check_open()
                    worker.answer.remote(go_on(event.index, event.value))
        finally:
            for work in active.values():
                self._abandon(work)

    def close(self) -> None:
        """Kill all workers, busy ones too."""
        self._is_open = False
        self.release_idle()
        for worker in tuple(self._living):
            self._kill(worker)

    def release_idle(self) -> None:
        """Kill the workers that have no item, which frees their resources; the next run starts them anew."""
        for worker in (*self._idle, *self._starting.values()):
            self._kill(worker)
        self._idle, self._starting = [], {}

    def _hand_out(
        self, function: Callable[..., Any], queue: Queue, active: dict[Any, Work], awaits_answers: bool
    ) -> None:
        """Give every idle worker an item."""
        self.check_open()
        while self._idle and (taken := queue.take()) is not None:
            if not self._idle:  # a run begun by taking the item lost the worker
                queue.put_back(*taken)
                break
            worker = self._idle.pop()
            index, item, attempt = taken
            active[worker.run.remote(function, item, awaits_answers)] = Work(worker, index, item, attempt)
        if not queue.is_over:
            self.fill()

    def _next_event(self, queue: Queue, active: dict[Any, Work]) -> tuple[Event | None, Any]:
        """Return the next event and its worker; no event if a worker has only answered, or an item is to run again."""
        source, is_ready = self._wait(active, () if queue.is_over else self._starting)
        if source in self._starting:
            self._admit(source)
            return None, None
        work = active[source]
        event, is_lost = next_event(source, work) if is_ready else (stalled(work), True)
        if isinstance(event, Room):
            active[source] = replace(work, began=time.monotonic(), last_event=time.monotonic(), room=event)
            return None, None
        if isinstance(event, Step):
            active[source] = replace(work, last_event=time.monotonic())
            return event, work.worker
        del active[source]
        if not is_lost:
            self._idle.append(work.worker)
            return event, work.worker
        log.warning(
            "item %d, attempt %d: %s", work.index, work.attempt, event.error if isinstance(event, Failed) else event
        )
        self._abandon(work)
        self._recheck_idle()
        if work.attempt == ATTEMPTS:
            return event, work.worker
        queue.put_back(work.index, work.item, work.attempt + 1)
        return None, None

    def _recheck_idle(self) -> None:
        """Have idle workers answer again before they get an item: those of a lost node would each cost an attempt."""
        for worker in self._idle:
            self._starting[worker.ping.remote()] = worker
        self._idle = []

    def _admit(self, ping: Any) -> None:
        """Take a worker that has answered into the pool; one that died instead leaves its place to another."""
        worker = self._starting.pop(ping)
        try:
            ray.get(ping)
        except RayError as error:
            self._kill(worker)
            self._deaths += 1
            if self._deaths > ATTEMPTS + self._size:  # as many as one loss can take, and some more
                raise ClusterError(
                    f"{self._deaths} workers died while starting: {summary(error)}; expected them to load what they "
                    "are sent; check that the workers can import what the model and the data are made of"
                ) from error
        else:
            self._deaths = 0
            self._idle.append(worker)

    def _wait(self, active: Mapping[Any, Work], starting: Iterable[Any]) -> tuple[Any, bool]:
        """Wait for one of these; return it and True once it is ready, or one that was silent for too long and False.

        Logs when workers find no room or are starting, since Ray waits for that in silence.
        """
        if not (awaited := [*active, *starting]):
            raise ClusterError(
                f"all {self._size} workers are busy with another run of this cluster; expected one to be free, "
                "as it is while an item is taken and after one has ended; begin this run then, or end the other"
            )
        while True:
            begun = [one for one, work in active.items() if not work.is_waiting]
            oldest = min(begun, key=lambda one: active[one].last_event, default=None)
            due = math.inf if oldest is None else active[oldest].last_event + self._stall_s
            left_s = max(1.0, due - time.monotonic())
            ready, _ = ray.wait(awaited, num_returns=1, timeout=min(PATIENCE_S, left_s), fetch_local=False)
            if ready:
                return ready[0], True
            if left_s <= PATIENCE_S:
                return oldest, False
            rooms = [work.room for work in active.values() if work.room and work.is_waiting]
            if rooms:
                self._log_lack_of_room("groups", len(rooms), rooms[0].needs)
            elif self._starting:
                self._log_start()

    def _log_start(self) -> None:
        """Log the workers that find no room apart from those that have it and start in it."""
        starting = len(self._starting)
        if (roomless := min(starting, count_waiting(self._needs))) > 0:
            self._log_lack_of_room("workers", roomless, self._needs)
        if starting > roomless:
            log.warning(
                "no news for %d s; %d of %d workers are starting: each holds %s and has not answered yet",
                PATIENCE_S,
                starting - roomless,
                self._size,
                resources_text(self._needs),
            )

    def _log_lack_of_room(self, kind: str, count: int, needs: Mapping[str, float]) -> None:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        log.warning(
            "no news for %d s; %d of %d %s have no room yet: each needs %s, free are %s",
            PATIENCE_S,
            count,
            self._size,
            kind,
            resources_text(needs),
            resources_text({name: free.get(name, 0) for name in needs}),
        )

    def _abandon(self, work: Work) -> None:
        """Kill a worker that has an item, and give back the item's room, which outlives it."""
        if work.worker in self._living:
            self._kill(work.worker)
            if work.room is not None:
                remove_placement_group(work.room.group)

    def _kill(self, worker: Any) -> None:
        """Kill a worker, unless that has been done."""
        if worker in self._living:
            self._living.discard(worker)
            ray.kill(worker)

    def check_open(self) -> None:
        """Raise ClusterError after `close`, when any call of Ray would start it anew."""
        if not self._is_open:
            raise ClusterError("this cluster was closed; expected an open one; make another")

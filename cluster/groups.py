"""Items that several processes share: Ray Train starts a group of processes for each item and ends it afterwards.

All processes of a group call the same function with the same item, in a torch process group: gloo on CPUs, nccl on
GPUs, which was not run here. The first one reports, and the answer to each of its steps goes to all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)

from cluster.base import Done, Event, Failed, Item, Step, Stopped
from cluster.inline import InlineCluster
from cluster.workers import ProcessLost, Room, summary


@dataclass(frozen=True)
class Group:
    """A group of `count` processes, each with `needs` of Ray's resources and a copy of the object behind `context`."""

    context: Any
    count: int
    needs: Mapping[str, float]

    def room(self, reserved: PlacementGroup, *, is_ready: bool) -> Room:
        """The room that an item with such a group holds."""
        return Room(0, reserved, {name: amount * self.count for name, amount in self.needs.items()}, is_ready)


class ItemFailed(Exception):
    """The item raised, and that was reported already: this only ends the group."""


class Coordinator:
    """A worker that has a group run its items, and holds no resources itself: for the driver it is a `Worker`.

    The pool makes it an actor with the concurrency groups `control`, as a `Worker`, and `group`, for its processes.
    """

    def __init__(self, group: Group, *, sees_gpus: bool) -> None:
        self._group = group
        self._events: SimpleQueue[Event | Room | None] = SimpleQueue()
        self._answers: SimpleQueue[bool] = SimpleQueue()

    def ping(self) -> None:
        """Return at once."""

    @ray.method(num_returns="streaming")
    def run(self, function: Callable[..., Any], item: Item, awaits_answers: bool) -> Iterator[Event | Room]:
        """Yield the events of one item, numbered 0; its seconds count for each process, once the group has room.

        Ray Train reserves its own room and would wait for that in silence, so this reserves room first, and frees it
        when Train is ready to take it. The driver is told of both, since Ray keeps them if this process dies.

        Raises:
            ProcessLost: the group ended without the item's own end.
        """
        room = placement_group([dict(self._group.needs)] * self._group.count)
        yield self._group.room(room, is_ready=False)
        ray.get(room.ready())
        yield self._group.room(room, is_ready=True)
        began = time.monotonic()
        here = ray.get_runtime_context().current_actor
        end: Done | Failed | Stopped | None = None
        with ThreadPoolExecutor(1) as thread:
            work = partial(_run_in_process, self._group.context, here, function, item)
            group = thread.submit(_run_group, work, self._group, room)
            group.add_done_callback(lambda _: self._events.put(None))
            while (event := self._events.get()) is not None:
                if not isinstance(event, Step | Room):
                    end = end or event  # where several processes fail, the first says why
                    continue
                yield event
                if isinstance(event, Step) and not awaits_answers:
                    self._answers.put(True)
        error = group.exception()
        if end is None or _is_lost(error):
            raise ProcessLost(summary(error) if isinstance(error, Exception) else "it told no end")
        yield replace(end, seconds=(time.monotonic() - began) * self._group.count)

    @ray.method(concurrency_group="control")
    def answer(self, continues: bool) -> None:
        """Tell the waiting item whether it continues."""
        self._answers.put(continues)

    @ray.method(concurrency_group="group")
    def note_room(self, room: PlacementGroup) -> None:
        """Note the group's own room, to free it after a kill: Ray Train does so only where Ray has a dashboard."""
        self._events.put(self._group.room(room, is_ready=True))

    @ray.method(concurrency_group="group")
    def report(self, event: Event) -> bool:
        """Take an event of one of the group's processes; return whether it continues after a step, once known."""
        self._events.put(event)
        return self._answers.get() if isinstance(event, Step) else False


def _run_group(work: Callable[[], None], group: Group, room: PlacementGroup) -> None:
    """Have every process of a new group do `work`, in place of `room`.

    Ray Train's own retries are off: the pool has its own. Where another has taken the room since, Train waits for room
    again and says so.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths of the data stay what they are to a worker
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process per group; a node that goes is a worker lost
    has_gpus = group.needs.get("GPU", 0) > 0
    retries: dict[str, Any] = {"max_failures": 0, "max_preemption_failures": 0, "controller_failure_limit": 0}
    settings: dict[str, Any] = {
        "worker_runtime_env": {} if has_gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        "failure_config": FailureConfig(**retries),
        "logging_config": LoggingConfig("ERROR"),
    }
    scale = ScalingConfig(num_workers=group.count, use_gpu=has_gpus, resources_per_worker=dict(group.needs))
    with TemporaryDirectory(prefix="paredown-") as folder:  # a run of a known name and place would be resumed
        run = RunConfig(name=f"item-{uuid4().hex}", storage_path=folder, **settings)
        trainer = TorchTrainer(work, scaling_config=scale, run_config=run)
        remove_placement_group(room)
        trainer.fit()


def _run_in_process(context: Any, coordinator: Any, function: Callable[..., Any], item: Item) -> None:
    """Run the item in one process of a group, as a worker alone would; all share the answer to every step.

    Raises:
        ItemFailed: the item raised here, so that Ray Train ends the others, which may wait for this one.
    """
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    is_first = get_context().get_world_rank() == 0
    if is_first:
        ray.get(coordinator.note_room.remote(get_current_placement_group()))

    def continues(index: int, value: object) -> bool:
        answer = ray.get(coordinator.report.remote(Step(index, value))) if is_first else None
        return bool(broadcast_from_rank_zero(answer))

    *_, end = InlineCluster(ray.get(context)).run(function, [item], continues)
    if is_first or isinstance(end, Failed):
        ray.get(coordinator.report.remote(end))
    if isinstance(end, Failed):
        raise ItemFailed(end.error)


def _is_lost(error: BaseException | None) -> bool:
    """Whether a group ended by another error than its item's own."""
    failures = getattr(error, "worker_failures", {0: error}).values()
    return error is not None and not all(isinstance(failure, ItemFailed) for failure in failures)

"""Items that several processes share: each is run by a group of Ray Train's own, made for it and gone after it.

All processes of a group call the same function with the same item, in a torch process group: gloo on CPUs, nccl on
GPUs, which was not run here. The first one is listened to; what is answered to its steps goes to all.
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
from cluster.workers import ProcessLost, Room, line


@dataclass(frozen=True)
class Group:
    """As many as `count` processes, each with `needs` of Ray's resources and a copy of what `context` refers to."""

    context: Any
    count: int
    needs: Mapping[str, float]

    def room(self, there: PlacementGroup, *, is_there: bool) -> Room:
        """What the item holds by having such a group."""
        return Room(0, there, {name: amount * self.count for name, amount in self.needs.items()}, is_there)


class ItemFailed(Exception):
    """The item raised, which was told already: this only ends the group."""


class Coordinator:
    """A worker that has a group do its items, and holds nothing itself: for the driver it is a `Worker`.

    Made an actor with the concurrency groups `control`, as that is, and `group`, by which its processes are heard.
    """

    def __init__(self, group: Group, *, sees_gpus: bool) -> None:
        self._group = group
        self._news: SimpleQueue[Event | Room | None] = SimpleQueue()
        self._answers: SimpleQueue[bool] = SimpleQueue()

    def ping(self) -> None:
        """Answers."""

    @ray.method(num_returns="streaming")
    def run(self, function: Callable[..., Any], item: Item, asks: bool) -> Iterator[Event | Room]:
        """The events of one item, numbered 0; seconds count from when there was room for its group, for each process.

        Ray Train makes its own room and would wait for that in silence, so it is found first, here, and given up when
        Train is ready to. The driver hears of both: Ray keeps them for as long as its job where this process dies.

        Raises:
            ProcessLost: the group ended without the item's own end.
        """
        room = placement_group([dict(self._group.needs)] * self._group.count)
        yield self._group.room(room, is_there=False)
        ray.get(room.ready())
        yield self._group.room(room, is_there=True)
        began = time.monotonic()
        here = ray.get_runtime_context().current_actor
        end: Done | Failed | Stopped | None = None
        with ThreadPoolExecutor(1) as thread:
            work = partial(_take_part, self._group.context, here, function, item)
            group = thread.submit(_fit, work, self._group, room)
            group.add_done_callback(lambda _: self._news.put(None))
            while (event := self._news.get()) is not None:
                if not isinstance(event, Step | Room):
                    end = end or event  # where several processes fail, the first says why
                    continue
                yield event
                if isinstance(event, Step) and not asks:
                    self._answers.put(True)
        error = group.exception()
        if end is None or _is_lost(error):
            raise ProcessLost(line(error) if isinstance(error, Exception) else "it told no end")
        yield replace(end, seconds=(time.monotonic() - began) * self._group.count)

    @ray.method(concurrency_group="control")
    def answer(self, goes_on: bool) -> None:
        """Tells the item that waits whether it goes on."""
        self._answers.put(goes_on)

    @ray.method(concurrency_group="group")
    def settle(self, room: PlacementGroup) -> None:
        """Takes note of where the group is, for after a kill: Ray Train frees that only where Ray has a dashboard."""
        self._news.put(self._group.room(room, is_there=True))

    @ray.method(concurrency_group="group")
    def hear(self, event: Event) -> bool:
        """Takes what a process of the group tells; returns whether it goes on after a step, once that is known."""
        self._news.put(event)
        return self._answers.get() if isinstance(event, Step) else False


def _fit(work: Callable[[], None], group: Group, room: PlacementGroup) -> None:
    """Has every process of a new group do `work`, in place of `room`; Ray Train's own retries are off: the pool has its
    own, and where another has taken the room since, it waits for room again and says so."""
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
    with TemporaryDirectory(prefix="paredown-") as folder:  # a run of a known name and place would go on with that
        run = RunConfig(name=f"item-{uuid4().hex}", storage_path=folder, **settings)
        trainer = TorchTrainer(work, scaling_config=scale, run_config=run)
        remove_placement_group(room)
        trainer.fit()


def _take_part(context: Any, coordinator: Any, function: Callable[..., Any], item: Item) -> None:
    """What each process of a group does: the item, as a worker alone would, asking together after every step.

    Raises:
        ItemFailed: the item raised here, so that Ray Train ends the others, which may wait for this one.
    """
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    is_first = get_context().get_world_rank() == 0
    if is_first:
        ray.get(coordinator.settle.remote(get_current_placement_group()))

    def goes_on(index: int, value: object) -> bool:
        answer = ray.get(coordinator.hear.remote(Step(index, value))) if is_first else None
        return bool(broadcast_from_rank_zero(answer))

    *_, end = InlineCluster(ray.get(context)).run(function, [item], goes_on)
    if is_first or isinstance(end, Failed):
        ray.get(coordinator.hear.remote(end))
    if isinstance(end, Failed):
        raise ItemFailed(end.error)


def _is_lost(error: BaseException | None) -> bool:
    """Whether a group ended by something else than its item's own error."""
    failures = getattr(error, "worker_failures", {0: error}).values()
    return error is not None and not all(isinstance(failure, ItemFailed) for failure in failures)

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
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from cluster.base import Done, Event, Failed, Item, Step, Stopped
from cluster.inline import InlineCluster
from cluster.workers import ProcessLost, line


@dataclass(frozen=True)
class Group:
    """As many as `count` processes, each with `needs` of Ray's resources and a copy of what `context` refers to."""

    context: Any
    count: int
    needs: Mapping[str, float]


class ItemFailed(Exception):
    """The item raised, which was told already: this only ends the group."""


class Coordinator:
    """A worker that has a group do its items, and holds nothing itself: for the driver it is a `Worker`.

    Made an actor with the concurrency groups `control`, as that is, and `group`, by which its processes are heard.
    """

    def __init__(self, group: Group, *, sees_gpus: bool) -> None:
        self._group = group
        self._news: SimpleQueue[Event | None] = SimpleQueue()
        self._answers: SimpleQueue[bool] = SimpleQueue()
        self._room: PlacementGroup | None = None

    def ping(self) -> None:
        """Answers."""

    @ray.method(num_returns="streaming")
    def run(self, function: Callable[..., Any], item: Item, asks: bool) -> Iterator[Event]:
        """The events of one item, numbered 0; seconds count from when its group was asked for, and for each process.

        Raises:
            ProcessLost: the group ended without the item's own end.
        """
        began = time.monotonic()
        here = ray.get_runtime_context().current_actor
        end: Done | Failed | Stopped | None = None
        with ThreadPoolExecutor(1) as thread:
            group = thread.submit(_fit, partial(_take_part, self._group.context, here, function, item), self._group)
            group.add_done_callback(lambda _: self._news.put(None))
            while (event := self._news.get()) is not None:
                if not isinstance(event, Step):
                    end = end or event  # where several processes fail, the first says why
                    continue
                yield event
                if not asks:
                    self._answers.put(True)
        error = group.exception()
        if end is None or _is_lost(error):
            raise ProcessLost(line(error) if isinstance(error, Exception) else "it told no end")
        yield replace(end, seconds=(time.monotonic() - began) * self._group.count)

    @ray.method(concurrency_group="control")
    def answer(self, goes_on: bool) -> None:
        """Tells the item that waits whether it goes on."""
        self._answers.put(goes_on)

    @ray.method(concurrency_group="control")
    def leave(self) -> None:
        """Gives back the room of the group: Ray Train does so after a kill only where Ray has a dashboard."""
        if self._room is not None:
            remove_placement_group(self._room)

    @ray.method(concurrency_group="group")
    def settle(self, room: PlacementGroup) -> None:
        """Takes note of where the group is."""
        self._room = room

    @ray.method(concurrency_group="group")
    def hear(self, event: Event) -> bool:
        """Takes what a process of the group tells; returns whether it goes on after a step, once that is known."""
        self._news.put(event)
        return self._answers.get() if isinstance(event, Step) else False


def _fit(work: Callable[[], None], group: Group) -> None:
    """Has every process of a new group do `work`; Ray Train's own retries are off, since the pool's see to that."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths of the data stay what they are to a worker
    has_gpus = group.needs.get("GPU", 0) > 0
    retries: dict[str, Any] = {"max_failures": 0, "max_preemption_failures": 0}
    settings: dict[str, Any] = {
        "worker_runtime_env": {} if has_gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        "failure_config": FailureConfig(**retries),
        "logging_config": LoggingConfig("ERROR"),
    }
    scale = ScalingConfig(num_workers=group.count, use_gpu=has_gpus, resources_per_worker=dict(group.needs))
    with TemporaryDirectory(prefix="paredown-") as folder:  # a run of a known name and place would go on with that
        run = RunConfig(name=f"item-{uuid4().hex}", storage_path=folder, **settings)
        TorchTrainer(work, scaling_config=scale, run_config=run).fit()


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

"""The cluster on Ray: a pool of actors that load the context once, with lost work run again."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from cluster.base import Done, Event, Failed, Step, values

log = logging.getLogger(__name__)

ATTEMPTS = 3
PATIENCE_S = 300
LOCAL_OBJECT_STORE_BYTES = 2 * 1024**3


class ClusterError(Exception):
    """The cluster cannot be reached, has too little of what was asked for, or its workers cannot start."""


@dataclass(frozen=True)
class _Active:
    """An item on a worker, for the `attempt`-th time, since `began` (a monotonic clock)."""

    worker: Any
    index: int
    attempt: int
    began: float


class RayCluster:
    """Actors on a Ray cluster, each with one CPU thread and `context` in memory.

    A process that is connected to Ray already stays as it is; otherwise the object connects, and `close` disconnects.

    Args:
        context: what every worker holds; shipped once per node through the object store.
        address: `auto` starts a Ray of our own on this machine, anything else is a running cluster's address.
        max_parallel: the most workers; `auto` is as many as the cluster's CPUs (GPUs, where a trial needs one) allow.
        gpus_per_worker: the share of a GPU each worker holds; with 0, workers do not see GPUs at all.
        by_value: modules that exist only on this machine, sent along with what refers to them.

    Raises:
        ClusterError: no cluster at the address, or it cannot hold one worker, or the context cannot be sent.
    """

    def __init__(
        self,
        context: object,
        *,
        address: str = "auto",
        max_parallel: int | Literal["auto"] = "auto",
        gpus_per_worker: float = 0,
        by_value: Sequence[ModuleType] = (),
    ) -> None:
        for module in by_value:
            cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(address)
        try:
            self._workers = _capacity(max_parallel, gpus_per_worker)
            self._context = _sent(context)
        except ClusterError:
            self._disconnect()
            raise
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, scheduling_strategy="SPREAD")(_Worker)
        self._gpus = gpus_per_worker
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._deaths = 0
        for _ in range(self._workers):
            self._start()

    def run(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[Event]:
        """See `Cluster.run`: one item per worker at a time; an item that loses `ATTEMPTS` workers counts as failed.

        Raises:
            ClusterError: the workers die before they can take any work.
        """
        waiting = deque((index, 1) for index in range(len(items)))
        active: dict[Any, _Active] = {}
        while waiting or active:
            while waiting and self._idle:
                index, attempt = waiting.popleft()
                worker = self._idle.pop()
                active[worker.run.remote(function, items[index])] = _Active(worker, index, attempt, time.monotonic())
            news = self._next([*active, *(self._starting if waiting else ())])
            if news in self._starting:
                self._greet(news)
                continue
            event, is_lost = _heard(news, active[news])
            if isinstance(event, Step):
                yield event
                continue
            item = active.pop(news)
            if not is_lost:
                self._idle.append(item.worker)
            else:
                log.warning("item %d, attempt %d: %s", item.index, item.attempt, event)
                self._start()
            if is_lost and item.attempt < ATTEMPTS:
                waiting.appendleft((item.index, item.attempt + 1))
            else:
                yield event

    def close(self) -> None:
        """Stops the workers, and Ray too where this object connected to it."""
        for worker in (*self._idle, *self._starting.values()):
            ray.kill(worker)
        self._idle, self._starting = [], {}
        self._disconnect()

    def _disconnect(self) -> None:
        if self._is_ours:
            ray.shutdown()

    def _start(self) -> None:
        """Asks Ray for a worker; it gets work only once it has answered, so one that finds no room holds nothing up."""
        worker: Any = self._actor.remote(self._context, sees_gpus=self._gpus > 0)
        self._starting[worker.ping.remote()] = worker

    def _greet(self, ping: Any) -> None:
        """Takes a worker that has answered into the pool, or asks for another where it died at once."""
        worker = self._starting.pop(ping)
        try:
            ray.get(ping)
        except RayError as error:
            self._deaths += 1
            if self._deaths > ATTEMPTS * self._workers:
                raise ClusterError(
                    f"{self._deaths} workers died while starting: {_line(error)}; expected them to load the model and "
                    "the data; check that the workers can import what the model and the data are made of"
                ) from error
            self._start()
        else:
            self._idle.append(worker)

    def _next(self, awaited: list[Any]) -> Any:
        """The first of these to have news; says so where it takes long, since Ray waits for room in silence."""
        while True:
            ready, _ = ray.wait(awaited, num_returns=1, timeout=PATIENCE_S, fetch_local=False)
            if ready:
                return ready[0]
            free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            log.warning("no news from workers for %d s; free CPUs: %g", PATIENCE_S, free.get("CPU", 0))


class _Worker:
    """One process with the context loaded."""

    def __init__(self, context: object, *, sees_gpus: bool) -> None:
        if not sees_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves every GPU visible to an actor that asked for none
        self._context = context

    def ping(self) -> None:
        """Answers."""

    @ray.method(num_returns="streaming")
    def run(self, function: Callable[..., Any], item: tuple[Any, ...]) -> Iterator[tuple[bool, Any]]:
        """Every value of one call, with whether it is the last."""
        yield from values(function, self._context, item)


def _heard(stream: Any, item: _Active) -> tuple[Event, bool]:
    """The next event of an item, and whether its worker is lost."""
    try:
        is_last, value = ray.get(next(stream))
    except RayTaskError as error:
        seconds = time.monotonic() - item.began
        return Failed(item.index, f"{type(error.cause).__name__}: {error.cause}", str(error), seconds), False
    except RayError as error:
        seconds = time.monotonic() - item.began
        return Failed(item.index, f"lost its worker {item.attempt} times: {_line(error)}", str(error), seconds), True
    return Done(item.index, value, time.monotonic() - item.began) if is_last else Step(item.index, value), False


def _connect(address: str) -> None:
    """Connects this process, with Ray's usage reports off."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == "auto":
            ray.init("local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RayError, OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster at {address!r}: {error}; expected a running head node; check the address, or use auto"
        ) from error


def _capacity(max_parallel: int | Literal["auto"], gpus_per_worker: float) -> int:
    """How many workers fit; a share of a GPU never spans two."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    fits = int(resources.get("CPU", 0))
    gpus = int(resources.get("GPU", 0))
    if 0 < gpus_per_worker < 1:
        fits = min(fits, gpus * math.floor(1 / gpus_per_worker))
    elif gpus_per_worker:
        fits = min(fits, int(gpus / gpus_per_worker))
    if fits < 1:
        raise ClusterError(
            f"the cluster has {resources.get('CPU', 0):g} CPUs and {gpus} GPUs; expected one CPU "
            f"and {gpus_per_worker:g} GPUs for a worker; lower cluster.gpus_per_trial or add a node"
        )
    return fits if max_parallel == "auto" else min(max_parallel, fits)


def _sent(context: object) -> Any:
    """The context in the object store."""
    try:
        return ray.put(context)
    except (TypeError, AttributeError) as error:
        raise ClusterError(
            f"the model or the data cannot be sent to workers: {_line(error)}; expected objects that pickle; "
            "open files, locks and handles where they are used, not in the constructor"
        ) from error


def _line(error: Exception) -> str:
    """The last line of an error that says something: Ray puts the cause there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

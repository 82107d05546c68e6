"""The cluster on Ray: a pool of actors that load the context once, with lost work run again."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

import ray
from ray import cloudpickle
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from cluster.base import Done, Event, Failed, Step, values

log = logging.getLogger(__name__)

ATTEMPTS = 3
PATIENCE_S = 300
LOCAL_OBJECT_STORE_BYTES = 2 * 1024**3


class ClusterError(Exception):
    """The cluster cannot be reached, or has too little of what was asked for."""


class RayCluster:
    """Actors on a Ray cluster, each with one CPU thread and `context` in memory.

    A process that is connected to Ray already stays as it is; otherwise the object connects, and `close` disconnects.

    Args:
        context: what every worker holds; shipped once per node through the object store.
        address: `auto` starts a Ray of our own on this machine, anything else is a running cluster's address.
        max_parallel: the most workers; `auto` is as many as the cluster's CPUs (GPUs, where a trial needs one) allow.
        gpus_per_worker: the share of a GPU each worker holds.
        by_value: modules that exist only on this machine, sent along with what refers to them.

    Raises:
        ClusterError: no cluster at the address, or it cannot hold one worker.
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
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(address)
        for module in by_value:
            cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
        try:
            self.workers = _capacity(max_parallel, gpus_per_worker)
        except ClusterError:
            if self._is_ours:
                ray.shutdown()
            raise
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, scheduling_strategy="SPREAD")(_Worker)
        self._context = ray.put(context)
        self._idle: list[Any] = [self._actor.remote(self._context) for _ in range(self.workers)]

    def run(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[Event]:
        """See `Cluster.run`: one item per worker at a time; an item that loses `ATTEMPTS` workers counts as failed."""
        waiting = deque((index, 1) for index in range(len(items)))
        active: dict[Any, tuple[Any, int, int]] = {}
        while waiting or active:
            while waiting and self._idle:
                index, attempt = waiting.popleft()
                worker = self._idle.pop()
                active[worker.run.remote(function, items[index])] = (worker, index, attempt)
            stream = _first_ready(list(active))
            worker, index, attempt = active[stream]
            try:
                is_last, value = ray.get(next(stream))
            except RayTaskError as error:
                yield Failed(index, f"{type(error.cause).__name__}: {error.cause}", str(error))
                is_last = True
            except (RayActorError, ObjectLostError) as error:
                log.warning("a worker was lost with item %d (attempt %d): %s", index, attempt, _first_line(error))
                del active[stream]
                self._idle.append(self._actor.remote(self._context))
                if attempt < ATTEMPTS:
                    waiting.appendleft((index, attempt + 1))
                else:
                    yield Failed(index, f"lost its worker {ATTEMPTS} times: {_first_line(error)}", str(error))
                continue
            else:
                yield Done(index, value) if is_last else Step(index, value)
            if is_last:
                del active[stream]
                self._idle.append(worker)

    def close(self) -> None:
        """Stops the workers, and Ray too where this object connected to it."""
        for worker in self._idle:
            ray.kill(worker)
        self._idle = []
        if self._is_ours:
            ray.shutdown()


class _Worker:
    """One process with the context loaded."""

    def __init__(self, context: object) -> None:
        self._context = context

    @ray.method(num_returns="streaming")
    def run(self, function: Callable[..., Any], item: tuple[Any, ...]) -> Iterator[tuple[bool, Any]]:
        """Every value of one call, with whether it is the last."""
        yield from values(function, self._context, item)


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
    """How many workers fit."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    fits = int(resources.get("CPU", 0))
    if gpus_per_worker:
        fits = min(fits, int(resources.get("GPU", 0) / gpus_per_worker))
    if fits < 1:
        raise ClusterError(
            f"the cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs; expected one CPU "
            f"and {gpus_per_worker:g} GPUs for a worker; lower cluster.gpus_per_trial or add a node"
        )
    return fits if max_parallel == "auto" else min(max_parallel, fits)


def _first_ready(streams: list[Any]) -> Any:
    """Waits for the next value of any stream; says so where it takes long, since Ray waits for free CPUs in silence."""
    while True:
        ready, _ = ray.wait(streams, num_returns=1, timeout=PATIENCE_S, fetch_local=False)
        if ready:
            return ready[0]
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        log.warning("no news from %d workers for %d s; free CPUs: %g", len(streams), PATIENCE_S, free.get("CPU", 0))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

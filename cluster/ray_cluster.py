"""The cluster on Ray: a pool of workers beside the context, and one process of its own for each device."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal

import ray
from ray import cloudpickle
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.base import ClusterError, Event, Item, always
from cluster.groups import Coordinator, Group
from cluster.head import LOCAL_OBJECT_STORE_BYTES, METER, OWN_PRIORITY, as_it_listens, on_loopback, own_python
from cluster.inline import resources_text, without_context
from cluster.pool import Pool
from cluster.reach import check_cluster
from cluster.token import keep_token
from cluster.workers import summary

HOME = Path(__file__).resolve().parent.parent
"""The folder of our packages."""
NOT_TO_ASK = ("memory", "object_store_memory")
"""The resources that every node has and no worker can ask for."""


class RayCluster:
    """Actors on a Ray cluster, each with one CPU thread and `context` in memory.

    A process that is connected to Ray already stays connected; otherwise the object connects, and `close` disconnects.

    Args:
        context: the object that every worker holds; shipped once per node through the object store.
        address: `auto` starts a Ray of our own on this machine, anything else is a running cluster's address.
        max_parallel: the most workers; `auto` is as many as the cluster's CPUs (GPUs, where a trial needs one) allow
            now. At an address a number is taken as it is, since a cluster may grow with demand.
        gpus_per_worker: the share of a GPU each worker holds; with 0, workers do not see GPUs at all.
        stall_s: the seconds of silence after which an item is taken to hang, and its worker is replaced.
        shared: functions whose items are each run by so many processes together, every one with the resources of a
            worker and all of them in a torch process group: see `cluster.groups`. The workers make room for them.
        by_value: modules that exist only on this machine, sent along with the objects that refer to them.

    Raises:
        ClusterError: no cluster at the address, or it cannot hold one worker, or all that share an item; or the
            context cannot be sent.
    """

    def __init__(
        self,
        context: object,
        *,
        address: str = "auto",
        max_parallel: int | Literal["auto"] = "auto",
        gpus_per_worker: float = 0,
        stall_s: float = math.inf,
        shared: Mapping[Callable[..., Any], int] = MappingProxyType({}),
        by_value: Sequence[ModuleType] = (),
    ) -> None:
        for module in by_value:
            cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(address)
        try:
            size = _capacity(max_parallel, gpus_per_worker, may_grow=address != "auto")
            _check_groups(shared.values(), size)
            reference = _stored(context)
        except ClusterError:
            self._disconnect()
            raise
        needs = {"CPU": 1, "GPU": gpus_per_worker} if gpus_per_worker else {"CPU": 1}
        self._stall_s = stall_s
        self._counts = {function: count for function, count in shared.items() if count > 1}
        self._groups = {
            function: _coordinators(Group(reference, count, needs), size // count, stall_s)
            for function, count in self._counts.items()
        }
        self._alone: dict[tuple[tuple[str, float], ...], Pool] = {}
        self._pool = Pool(
            reference, size=size, needs=needs, strategy="SPREAD", stall_s=stall_s, occupied=self._occupied
        )
        self._pool.fill()

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """See `Cluster.run` and `Pool.run`.

        Raises:
            ClusterError: the workers cannot start, or all are busy with the run that this one began in.
        """
        if (groups := self._groups.get(function)) is not None:
            return groups.run(function, self._with_room(items), go_on)
        return self._pool.run(function, items, go_on)

    def _with_room(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; before each, idle workers leave their room to its group: taking it may have started them."""
        for item in items:
            self._pool.release_idle()
            yield item
        self._pool.release_idle()

    def _occupied(self) -> int:
        """The number of workers whose room the busy groups have."""
        return sum(self._counts[function] * groups.busy for function, groups in self._groups.items())

    def alone(
        self,
        function: Callable[..., Any],
        items: Iterable[Item],
        resources: Mapping[str, float] = MappingProxyType({}),
    ) -> Iterator[Event]:
        """See `Cluster.alone`; the process starts with the first call for its `resources` and is kept until `close`.

        It takes no CPU of Ray's, since the pool holds them all. Where the driver's node has a `paredown_meter`, a
        process without `resources` holds that; it waits, and says so, while another search measures there.

        Raises:
            ClusterError: no node has these resources; or the process cannot start.
        """
        self._pool.check_open()
        place = tuple(sorted(resources.items()))
        if place not in self._alone:
            start = partial(_on_a_node_with, resources) if resources else _beside_the_driver
            self._alone[place] = start(self._stall_s)
        return self._alone[place].run(partial(without_context, function), items)

    def close(self) -> None:
        """Kill all workers, busy ones too, and stop Ray if this object connected to it."""
        for pool in (self._pool, *self._groups.values(), *self._alone.values()):
            pool.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._is_ours:
            ray.shutdown()
            self._is_ours = False  # the next Ray of this process is another's


def _coordinators(group: Group, size: int, stall_s: float) -> Pool:
    """A pool of coordinators on the driver's node, with Ray Train's own processes: not where devices are measured."""
    return Pool(group, size=size, needs={}, strategy=_driver_node(), stall_s=stall_s, worker=Coordinator)


def _on_a_node_with(resources: Mapping[str, float], stall_s: float) -> Pool:
    """A pool of one process, which holds these resources.

    Raises:
        ClusterError: no node has them all.
    """
    nodes = [
        {name: amount for name, amount in node["Resources"].items() if name not in NOT_TO_ASK}
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    if not any(all(node.get(name, 0) >= amount for name, amount in resources.items()) for node in nodes):
        raise ClusterError(
            f"no node has {resources_text(resources)}; the nodes have {'; '.join(map(_node_text, nodes))}; expected "
            "one to have it all; start Ray there with --resources, or correct the device's resources"
        )
    return Pool(None, size=1, needs=resources, strategy="DEFAULT", stall_s=stall_s)


def _driver_node() -> NodeAffinitySchedulingStrategy:
    """The driver's node and no other: Ray puts an actor without resources anywhere if a node is only preferred."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _beside_the_driver(stall_s: float) -> Pool:
    """A pool of one process on the driver's node, which holds the node's meter if there is one."""
    here = ray.get_runtime_context().get_node_id()
    has_meter = any(node["NodeID"] == here and node["Resources"].get(METER, 0) >= 1 for node in ray.nodes())  # type: ignore[no-untyped-call]
    return Pool(None, size=1, needs={METER: 1} if has_meter else {}, strategy=_driver_node(), stall_s=stall_s)


def _node_text(resources: Mapping[str, float]) -> str:
    """A node's resources as a text, without the names that Ray gives every node."""
    return resources_text({name: amount for name, amount in resources.items() if ":" not in name})


class _OursLast(list[str]):
    """A list of folders that ends with that of our packages, whatever it is extended by."""

    def extend(self, folders: Iterable[str]) -> None:
        super().extend([*folders, str(HOME)])


def _job_config() -> JobConfig | None:
    """Have workers find our packages where the current folder has modules of the same names, which Ray puts before all.

    Each folder of the list goes to the front of a worker's path in turn. Ray extends the list itself, by that folder.
    """
    is_clashing = any(Path(name).is_dir() or Path(f"{name}.py").is_file() for name in ("cluster", "search", "methods"))
    if not is_clashing:
        return None
    config = JobConfig()
    config._py_driver_sys_path = _OursLast()  # an empty list is not taken as an argument
    return config


def _connect(address: str) -> None:
    """Connect this process, with Ray's usage reports off."""
    check_cluster(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ours: dict[str, Any] = {"job_config": _job_config(), "runtime_env": own_python()}
    ours |= {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == "auto":
            keep_token()
            os.environ |= OWN_PRIORITY | os.environ
            store = LOCAL_OBJECT_STORE_BYTES
            with on_loopback():
                ray.init("local", include_dashboard=False, object_store_memory=store, resources={METER: 1}, **ours)
        else:
            with as_it_listens(address):
                ray.init(address, **ours)
    except (ConnectionError, RayError, OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster at {address!r}: {error}; expected a running head node; check the address, or use auto"
        ) from error


def _capacity(max_parallel: int | Literal["auto"], gpus_per_worker: float, *, may_grow: bool) -> int:
    """The number of workers that fit, now or once the cluster grows; a share of a GPU never spans two."""
    if may_grow and max_parallel != "auto":
        return max_parallel
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
            f"and {gpus_per_worker:g} GPUs for a worker; lower cluster.gpus_per_trial or add a node; "
            "give cluster.max_parallel as a number where the nodes of a cluster come with demand"
        )
    return fits if max_parallel == "auto" else min(max_parallel, fits)


def _check_groups(counts: Iterable[int], size: int) -> None:
    """Refuse items that more processes are to share than the cluster has room for."""
    if (most := max(counts, default=1)) > size:
        raise ClusterError(
            f"the cluster has room for {size} workers, and {most} are to share an item; expected room for all of them; "
            "lower recovery.workers, or add a node"
        )


def _stored(context: object) -> Any:
    """Put the context into the object store; return the reference to it."""
    try:
        return ray.put(context)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise ClusterError(
            f"the model and the data do not fit into Ray's object store: {' '.join(str(error).split())}; expected room "
            "in memory or, for what spills, on disk; free some disk, or start Ray with more --object-store-memory (a "
            "container with more --shm-size)"
        ) from error
    except Exception as error:  # whatever an object's own code raises where it is pickled
        raise ClusterError(
            f"the model or the data cannot be sent to workers: {summary(error)}; expected objects that pickle; "
            "open files, locks and handles where they are used, not in the constructor"
        ) from error

"""Both clusters keep one promise: every item ends once, in steps and a result or an error, whoever dies."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster import Cluster, ClusterError, Done, Failed, InlineCluster, RayCluster, Step, interleaved

CONTEXT = np.arange(4.0)


def total(context: np.ndarray, factor: float) -> float:
    return float(context.sum() * factor)


def counted(context: np.ndarray, steps: int) -> Generator[int, None, str]:
    yield from range(steps)
    return f"{steps} steps beside {len(context)} numbers"


def refusing(context: np.ndarray, number: int) -> int:
    if number == 1:
        raise ValueError(f"no {number}")
    return number


def dying(context: np.ndarray, number: int, folder: str, deaths: int) -> int:
    """Takes its process along the first `deaths` times it is called; the files remember across processes."""
    died = len(list(Path(folder).glob(f"{number}-*")))
    if died < deaths:
        Path(folder, f"{number}-{died}").touch()
        os._exit(1)
    return number


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    made = RayCluster(CONTEXT, max_parallel=2, by_value=[sys.modules[__name__]])
    yield made
    made.close()


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.ray)])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return InlineCluster(CONTEXT) if request.param == "inline" else request.getfixturevalue("ray_cluster")


def test_values_come_back_by_item(cluster: Cluster) -> None:
    events = list(cluster.run(total, [(1,), (2,), (3,)]))
    assert {event.index: event.value for event in events if isinstance(event, Done)} == {0: 6, 1: 12, 2: 18}
    assert len(events) == 3


def test_generators_tell_steps_then_their_result(cluster: Cluster) -> None:
    events = [event for event in cluster.run(counted, [(3,), (0,)]) if event.index == 0]
    assert events[:3] == [Step(0, 0), Step(0, 1), Step(0, 2)]
    assert isinstance(events[3], Done)
    assert events[3].value == "3 steps beside 4 numbers"
    assert len(events) == 4


def test_an_error_is_one_items_result(cluster: Cluster) -> None:
    events = {event.index: event for event in cluster.run(refusing, [(0,), (1,), (2,)])}
    assert isinstance(events[1], Failed)
    assert events[1].error == "ValueError: no 1"
    assert "refusing" in events[1].trace
    assert {index: event.value for index, event in events.items() if isinstance(event, Done)} == {0: 0, 2: 2}
    assert all(event.seconds >= 0 for event in events.values() if not isinstance(event, Step))


def test_no_items_no_events(cluster: Cluster) -> None:
    assert list(cluster.run(total, [])) == []


@pytest.mark.ray
def test_lost_workers_are_replaced_and_their_items_run_again(ray_cluster: RayCluster, tmp_path: Path) -> None:
    events = list(ray_cluster.run(dying, [(0, str(tmp_path), 0), (1, str(tmp_path), 1), (2, str(tmp_path), 9)]))
    ended = {event.index: event for event in events}
    assert len(events) == 3, events
    assert {index: event.value for index, event in ended.items() if isinstance(event, Done)} == {0: 0, 1: 1}
    assert isinstance(ended[2], Failed)
    assert "lost its worker 3 times" in ended[2].error
    assert {event.index for event in ray_cluster.run(total, [(1,), (2,)]) if isinstance(event, Done)} == {0, 1}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ClusterError, match="expected one CPU and 1 GPUs"):
        RayCluster(CONTEXT, gpus_per_worker=1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_context_that_does_not_pickle_is_refused() -> None:
    with pytest.raises(ClusterError, match="cannot be sent to workers"):
        RayCluster(threading.Lock())


class Unloadable:
    """Pickles, but no worker can load it."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return importlib.import_module, ("a_module_only_the_driver_has",)


@pytest.mark.ray
def test_workers_that_cannot_start_end_the_run_with_the_reason(ray_cluster: RayCluster) -> None:
    ray_cluster.close()
    broken = RayCluster(Unloadable(), max_parallel=1)
    try:
        with pytest.raises(ClusterError, match="a_module_only_the_driver_has"):
            list(broken.run(total, [(1,)]))
    finally:
        broken.close()


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    found = interleaved({name: (lambda n=name: order.append(n)) for name in "ab"}, rounds=3, warmup=1)
    assert order == list("ab" * 4)
    assert all(0 < latency.min <= latency.p50 <= latency.p95 for latency in found.values())

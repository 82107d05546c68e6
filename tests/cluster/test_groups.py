"""Items that several processes share on Ray: reported, run again and stopped as those of one worker."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import distributed

from cluster import ClusterError, Done, Failed, InlineCluster, RayCluster, Step, Stopped, pool
from methods import METHODS
from methods.base import Budget
from methods.network import profile
from methods.pipeline import WorkerInputs, trial
from methods.protocol import defaults
from methods.training import top1
from tests.methods.training.test_distributed import FARTHEST, RECIPE, distance, in_float32, original, smoothed, splits
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

HOUR = 3600.0


def wavering(bench: WorkerInputs, folder: str) -> Iterator[int]:
    """Yield the number of processes; the second one dies after its first step, and hangs there the next time."""
    rank, died, hung = distributed.get_rank(), Path(folder, "died"), Path(folder, "hung")
    for step in range(3):
        if (rank, step) == (1, 1) and not died.exists():
            died.touch()
            os._exit(1)
        if (rank, step) == (1, 1) and not hung.exists():
            hung.touch()
            threading.Event().wait()
        there = torch.ones(())
        distributed.all_reduce(there)
        yield int(there)


def lopsided(bench: WorkerInputs) -> None:
    """Fail in one process while the other waits for it."""
    if distributed.get_rank() == 1:
        raise ValueError("only here")
    distributed.barrier()


def size_of(bench: WorkerInputs, name: str) -> int:
    return len(getattr(bench, name))


@pytest.fixture(scope="module")
def bench(teacher: Path) -> WorkerInputs:
    found = splits()  # smoothed, as `test_distributed.in_float32` is and for its reason
    return WorkerInputs(smoothed(original(teacher)), found.train, found.validation, found.calibration, top1)


@pytest.fixture(scope="module")
def cluster(bench: WorkerInputs) -> Iterator[RayCluster]:
    """As many CPUs as processes share an item: the workers have to make room."""
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how long an end of a group may go unnoticed
        ray.init("local", num_cpus=2, resources={"seat": 1}, object_store_memory=2**28, **options)
    shared = {trial: 2, wavering: 2, lopsided: 2, size_of: 1}
    made = RayCluster(bench, shared=shared, stall_s=HOUR, by_value=[sys.modules[__name__]])
    yield made
    made.close()
    ray.shutdown()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which the pool's clock is ahead, to be added up; it reads that every second."""
    seconds: list[float] = []
    monkeypatch.setattr(pool, "PATIENCE_S", 1)
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(seconds)))
    return seconds


@contextmanager
def heeded(act: Callable[[str], None]) -> Iterator[None]:
    """Call `act` with each message that the pool logs while the context is open."""

    def heed(record: logging.LogRecord) -> bool:
        act(record.getMessage())
        return True

    pool.log.addFilter(heed)
    try:
        yield
    finally:
        pool.log.removeFilter(heed)


def rooms() -> list[str]:
    """The states of Ray's placement groups that are not removed."""
    return [one["state"] for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]


class Enough(Exception):
    """Stops a run early."""


@pytest.mark.live
@pytest.mark.usefixtures("cluster")
def test_workers_leave_the_room_that_groups_have() -> None:
    groups = [2]
    made = pool.Pool(None, size=4, needs={"seat": 0.25}, strategy="DEFAULT", occupied=lambda: sum(groups))
    for left in (0.5, 0):
        assert [type(event) for event in made.run(repr, [()])] == [Done]
        wait_until(lambda left=left: ray.available_resources().get("seat", 0) == left)
        groups.clear()
    made.close()


@pytest.mark.live
def test_waiting_for_room_is_logged_and_is_no_hanging(
    cluster: RayCluster, bench: WorkerInputs, ahead: list[float]
) -> None:
    (done,) = cluster.run(size_of, [("train",)])
    assert isinstance(done, Done)
    assert done.value == len(bench.train)
    said: list[str] = []

    def wait_an_hour(message: str) -> None:
        if "groups" in message:
            said.append(message)
            ahead.append(HOUR)
        if len(said) == 3:
            assert rooms() == ["PENDING"]
            raise Enough

    waiting = RayCluster(bench, shared={lopsided: 2}, stall_s=HOUR / 2)
    with heeded(wait_an_hour), pytest.raises(Enough):
        list(waiting.run(lopsided, [()]))
    waiting.close()
    assert said[-1].endswith("1 of 1 groups have no room yet: each needs 2 CPU, free are 0 CPU")
    wait_until(lambda: not rooms())


def test_twenty_steps_of_two_workers_come_to_those_of_one(cluster: RayCluster, bench: WorkerInputs) -> None:
    uniform, images = METHODS["uniform"], torch.from_numpy(bench.calibration)
    rows = profile(bench.teacher, images[:2])
    scores = uniform.merge([uniform.score(one, bench.teacher, images, 0) for one in uniform.shards(rows, images)], rows)
    plan = uniform.allocate(scores, rows, Budget("half", macs=rows.macs // 2), defaults(uniform))
    item = (uniform, plan, RECIPE, 0)

    *expected_steps, expected = InlineCluster(bench).run(trial, [item])
    *steps, done = cluster.run(trial, [item])
    assert isinstance(expected, Done)
    assert isinstance(done, Done)
    assert [event.value.step for event in steps if isinstance(event, Step)] == [0, 10, 20]
    for one, other in zip(steps, expected_steps, strict=True):
        assert one.value.top1 == other.value.top1
    assert (done.value.macs, done.value.params) == (expected.value.macs, expected.value.params)
    assert done.value.top1_surgery == expected.value.top1_surgery
    assert done.value.top1_validation == expected.value.top1_validation
    states = [
        {name: torch.from_numpy(np.array(value)) for name, value in one.value.state.items()} for one in (done, expected)
    ]
    assert distance(*states) < FARTHEST[in_float32.__name__]
    assert done.seconds > 2 * done.value.seconds


@pytest.mark.live
def test_a_group_that_dies_or_hangs_is_replaced_and_stops_early(
    cluster: RayCluster, tmp_path: Path, ahead: list[float]
) -> None:
    told: list[object] = []

    def go_on(index: int, value: object) -> bool:
        told.append(value)
        if len(told) == 2:
            ahead.append(2 * HOUR)  # from when the second attempt hangs until it is taken for that
        return len(told) < 4

    def calm(message: str) -> None:
        if "told nothing" in message:
            ahead.clear()

    with heeded(calm):
        *steps, end = cluster.run(wavering, [(str(tmp_path),)], go_on)
    assert steps == [Step(0, 2)] * 4
    assert isinstance(end, Stopped)
    assert (tmp_path / "hung").exists()
    wait_until(lambda: not rooms())


@pytest.mark.live
def test_what_one_process_raises_is_the_items_error(cluster: RayCluster) -> None:
    (failed,) = cluster.run(lopsided, [()])
    assert isinstance(failed, Failed)
    assert failed.error == "ValueError: only here"
    assert "lopsided" in failed.trace
    (done,) = cluster.run(size_of, [("train",)])
    assert isinstance(done, Done), "the workers have not come back after the group"


@pytest.mark.live
@pytest.mark.usefixtures("cluster")
def test_groups_beyond_the_cluster_are_refused(bench: WorkerInputs) -> None:
    with pytest.raises(ClusterError, match="has room for 2 workers, and 3 are to share an item"):
        RayCluster(bench, shared={trial: 3})

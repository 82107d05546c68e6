"""A cluster on Ray keeps its promise when workers die, hang, start slowly or find no room."""

from __future__ import annotations

import importlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster import ClusterError, Done, Failed, RayCluster, Step, head, pool
from tests.cluster.cluster_items import (
    CONTEXT,
    CPUS,
    WORKERS,
    agreeing,
    counted,
    dying,
    hanging,
    held,
    lock,
    results,
    telling_its_process,
    total,
)
from tests.support.sockets import beyond_loopback
from tests.support.waiting import wait_until


@pytest.mark.ray
def test_alone_holds_its_resources(ray_cluster: RayCluster) -> None:
    beside, meter, gpus = results(ray_cluster.alone(held, [()]))[0]
    phone, device, _ = results(ray_cluster.alone(held, [()], {"phone": 1}))[0]
    assert (meter, device, gpus) == ({"paredown_meter": 1.0}, {"phone": 1.0}, "")
    workers = {event.value for event in ray_cluster.run(telling_its_process, [(1,)] * 4) if isinstance(event, Step)}
    assert len({os.getpid(), beside, phone, *workers}) == 3 + len(workers)


@pytest.mark.ray
def test_resources_that_no_node_has_are_refused(ray_cluster: RayCluster) -> None:
    with pytest.raises(ClusterError, match=r"no node has 2 phone; the nodes have 3 CPU, 1 board, .*1 phone; expected"):
        ray_cluster.alone(held, [()], {"phone": 2})
    with pytest.raises(ClusterError, match="no node has 1 memory"):
        ray_cluster.alone(held, [()], {"memory": 1})


@pytest.mark.ray
def test_a_process_that_dies_alone_is_replaced(ray_cluster: RayCluster, tmp_path: Path) -> None:
    events = list(
        ray_cluster.alone(dying, [(CONTEXT, number, str(tmp_path), deaths) for number, deaths in enumerate((1, 9, 0))])
    )
    assert [event.index for event in events] == [0, 1, 2]
    assert results(events) == {0: 0, 2: 2}
    assert isinstance(events[1], Failed)
    assert "lost its worker 3 times" in events[1].error


@pytest.mark.ray
def test_alone_says_that_it_waits_for_a_device_another_search_holds(
    ray_cluster: RayCluster, single: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PATIENCE_S", 2)
    assert len(list(single.alone(held, [()], {"board": 1}))) == 1
    said: list[str] = []

    def release(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        single.close()
        return False

    pool.log.addFilter(release)
    try:
        assert results(ray_cluster.alone(held, [()], {"board": 1}))[0][1] == {"board": 1.0}
    finally:
        pool.log.removeFilter(release)
    assert "1 of 1 workers have no room yet: each needs 1 board, free are 0 board" in said[0]


class Slow:
    """Loads on a worker only once a file is there."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return loaded_after, (self.file,)


def loaded_after(file: Path) -> np.ndarray:
    wait_until(file.exists)
    return CONTEXT


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_has_its_room_is_said_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PATIENCE_S", 1)
    said: list[str] = []

    def release(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        (tmp_path / "go").touch()
        return False

    pool.log.addFilter(release)
    by_value = [sys.modules[loader.__module__] for loader in (loaded_after, wait_until, total)]
    made = RayCluster(Slow(tmp_path / "go"), max_parallel=CPUS - WORKERS, by_value=by_value)
    try:
        assert results(made.run(total, [(1,)])) == {0: 6}
    finally:
        pool.log.removeFilter(release)
        made.close()
    assert said[0] == "no news for 1 s; 1 of 1 workers are starting: each holds 1 CPU and has not answered yet"


@pytest.mark.ray
def test_lost_workers_are_replaced_and_their_items_run_again(ray_cluster: RayCluster, tmp_path: Path) -> None:
    events = list(ray_cluster.run(dying, [(0, str(tmp_path), 0), (1, str(tmp_path), 1), (2, str(tmp_path), 9)]))
    ended = {event.index: event for event in events}
    assert len(events) == 3, events
    assert results(events) == {0: 0, 1: 1}
    assert isinstance(ended[2], Failed)
    assert "lost its worker 3 times" in ended[2].error
    assert results(ray_cluster.run(total, [(1,), (2,)])) == {0: 6, 1: 12}


@pytest.mark.ray
def test_an_item_that_hangs_runs_again_on_another_worker(ray_cluster: RayCluster, tmp_path: Path) -> None:
    made = RayCluster(CONTEXT, max_parallel=1, stall_s=5)
    beside = tmp_path / "beside"
    beside.mkdir()
    for first, again, end in (
        made.run(hanging, [(7, str(tmp_path))]),
        made.alone(hanging, [(CONTEXT, 7, str(beside))], {"cable": 1}),
    ):
        assert first == again == Step(0, 7)
        assert isinstance(end, Done)
        assert end.value == 7
    made.close()


@pytest.mark.ray
def test_an_item_whose_worker_is_killed_at_a_step_runs_again(ray_cluster: RayCluster) -> None:
    workers: list[int] = []

    def go_on(index: int, worker: int) -> bool:
        workers.append(worker)
        if len(workers) == 2:
            os.kill(worker, signal.SIGKILL)
        return True

    ends = [event for event in ray_cluster.run(telling_its_process, [(3,)], go_on) if not isinstance(event, Step)]
    assert [type(event) for event in ends] == [Done]
    assert workers[0] == workers[1] != workers[2]
    assert workers[2:] == [workers[2]] * 3


@pytest.mark.ray
def test_a_worker_lost_while_its_item_is_taken_is_replaced(single: RayCluster) -> None:
    def items() -> Iterator[tuple[int]]:
        stopped = single.run(counted, [(3,)], agreeing)
        next(stopped)
        stopped.close()
        yield (2,)

    assert results(single.run(total, items())) == {0: 12}


@pytest.mark.ray
def test_a_run_that_could_never_begin_is_refused(single: RayCluster) -> None:
    outer = single.run(counted, [(2,)], agreeing)
    assert next(outer) == Step(0, 0)
    assert list(single.run(total, [])) == []
    with pytest.raises(ClusterError, match="all 1 workers are busy with another run"):
        list(single.run(total, [(1,)]))
    assert [type(event) for event in outer] == [Step, Done]


@pytest.mark.ray
def test_closing_ends_what_runs(single: RayCluster) -> None:
    run = single.run(telling_its_process, [(3,)], agreeing)
    watched = os.pidfd_open(next(run).value)
    single.close()
    ended = select.poll()
    ended.register(watched, select.POLLIN)
    assert ended.poll(60_000), "the worker lives on"
    os.close(watched)
    for begin in (lambda: next(run), lambda: list(single.run(total, [(1,)])), lambda: single.alone(held, [()])):
        with pytest.raises(ClusterError, match="this cluster was closed"):
            begin()


@pytest.mark.ray
def test_a_value_that_does_not_pickle_is_an_error_of_its_item(ray_cluster: RayCluster) -> None:
    failed, *others = ray_cluster.run(lock, [()])
    assert isinstance(failed, Failed)
    assert "cannot pickle" in failed.error
    assert others == []


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
def test_workers_that_cannot_start_end_the_run_with_the_reason(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_cluster.close()
    ray.shutdown()
    monkeypatch.delenv("RAY_worker_niceness")
    Path("cluster.py").write_text("raise RuntimeError('a module of the user has the name of ours')")
    broken = RayCluster(Unloadable(), max_parallel=1)
    try:
        with pytest.raises(ClusterError, match="a_module_only_the_driver_has"):
            list(broken.run(total, [(1,)]))
        assert results(broken.alone(held, [()]))[0][1] == {"paredown_meter": 1.0}
        assert results(broken.alone(os.nice, [(0,)])) == {0: os.nice(0)}  # no lower priority than the command's
        assert beyond_loopback() == []
    finally:
        broken.close()
    assert not ray.is_initialized()


IN_A_SHELL = """
import os, sys, ray
from cluster import RayCluster

def executable():
    return sys.executable, os.environ["OWN"]

cluster = RayCluster(None, max_parallel=1)
task = ray.remote(executable).options(runtime_env={"env_vars": {"OWN": "here"}})
assert ray.get(task.remote(), timeout=60) == (sys.executable, "here")
cluster.close()
"""


@pytest.mark.ray
def test_workers_with_variables_of_their_own_start_where_the_path_of_python_has_a_space(tmp_path: Path) -> None:
    (tmp_path / "an environment").symlink_to(sys.prefix)
    python = tmp_path / "an environment" / "bin" / "python"
    subprocess.run([python, "-P", "-c", IN_A_SHELL], check=True, timeout=120)


def test_a_head_of_our_own_starts_workers_at_the_priority_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "START_COMMAND", "import os; print('niceness', os.environ['RAY_worker_niceness'])")
    monkeypatch.delenv("RAY_worker_niceness")
    with pytest.raises(ClusterError, match="niceness 0;"), head.own_head():
        pass
    monkeypatch.setenv("RAY_worker_niceness", "5")  # as somebody asked for
    with pytest.raises(ClusterError, match="niceness 5;"), head.own_head():
        pass

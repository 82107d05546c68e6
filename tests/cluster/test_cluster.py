"""Both clusters keep one promise: every item ends once, in steps and a result or an error, even if a worker dies."""

from __future__ import annotations

import importlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster import (
    Cluster,
    ClusterError,
    Done,
    Event,
    Failed,
    InlineCluster,
    RayCluster,
    Step,
    Stopped,
    always,
    head,
    pool,
)
from tests.support.waiting import wait_until

CONTEXT = np.arange(4.0)
CPUS = 3
WORKERS = 2


def total(context: np.ndarray, factor: float) -> float:
    return float(context.sum() * factor)


def counted(context: np.ndarray, steps: int) -> Generator[int, None, str]:
    yield from range(steps)
    return f"{steps} steps beside {len(context)} numbers"


def hanging(context: np.ndarray, number: int, folder: str) -> Generator[int, None, int]:
    """Yield once; hang there at the first call."""
    yield number
    if not Path(folder, f"{number}").exists():
        Path(folder, f"{number}").touch()
        threading.Event().wait()
    return number


def refusing(context: np.ndarray, number: int) -> int:
    if number == 1:
        raise ValueError(f"no {number}")
    return number


def dying(context: np.ndarray, number: int, folder: str, deaths: int) -> int:
    """Kill its process the first `deaths` times it is called; the files count across processes."""
    died = len(list(Path(folder).glob(f"{number}-*")))
    if died < deaths:
        Path(folder, f"{number}-{died}").touch()
        os._exit(1)
    return number


def careful(context: np.ndarray, folder: str) -> Generator[str, None, None]:
    """Leave a file after each step it got beyond, and one at the end, also if it is stopped."""
    try:
        for step in "abc":
            yield step
            Path(folder, step).touch()
    finally:
        Path(folder, "end").touch()


def telling_its_process(context: np.ndarray, steps: int) -> Iterator[int]:
    for _ in range(steps):
        yield os.getpid()


def held() -> tuple[int, dict[str, float], str | None]:
    """The process of a Ray worker, its share of Ray's resources, and the GPUs it sees."""
    resources = ray.get_runtime_context().get_assigned_resources()
    return os.getpid(), resources, os.environ.get("CUDA_VISIBLE_DEVICES")


def lock(context: np.ndarray) -> object:
    return threading.Lock()


def results(events: Iterable[Event]) -> dict[int, object]:
    """The values of the items that were done."""
    return {event.index: event.value for event in events if isinstance(event, Done)}


def agreeing(index: int, value: object) -> bool:  # unlike `always`, each step waits for it
    return True


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[RayCluster]:
    ray.init(
        "local",
        num_cpus=CPUS,
        resources={"paredown_meter": 1, "phone": 1, "board": 1, "cable": 1},
        object_store_memory=2**28,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    made = RayCluster(CONTEXT, max_parallel=WORKERS, by_value=[sys.modules[__name__]])
    yield made
    made.close()
    ray.shutdown()


@pytest.fixture
def single(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    """A second cluster of one worker on the same Ray."""
    made = RayCluster(CONTEXT, max_parallel=CPUS - WORKERS)
    yield made
    made.close()


@pytest.fixture(params=["inline", pytest.param("ray", marks=pytest.mark.ray)])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return InlineCluster(CONTEXT) if request.param == "inline" else request.getfixturevalue("ray_cluster")


def test_values_come_back_by_item(cluster: Cluster) -> None:
    events = list(cluster.run(total, [(1,), (2,), (3,)]))
    assert results(events) == {0: 6, 1: 12, 2: 18}
    assert len(events) == 3


def test_generators_yield_steps_then_their_result(cluster: Cluster) -> None:
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
    assert results(events.values()) == {0: 0, 2: 2}
    assert all(event.seconds >= 0 for event in events.values() if not isinstance(event, Step))


def test_no_items_no_events(cluster: Cluster) -> None:
    assert list(cluster.run(total, [])) == []


def test_items_are_taken_only_when_a_worker_is_free(cluster: Cluster) -> None:
    taken: list[int] = []

    def items() -> Iterator[tuple[int]]:
        for number in range(6):
            taken.append(number)
            yield (number,)

    seen = [len(taken) for _ in cluster.run(total, items())]
    assert len(seen) == len(taken) == 6
    assert all(count <= ended + WORKERS for ended, count in enumerate(seen))


def test_taking_an_item_may_run_others(cluster: Cluster) -> None:
    def items() -> Iterator[tuple[float]]:
        for number in range(4):
            yield from ((float(value),) for value in results(cluster.run(total, [(number,)])).values())

    assert results(cluster.run(total, items())) == {number: 36 * number for number in range(4)}


def test_an_error_while_taking_leaves_the_cluster_usable(cluster: Cluster) -> None:
    def items() -> Iterator[tuple[int]]:
        yield (3,)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(cluster.run(counted, items(), agreeing))
    assert results(cluster.run(total, [(1,), (2,), (3,)])) == {0: 6, 1: 12, 2: 18}


def test_an_item_waits_for_its_answer_and_ends_where_that_is_no(cluster: Cluster, tmp_path: Path) -> None:
    folders = [tmp_path / "stopped", tmp_path / "done"]
    asked: list[tuple[int, str]] = []
    for folder in folders:
        folder.mkdir()

    def go_on(index: int, step: str) -> bool:
        asked.append((index, step))
        assert not (folders[index] / step).exists()
        return (index, step) != (0, "b")

    events: dict[int, list[Event]] = {0: [], 1: []}
    for event in cluster.run(careful, [(str(folder),) for folder in folders], go_on):
        events[event.index].append(event)
        if isinstance(event, Stopped):
            assert {path.name for path in folders[0].iterdir()} == {"a", "end"}
    assert events[0][:2] == [Step(0, "a"), Step(0, "b")]
    assert [type(event) for event in events[0][2:]] == [Stopped]
    assert [type(event) for event in events[1]] == [Step, Step, Step, Done]
    assert sorted(asked) == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (1, "c")]


def test_an_error_of_the_answer_is_the_callers(cluster: Cluster) -> None:
    def go_on(index: int, step: int) -> bool:
        raise KeyError(step)

    with pytest.raises(KeyError):
        list(cluster.run(counted, [(3,)], go_on))
    assert results(cluster.run(total, [(1,)])) == {0: 6}


@pytest.mark.parametrize("go_on", [always, agreeing])
def test_a_run_that_is_stopped_early_leaves_the_cluster_usable(
    cluster: Cluster, go_on: Callable[[int, object], bool]
) -> None:
    run = cluster.run(counted, [(3,), (3,), (3,)], go_on)
    assert isinstance(next(run), Step)
    del run
    assert results(cluster.run(total, [(1,), (2,), (3,)])) == {0: 6, 1: 12, 2: 18}


def test_alone_is_one_process_without_the_context(cluster: Cluster) -> None:
    both = results(cluster.alone(os.getpid, [(), ()]))
    assert list(both) == [0, 1]
    assert {*both.values()} == {*results(cluster.alone(os.getpid, [()])).values()}
    (failed,) = cluster.alone(results, [()])
    assert isinstance(failed, Failed)
    assert failed.error.startswith("TypeError: results() missing 1")


def test_this_process_has_no_resources() -> None:
    assert results(InlineCluster(CONTEXT).alone(os.getpid, [()])) == {0: os.getpid()}
    with pytest.raises(ClusterError, match="this process has no 1 phone; expected a Ray cluster"):
        list(InlineCluster(CONTEXT).alone(os.getpid, [()], {"phone": 1}))


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
    by_value = [sys.modules[__name__], sys.modules[wait_until.__module__]]
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
    broken = RayCluster(Unloadable(), max_parallel=1)
    try:
        with pytest.raises(ClusterError, match="a_module_only_the_driver_has"):
            list(broken.run(total, [(1,)]))
        assert results(broken.alone(held, [()]))[0][1] == {"paredown_meter": 1.0}
        assert results(broken.alone(os.nice, [(0,)])) == {0: os.nice(0)}  # no lower priority than the command's
    finally:
        broken.close()
    assert not ray.is_initialized()


def test_a_head_of_our_own_starts_workers_at_the_priority_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "START_COMMAND", "import os; print('niceness', os.environ['RAY_worker_niceness'])")
    monkeypatch.delenv("RAY_worker_niceness")
    with pytest.raises(ClusterError, match="niceness 0;"), head.own_head():
        pass
    monkeypatch.setenv("RAY_worker_niceness", "5")  # as somebody asked for
    with pytest.raises(ClusterError, match="niceness 5;"), head.own_head():
        pass

"""Things die on a cluster of several nodes: a search ends as an undisturbed one all the same, or says what to do."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.cluster_utils import Cluster as Raylets

from cluster import ClusterError, Done, Failed, RayCluster
from cluster.head import free_ports
from search.base import Report
from search.driver import loop
from search.driver.prepare import prepare
from search.record.record import Record
from search.record.searches import find_search
from search.workload import Workload, load
from tests.support.mlflow_servers import mlflow_server
from tests.support.searches import SPEC, inline, parsed, place, quiet
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # nodes of Ray's own cluster leave them
]

ROOT = Path(__file__).resolve().parents[2]
TEXT = SPEC.replace("trials: 3", "trials: 5")
EVERY_METHOD = SPEC.replace("[itpruner, alds]", "[itpruner, manidp, practise, alds]").replace("trials: 3", "trials: 5")
NODES = 4
STORE_BYTES = 80 * 2**20
GIB = 2**30


def total(context: np.ndarray) -> float:
    return float(context.sum())


def meet(context: object, folder: str, number: int, count: int) -> int:
    """Waits until `count` items are at this point, each on a worker of its own; the worker's process."""
    Path(folder, str(number)).touch()
    while len(list(Path(folder).iterdir())) < count:
        threading.Event().wait(0.02)
    return os.getpid()


def gather(cluster: RayCluster, count: int, folder: Path) -> list[int]:
    """The processes of that many workers, all of them up and idle."""
    folder.mkdir()
    events = list(cluster.run(meet, [(str(folder), number, count) for number in range(count)]))
    assert all(isinstance(event, Done) for event in events), events
    return [event.value for event in events if isinstance(event, Done)]


def hog(context: object, gibibytes: int) -> None:
    """Takes memory, touches it and keeps it."""
    held = [np.ones(GIB // 8) for _ in range(gibibytes)]
    threading.Event().wait(60 * len(held))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    made = Raylets(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    yield made
    made.shutdown()
    del made
    gc.collect()  # while what its nodes left open is still forgiven


@pytest.fixture
def raylets(cluster: Raylets) -> Raylets:
    """Four nodes of one CPU; what a test before this one has taken away is made up for."""
    while len(cluster.list_all_nodes()) < NODES:
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    return cluster


@contextmanager
def workers(raylets: Raylets, context: object, count: int) -> Iterator[RayCluster]:
    made = RayCluster(context, address=raylets.address, max_parallel=count, by_value=[sys.modules[__name__]])
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def calm(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The record of a search that nothing disturbs, in one process."""
    here = place(tmp_path_factory.mktemp("calm"), teacher)
    uri = f"sqlite:///{here / 'paredown.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("PAREDOWN_CACHE", str(here / "cache"))
        loop.search(parsed(here, f"{TEXT}\ntracking: {{uri: '{uri}'}}\n"), inline, quiet)
    return find_search(uri, "digits")


def table(record: Record) -> list[tuple[Any, ...]]:
    """Return what must not depend on deaths: every trial with its plan and its end."""
    return [
        (one.budget, one.trial, one.method, one.knobs, one.state, one.top1_validation, one.stop,
         one.macs, one.params, record.read.plan(one.run_id).choices)
        for one in record.read.trials()
    ]  # fmt: skip


def check_recorded_once(record: Record) -> None:
    """Every trial and every rung of it is on record once, every run has ended, every winner is one version."""
    trials = record.read.trials()
    assert set(Counter((one.budget, one.trial) for one in trials).values()) == {1}
    experiment = record.client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = record.client.search_runs([experiment.experiment_id])
    assert len(runs) == len(trials) + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    for one in trials:
        steps = [rung.step for rung in record.client.get_metric_history(one.run_id, "top1")]
        assert len(steps) == len(set(steps)), steps
    versions = record.client.search_model_versions("name='digits'")
    assert Counter(found.tags["budget"] for found in versions) == {"half": 1}


def at_work(raylets: Raylets) -> list[tuple[Any, psutil.Process]]:
    """The worker processes that have an item, each with its node, but for those of the driver's."""
    return [
        (node, child)
        for node in raylets.worker_nodes
        for child in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        if is_at_work(child)
    ]


def is_at_work(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::Worker.run")
    except psutil.Error:  # it is dead by now
        return False


def held_up(raylets: Raylets) -> list[tuple[Any, psutil.Process]]:
    """Those at work that cannot end while the driver is in a report: who could do so without its answer has."""
    before, busy = list[tuple[Any, psutil.Process]](), at_work(raylets)
    while busy != before:
        threading.Event().wait(1)
        before, busy = busy, at_work(raylets)
    return busy


def striking(raylets: Raylets, struck: list[str]) -> Report:
    """A report that takes a node away during scoring, and kills two trials' workers, one of them with its node."""
    spared: set[int] = set()

    def report(stage: str, ended: int, total: int, note: str) -> None:
        is_step = stage == "trials" and ": step " in note
        if not (busy := held_up(raylets) if is_step and 0 < len(struck) < 3 else at_work(raylets)):
            return
        node, process = busy[0]
        if not struck and stage == "scoring" and ended < total / 2:
            raylets.remove_node(node, allow_graceful=False)
            struck.append("a node in scoring")
        elif len(struck) == 1 and is_step and len(busy) > 1:
            process.kill()
            spared.update(other.pid for _, other in busy[1:])  # no item is to lose all its attempts
            struck.append("a worker in a trial")
        elif len(struck) == 2 and is_step and (found := [one for one, other in busy if other.pid in spared]):
            raylets.remove_node(found[0], allow_graceful=False)
            struck.append("a node in a trial")

    return report


def test_a_search_that_loses_nodes_and_workers_ends_as_an_undisturbed_one(
    raylets: Raylets, calm: Record, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    struck: list[str] = []

    def make(made: Workload) -> RayCluster:
        found = RayCluster(
            made.worker_inputs(), address=raylets.address, max_parallel=NODES, by_value=[sys.modules[__name__]]
        )
        gather(found, NODES, tmp_path / "met")
        return found

    with caplog.at_level(logging.WARNING, "cluster.pool"):
        loop.search(parsed(place(tmp_path, teacher), TEXT), make, striking(raylets, struck))
    assert struck == ["a node in scoring", "a worker in a trial", "a node in a trial"]
    assert len(raylets.list_all_nodes()) == NODES - 2
    lost = sum("lost its worker" in record.getMessage() for record in caplog.records)
    assert lost >= 2  # in the two trials; the shard of the node that went first may just have ended
    found = find_search("sqlite:///paredown.db", "digits")
    assert table(found) == table(calm)
    check_recorded_once(found)


def test_scores_are_the_same_bits_for_one_two_and_four_workers(
    raylets: Raylets, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = parsed(place(tmp_path, teacher), EVERY_METHOD)
    found: dict[int, dict[str, dict[str, np.ndarray]]] = {}
    for count in (1, 2, NODES):
        cache = tmp_path / f"of {count}"
        monkeypatch.setenv("PAREDOWN_CACHE", str(cache))
        made = load(wanted, quiet)
        with workers(raylets, made.worker_inputs(), count) as cluster:
            assert len(set(gather(cluster, count, tmp_path / f"met {count}"))) == count
            prepare(wanted, made, cluster, quiet)
        found[count] = {path.name: dict(np.load(path)) for path in (cache / "scores").iterdir()}
    assert len(found[1]) == 5
    for scores in (found[2], found[NODES]):
        assert scores.keys() == found[1].keys()
        for name, arrays in found[1].items():
            assert scores[name].keys() == arrays.keys()
            assert all(scores[name][key].tobytes() == value.tobytes() for key, value in arrays.items())


def test_idle_workers_that_die_together_cost_an_item_one_attempt(raylets: Raylets, tmp_path: Path) -> None:
    with workers(raylets, np.arange(4.0), NODES) as cluster:
        for process in gather(cluster, NODES, tmp_path / "met"):
            os.kill(process, signal.SIGKILL)
        (event,) = cluster.run(total, [()])
    assert isinstance(event, Done), event


def test_a_device_whose_node_leaves_is_waited_for(raylets: Raylets) -> None:
    board = raylets.add_node(num_cpus=0, resources={"board": 1}, object_store_memory=STORE_BYTES)

    def items() -> Iterator[tuple[()]]:
        yield ()
        raylets.remove_node(board, allow_graceful=False)
        again.append(raylets.add_node(num_cpus=0, resources={"board": 1}, object_store_memory=STORE_BYTES))
        yield ()

    again: list[Any] = []
    with workers(raylets, None, 1) as cluster:
        before, after = [event.value for event in cluster.alone(os.getpid, items(), {"board": 1})]  # type: ignore[union-attr]
    raylets.remove_node(again[0])
    assert before != after


def test_a_context_larger_than_the_object_store_spills(raylets: Raylets) -> None:
    with workers(raylets, np.ones(3 * STORE_BYTES // 16), 2) as cluster:
        ends = list(cluster.run(total, [(), (), ()]))
    assert [getattr(end, "value", end) for end in ends] == [3 * STORE_BYTES / 16] * 3


@pytest.fixture
def cramped() -> Iterator[None]:
    """A Ray that has a gibibyte of memory left and no disk to spill to."""
    used, all_of_it = get_used_memory(), get_system_memory()
    if all_of_it - used < 6 * GIB:
        pytest.skip("needs 6 GiB of free memory: what it takes must endanger nobody")
    ray.init(
        "local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=STORE_BYTES,
        _system_config={
            "memory_usage_threshold": (used + GIB) / all_of_it,
            "memory_monitor_refresh_ms": 100,
            "local_fs_capacity_threshold": 0.001,
        },
    )
    yield
    ray.shutdown()


@pytest.mark.live
@pytest.mark.usefixtures("cramped")
def test_memory_and_store_that_are_full_end_in_words() -> None:
    cluster = RayCluster(None, stall_s=60, by_value=[sys.modules[__name__]])
    failed, *others = cluster.run(hog, [(3,)])
    cluster.close()
    assert others == []
    assert isinstance(failed, Failed)
    assert failed.error.startswith(
        "lost its worker 3 times: 1 worker(s) were killed due to the node running low on mem"
    )
    assert failed.error.endswith("expected room for it; lower cluster.max_parallel, or give the nodes more memory")
    with pytest.raises(ClusterError, match=r"do not fit into Ray's object store: .*disk.*; free some disk, or start"):
        RayCluster(np.ones(STORE_BYTES // 4))


def ended(uri: str) -> int:
    """Count the trials on record; none before the search is."""
    client = MlflowClient(uri)
    try:
        found = client.get_experiment_by_name("digits")
        return len(client.search_runs([found.experiment_id], "tags.`paredown.state` != ''")) if found else 0
    except MlflowException:
        return 0


@contextmanager
def command(raylets: Raylets) -> Iterator[subprocess.Popen[str]]:
    """The command itself, on the raylets; it waits for a server that is gone for some seconds, not a minute."""
    process = subprocess.Popen(
        [sys.executable, "-m", "search.cli", "search", "spec.yaml", "--json", "--address", raylets.address],
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.live
def test_a_search_whose_mlflow_server_dies_stops_and_goes_on(
    raylets: Raylets, calm: Record, teacher: Path, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    place(tmp_path, teacher, f"{TEXT}\ntracking: {{uri: '{uri}'}}\ncluster: {{max_parallel: 2}}\n")

    with mlflow_server(tmp_path, port) as server, command(raylets) as process:
        wait_until(lambda: ended(uri) >= 2, process)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        _, told = process.communicate(timeout=300)
    assert process.returncode == 1, told
    assert "every finished trial is kept: mend the store, and the same command goes on" in told
    with mlflow_server(tmp_path, port):
        assert 2 <= ended(uri) < len(table(calm))
        with command(raylets) as process:
            _, told = process.communicate(timeout=600)
        assert process.returncode == 0, told
        found = find_search(uri, "digits")
        assert table(found) == table(calm)
        check_recorded_once(found)

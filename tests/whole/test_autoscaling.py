"""Nodes that come with demand and go with it: the types of ray_config.yaml under Ray's provider of fake nodes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from cluster import ClusterError, RayCluster
from cluster.head import free_ports
from search.driver.prepare import prepare
from search.workload import load
from tests.support.searches import SPEC, parsed, place, quiet
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.live, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2


def scaling(address: str) -> dict[str, Any]:
    """The cluster file with nodes that are processes of this machine, and a few seconds for minutes."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    types = config["available_node_types"]
    types["ray.head.default"] = types.pop(config["head_node_type"]) | {"max_workers": 0}
    for one in types.values():
        one["node_config"] = {}
    fake = {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    kinds = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config |= {f"{kind}_commands": [] for kind in kinds}
    return config | {
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 1.0,
        "provider": {"type": "fake_multinode", "gcs_address": address, **fake},
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
    }


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster that has a head and nothing else, whose autoscaler looks every second."""
    folder = Path(os.environ["RAY_TMPDIR"], "grow")  # short, since paths of sockets are
    gcs, client, agent, grpc, metrics = free_ports(5)
    address = f"{ray.util.get_node_ip_address()}:{gcs}"
    (tmp_path / "scaling.yaml").write_text(yaml.safe_dump(scaling(address)))
    command = ["start", "--head", "--block", "--include-dashboard=false", "--num-cpus=0", f"--temp-dir={folder}"]
    ports = {"port": gcs, "ray-client-server-port": client, "dashboard-agent-listen-port": agent}
    ports |= {"dashboard-agent-grpc-port": grpc, "metrics-export-port": metrics}
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *command, "--autoscaling-config", str(tmp_path / "scaling.yaml")]
        + [f"--{name}={number}" for name, number in ports.items()],
        env=os.environ
        | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "0"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_until(lambda: "runtime started" in (tmp_path / "head.log").read_text())
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        yield address
    finally:
        ray.shutdown()
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        log.close()
        for left in psutil.process_iter():  # nodes are the autoscaler's children, which it leaves behind
            if any(str(folder) in word for word in _words(left)):
                left.kill()


def _words(process: psutil.Process) -> list[str]:
    """A process's command line, empty where it is gone or not ours to see."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def nodes() -> list[dict[str, float]]:
    """Return the resources of the living nodes beside the head."""
    return [
        {name: amount for name, amount in node["Resources"].items() if name in ("CPU", "GPU")}
        for node in ray.nodes()
        if node["Alive"] and "node:__internal_head__" not in node["Resources"]
    ]


def test_demand_brings_nodes_up_from_none_and_idleness_takes_them_down(
    growing: str, teacher: Path, tmp_path: Path
) -> None:
    wanted = parsed(place(tmp_path, teacher), SPEC)
    made = load(wanted, quiet)
    with pytest.raises(ClusterError, match=r"has 0 CPUs and 0 GPUs; .*; give cluster.max_parallel as a number"):
        RayCluster(made.worker_inputs(), address=growing, gpus_per_worker=1)
    assert nodes() == []
    seen: list[dict[str, float]] = []
    cluster = RayCluster(made.worker_inputs(), address=growing, max_parallel=WORKERS, gpus_per_worker=1)
    prepare(wanted, made, cluster, lambda *_: seen.extend(nodes()))
    cluster.close()
    assert {node["GPU"] for node in seen} == {1}
    wait_until(lambda: nodes() == [])

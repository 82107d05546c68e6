"""A Ray of our own on this machine: a head with ports and a folder of its own, by `ray start`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from ray._private import ray_constants
from ray.util import get_node_ip_address

from cluster.base import ClusterError
from cluster.reach import answers
from cluster.token import keep_token

LOCAL_OBJECT_STORE_BYTES = 2 * 1024**3
OWN_PRIORITY = {"RAY_worker_niceness": "0"}
"""Has workers run at the priority of the command that starts Ray, where Ray would lower it by 15: beside any other
process the meter would wait. Only the environment in which a node's Ray starts decides that."""
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Has Ray take 127.0.0.1 for the address of its node and listen there alone, as it does by itself on desktops, whose
firewalls would ask about anything else. `ray start` and `ray.init` take no loopback address as an argument."""
METER = "paredown_meter"
"""The resource of which a node has one: its holder alone measures there."""
START_S, END_S, POLL_S = 300.0, 60.0, 0.2
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")
"""Ray's ports that have a fixed number by default, or whose number is needed here."""
START_COMMAND = """
import ctypes, signal, sys
from ray.scripts.scripts import main
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
main()
"""
"""Ray's command line, but it ends with the thread that started it, even one that is killed."""


def own_python() -> dict[str, str] | None:
    """Return the runtime environment of this Python, if its path needs quotes in a shell; otherwise none is needed.

    Ray starts the workers that have variables of their own through a shell, and does not quote what it starts.
    """
    quoted = shlex.quote(sys.executable)
    return None if quoted == sys.executable else {"py_executable": quoted}


@contextmanager
def on_loopback() -> Iterator[None]:
    """Have the Ray that this process starts or joins while the context is open keep to the loopback."""
    before = {key: os.environ.get(key) for key in ALONE}, ray_constants.ENABLE_RAY_CLUSTER
    os.environ |= ALONE  # for Ray's other processes; this one has read it, when it imported Ray
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        variables, ray_constants.ENABLE_RAY_CLUSTER = before
        for key, value in variables.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def as_it_listens(address: str) -> AbstractContextManager[None]:
    """Return the context in which to join the Ray at `address`: that of one of our own, if it is on the loopback alone.

    Ray takes an address on the loopback for the same port of the machine's own address.
    """
    host, _, port = address.rpartition(":")
    own = get_node_ip_address()  # type: ignore[no-untyped-call]
    is_alone = host in ("127.0.0.1", "localhost") and not answers(f"{f'[{own}]' if ':' in own else own}:{port}")
    return on_loopback() if is_alone else nullcontext()


@contextmanager
def own_head() -> Iterator[tuple[str, str]]:
    """Run a head while the context is open; yield its address and that of its dashboard, which also takes jobs.

    `ray.init` cannot be told which ports to use, and its head keeps no record of itself: a second one on a machine
    takes no jobs, and jobs of the first may find the second. The head's folder is removed at the end, unless it never
    started: then its log says why.

    Raises:
        ClusterError: it does not start.
    """
    with on_loopback():
        yield from _started_head()


def _started_head() -> Iterator[tuple[str, str]]:
    keep_token()
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    folder = tempfile.mkdtemp(prefix="pd", dir=os.environ.get("RAY_TMPDIR"))
    command = [sys.executable, "-c", START_COMMAND, "start", "--head", "--block", "--dashboard-host=127.0.0.1"]
    command += [f"--temp-dir={folder}", f"--object-store-memory={LOCAL_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    command += [f"--resources={json.dumps({METER: 1})}", *(f"--{name}={port}" for name, port in ports.items())]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = OWN_PRIORITY | {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with Path(folder, "start.log").open("w") as log:
        head = subprocess.Popen(
            command, env=environment | {"PATH": path}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip  # Ctrl-C is for the command, which ends its Ray itself
    has_started = False
    try:
        _wait_for_dashboard(head, ports["dashboard-port"], Path(log.name))
        has_started = True
        yield f"127.0.0.1:{ports['port']}", f"127.0.0.1:{ports['dashboard-port']}"
    finally:
        _stop(head)
        if has_started:
            shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Find ports of the loopback that no process listens on."""
    with ExitStack() as taken:
        sockets = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]


def _stop(head: subprocess.Popen[bytes]) -> None:
    head.terminate()
    try:
        head.wait(END_S)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()


def _wait_for_dashboard(head: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until the dashboard answers, which starts last."""
    deadline = time.monotonic() + START_S
    while head.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(POLL_S)
    lines = log.read_text(errors="replace").strip().splitlines()
    raise ClusterError(
        f"Ray did not start: {lines[-1] if lines else 'it said nothing'}; expected its dashboard to answer within "
        f"{START_S:g} s; see {log}"
    )

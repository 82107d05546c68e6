"""Serve an HTTP app by Ray Serve while a context is open. Knows nothing of the app's answers."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import MappingProxyType
from typing import Any, TypeAlias
from urllib.request import urlopen

import ray
from ray.exceptions import RayError

from cluster.base import ClusterError
from cluster.front import BEFORE_THE_APP, stay_on_loopback
from cluster.head import as_it_listens, own_head, own_python
from cluster.reach import check_cluster

log = logging.getLogger(__name__)

App: TypeAlias = Any
"""An ASGI app."""

HEAD = {"node:__internal_head__": 0.001}
"""A resource that only the head node has: the app has to be beside the command and its files."""
MOST_ONGOING = 256
"""Requests at once; event streams are long ones."""
ANSWER_S = 10.0
"""Time for the dashboard to show whether it asks for a token."""
CLOSING_S = 2.0
PRIVATE = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
"""Keep Serve from listening on all interfaces: with either of these it does, even if a host is given."""
ENVIRONMENT = {**PRIVATE, **BEFORE_THE_APP}


@contextmanager
def connected(address: str) -> Iterator[str]:
    """Connect to Ray while the context is open; yield the URL of its dashboard, which also takes jobs.

    Args:
        address: `auto` starts a Ray of our own on this machine, which ends with the context, and with it all jobs;
            anything else is the address of a running cluster's head, which must be this machine.

    Raises:
        ClusterError: no cluster at the address, or it has no dashboard, or its head is elsewhere.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", **ENVIRONMENT}
    with ExitStack() as opened:
        dashboard: str | None = None
        if address == "auto":
            address, dashboard = opened.enter_context(own_head())
        else:
            check_cluster(address)
            opened.enter_context(as_it_listens(address))
        try:
            context = ray.init(address, runtime_env=own_python(), log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RayError, OSError, ValueError) as error:
            raise ClusterError(
                f"no Ray cluster at {address!r}: {error}; expected a running head node on this machine; check the "
                "address, or use auto"
            ) from error
        opened.callback(ray.shutdown)
        _check_head()
        if not (dashboard := dashboard or context.dashboard_url):
            raise ClusterError(
                f"the Ray cluster at {address!r} has no dashboard, which takes the jobs; expected one; "
                "start its head with --include-dashboard=true"
            )
        _warn_if_open(dashboard)
        yield f"http://{dashboard}"


@contextmanager
def serving(
    build: Callable[[], App],
    *,
    name: str,
    host: str,
    port: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str]:
    """Serve the app that `build` makes on the head node, and yield its URL; Ray must be connected.

    `environment` is for the app's process.

    Raises:
        ClusterError: Serve runs on this cluster already, the port is taken, or the app does not start.
    """
    from ray import serve

    _check_idle(name)
    _check_free(host, port)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            controller_options={"runtime_env": {"env_vars": ENVIRONMENT}},
        )
        serve.run(_deployment(build, environment), name=name, route_prefix="/")
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    except (RayError, RuntimeError, TimeoutError) as error:
        raise ClusterError(
            f"Ray Serve could not run {name}: {str(error).strip().splitlines()[-1]}; expected it to start; "
            "look at the logs of Ray Serve on the head node"
        ) from error
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def _check_idle(name: str) -> None:
    """Refuse a cluster where Serve runs: its address cannot be changed, and its apps may be in use."""
    from ray import serve

    for noisy in ("ray.serve", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    running = serve.status()
    if running.applications or running.proxies:
        raise ClusterError(
            f"Ray Serve already runs {', '.join(sorted(running.applications)) or 'without an app'} on this cluster; "
            f"expected a cluster without Serve for {name}; stop the command that serves it or, where that was killed, "
            "run: serve shutdown -y --address http://127.0.0.1:8265 (its dashboard)"
        )


def _deployment(build: Callable[[], App], environment: Mapping[str, str]) -> Any:
    from ray import serve

    def built() -> App:  # Serve takes no other callable than a plain function
        stay_on_loopback()
        return build()

    options = {"num_cpus": 0, "resources": HEAD, "runtime_env": {"env_vars": {**ENVIRONMENT, **environment}}}
    deployment: Any = serve.deployment(
        serve.ingress(built)(),
        name="app",
        ray_actor_options=options,
        max_ongoing_requests=MOST_ONGOING,
        graceful_shutdown_timeout_s=CLOSING_S,
    )
    return deployment.bind()


def _warn_if_open(dashboard: str) -> None:
    """Log a warning if Ray asks for no token: the service's own token would protect nothing."""
    with suppress(OSError), urlopen(f"http://{dashboard}/api/version", timeout=ANSWER_S):
        log.warning(
            "the Ray cluster at %s asks for no token: whoever reaches its ports can run code on it; expected one; "
            "start it with RAY_AUTH_MODE=token, see docs/cluster.md",
            dashboard,
        )


def _check_head() -> None:
    """Refuse to serve from another node: the address to listen on, and the files, are the head node's."""
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    if not set(HEAD) <= set(nodes[here]["Resources"]):
        raise ClusterError("this machine is not the cluster's head node; expected to serve there; start it there")


def _check_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on: Serve would only tell its own log."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"cannot listen on {host}:{port}: {error}; expected an address of this machine and a free port; choose "
            "another with --host and --port"
        ) from error

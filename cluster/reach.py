"""Try whether anybody listens at an address, before something waits for minutes for an answer."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from cluster.base import ClusterError

REACH_S = 3.0
"""Seconds that an address may take to answer."""
PORTS = {"http": 80, "https": 443, "ray": 10001}


def answers(address: str) -> bool:
    """Whether somebody listens at `address`, a URL or HOST:PORT; True too where only its own driver could tell.

    A server behind a proxy is not tried, nor an address without a port that is known.
    """
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        host, port = place.hostname, place.port or PORTS.get(place.scheme)
    except ValueError:
        return False
    if host is None and place.scheme in PORTS:
        return False
    is_proxied = place.scheme in getproxies() and not (host and proxy_bypass(host))
    if host is None or port is None or is_proxied:
        return True
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except OSError:
        return False
    return True


def check_cluster(address: str) -> None:
    """Refuse the address of a Ray cluster that nobody answers; `auto` and `local` start one.

    Raises:
        ClusterError: nobody does.
    """
    if address in ("auto", "local"):
        return
    scheme, is_url, _ = address.partition("://")
    reason = None
    if is_url and scheme != "ray":
        reason = "it is neither HOST:PORT nor ray://HOST:PORT"
    elif not is_url and not re.search(r":[^:]", address):
        reason = "it has no port"
    elif not answers(address):
        reason = f"nobody answered within {REACH_S:g} s"
    if reason:
        raise ClusterError(
            f"no Ray cluster at {address!r}: {reason}; expected a running head node; check the address, or use auto"
        )

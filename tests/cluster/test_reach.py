"""Addresses that somebody answers, and those that nobody does."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from cluster import ClusterError
from cluster.reach import answers, check_cluster


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this machine that somebody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_who_listens_is_heard(port: int) -> None:
    for form in (
        "127.0.0.1:{}",
        "ray://127.0.0.1:{}",
        "http://ada:secret@localhost:{}/path",
        "postgresql://127.0.0.1:{}/x",
    ):
        assert answers(form.format(port))
    check_cluster(f"127.0.0.1:{port}")
    check_cluster(f"ray://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["http://{}:{}", "sqlite:///a.db", "anyscale://{}:{}", "postgresql://a:b@{}:{}/x"])
def test_what_ray_cannot_connect_to_is_refused_even_if_somebody_answers(port: int, address: str) -> None:
    with pytest.raises(ClusterError, match=r"no Ray cluster at .*: it is neither HOST:PORT nor ray://HOST:PORT; expec"):
        check_cluster(address.format("127.0.0.1", port))


def test_nobody_at_a_url_is_told() -> None:
    assert not any(map(answers, ("http://127.0.0.1:1", "http://", "http://[")))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "ray://", "ray://[", "a:b"])
def test_nobody_at_an_address_is_told_at_once(address: str) -> None:
    started = time.monotonic()
    assert not answers(address)
    with pytest.raises(ClusterError, match=r"no Ray cluster at .*: nobody answered within 3 s; expected .*; check the"):
        check_cluster(address)
    assert time.monotonic() - started < 7


@pytest.mark.parametrize("address", ["head", "10.0.0.1", "", "head:"])
def test_a_cluster_has_a_port(address: str) -> None:
    with pytest.raises(ClusterError, match=r"no Ray cluster at .*: it has no port; expected a running head node"):
        check_cluster(address)


@pytest.mark.parametrize("address", ["sqlite:///a.db", "paredown.studies", "databricks", "postgresql://db/studies"])
def test_what_only_a_driver_can_tell_is_not_refused(address: str) -> None:
    assert answers(address)


def test_a_cluster_of_our_own_needs_no_answer() -> None:
    check_cluster("auto")
    check_cluster("local")


def test_a_server_behind_a_proxy_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "localhost")
    assert answers("http://nowhere.invalid")
    assert not answers("http://localhost:1")

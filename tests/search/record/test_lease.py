"""Two drivers of one search: whoever comes second is refused, and takes the place of one that was killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.head import free_ports
from search.base import SearchError, TrackingError
from search.record import lease
from search.record.lease import TAG, locked
from search.record.store import PATIENCE, RETRIES, connect
from tests.support.mlflow_servers import mlflow_server


def test_one_driver_per_search_of_a_local_store() -> None:
    with (
        locked("sqlite:///paredown.db", "digits"),
        pytest.raises(SearchError, match="running already"),
        locked(f"sqlite:///{Path.cwd() / 'paredown.db'}", "digits"),
    ):
        pass
    with locked("sqlite:///paredown.db", "digits"), locked("sqlite:///paredown.db", "other"):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = free_ports(1)
    with mlflow_server(tmp_path_factory.mktemp("server"), port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make this process look like another machine's: its locks are no use, and it waits for less long."""
    monkeypatch.setattr(lease, "BEAT_S", 0.5)
    monkeypatch.setattr(lease, "SILENT_S", 4.0)


def driver(client: MlflowClient, name: str) -> str | None:
    found = client.get_experiment_by_name(name)
    assert found is not None
    word: str | None = found.tags.get(TAG)
    return word


@pytest.mark.usefixtures("elsewhere")
def test_one_driver_per_search_of_a_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(server, "digits"):
        monkeypatch.setenv("PAREDOWN_CACHE", str(tmp_path / "of another machine"))
        with pytest.raises(SearchError, match=r"'digits' is run by process \d+ on .*; expected one driver"):
            locked(server, "digits").__enter__()
        with locked(server, "other"):
            pass
        assert driver(MlflowClient(server), "digits")
    assert driver(MlflowClient(server), "digits") is None
    began = time.monotonic()
    with locked(server, "digits"):
        assert time.monotonic() - began < 4


@pytest.mark.usefixtures("elsewhere")
def test_the_place_of_a_driver_that_was_killed_is_free_after_a_while(server: str) -> None:
    client = MlflowClient(server)
    client.set_experiment_tag(client.create_experiment("left"), TAG, "process 7 on a node that is gone, 0123abcd")
    began = time.monotonic()
    with locked(server, "left"):
        assert time.monotonic() - began > 3


def test_a_server_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATIENCE, RETRIES, "0")
    monkeypatch.setenv(RETRIES, "0")
    with pytest.raises(TrackingError, match=r"cannot use the MLflow store http://127.0.0.1:1"):
        locked("http://127.0.0.1:1", "digits").__enter__()


def test_nothing_shows_the_password_of_a_server(server: str, capfd: pytest.CaptureFixture[str]) -> None:
    client = connect(server.replace("//", "//ada:S3cret@"))
    run = client.create_run(client.create_experiment("shown")).info.run_id
    client.set_terminated(run)
    assert client.get_run(run).info.status == "FINISHED"
    assert "S3cret" not in "".join(capfd.readouterr())

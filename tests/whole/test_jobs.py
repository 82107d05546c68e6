"""Searches as Ray jobs: on a real head with token authentication, by the commands a user has."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.head import own_head
from search.base import SearchError
from search.driver import loop
from search.record.progress import progress
from search.record.searches import find_search
from search.service import probe, submit
from search.service.probe import ProbeRequest
from search.spec import reading
from tests.support.searches import SPEC, inline, place, quiet
from tests.support.waiting import wait_until

TEXT = SPEC.replace("[itpruner, alds]", "[alds]").replace("trials: 3", "trials: 5").replace("steps: 5", "steps: 250")
WAIT_S = 240


@dataclass(frozen=True)
class Head:
    """A Ray head: the address of its dashboard, and the environment of those who may use it."""

    address: str
    environment: dict[str, str]

    def run(self, folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of ours in a folder, as one of the head's users."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "search.cli", *map(str, arguments)],
            cwd=folder,
            env=self.environment | {"RAY_API_SERVER_ADDRESS": self.address} | variables,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )

    def told(self, folder: Path, *arguments: object) -> Any:
        """Run a command that has to succeed; return the JSON it prints."""
        ended = self.run(folder, *arguments, "--json")
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def refused(self, folder: Path, *arguments: object, **variables: str) -> str:
        """The one paragraph that a command ends with, which has to find its input wrong."""
        ended = self.run(folder, *arguments, **variables)
        assert ended.returncode == 2, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return " ".join(ended.stderr.partition("paredown: ")[2].split())


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head that asks for a token."""
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PAREDOWN_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    with ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in own.items():
                patch.setenv(name, value)
            _, dashboard = opened.enter_context(own_head())
        yield Head(f"http://{dashboard}", os.environ | own)


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'paredown.db'}"


def trials(folder: Path) -> int:
    """Count the trials of the folder's search that have ended."""
    try:
        return progress(store(folder), "digits").trials
    except SearchError:
        return 0


def table(folder: Path) -> list[tuple[Any, ...]]:
    """Every trial with its plan, and how it ended."""
    record = find_search(store(folder), "digits")
    return [
        (one.budget, one.trial, one.method, one.knobs, one.state, one.top1_validation, one.stop,
         record.read.plan(one.run_id).choices if one.macs else None)
        for one in record.read.trials()
    ]  # fmt: skip


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_job_that_was_stopped_and_submitted_again_ends_as_an_undisturbed_search(
    teacher: Path, tmp_path: Path, head: Head
) -> None:
    here = place(tmp_path / "here", teacher, TEXT)
    for name in ("search.py", "methods.py"):  # a user's own, which are not to take the place of ours
        (here / name).write_text("raise SystemExit('this is not Paredown')\n")
    first = head.told(here, "submit", "spec.yaml")
    assert (first["id"], first["metadata"]["paredown.search"]) == ("digits-1", "digits")
    assert "as job digits-1; expected one job at a time of a name" in head.refused(here, "submit", "spec.yaml")
    wait_until(lambda: trials(here) >= 1)

    assert "To go on, submit its spec again" in head.run(here, "stop", "digits-1").stdout
    stopped = head.told(here, "status", "digits-1")
    assert (stopped["status"], stopped["progress"]["phase"]) == ("stopped", "stopped")
    assert 1 <= stopped["progress"]["trials"] < stopped["progress"]["expected"] == 5
    log = head.run(here, "logs", "digits-1").stdout
    assert f"To go on:  paredown submit spec.yaml --address {head.address}" in log
    record = find_search(store(here), "digits")
    assert record.client.get_run(record.search.run_id).info.status == "KILLED"
    assert not record.client.search_runs(["1"], "attributes.status = 'RUNNING'")

    again = head.told(here, "submit", "spec.yaml")
    assert (again["id"], again["metadata"]) == ("digits-2", first["metadata"])
    followed = head.run(here, "logs", "-f", "digits-2")
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "trials 0/5" not in followed.stdout  # what had ended did not run again
    assert "trials 5/5" in followed.stdout
    assert "digits: the best network for every budget" in followed.stdout
    ended = head.told(here, "status", "digits-2")
    assert (ended["status"], ended["exit_code"], ended["progress"]["phase"]) == ("succeeded", 0, "done")
    assert [(one["id"], one["status"]) for one in head.told(here, "list")] == [
        ("digits-1", "stopped"),
        ("digits-2", "succeeded"),
    ]

    calm = place(tmp_path / "calm", teacher, TEXT)
    os.chdir(calm)
    result = loop.search(reading.load(Path("spec.yaml")), inline, quiet)
    assert table(here) == table(calm)
    best = {name: best["top1_validation"] for name, best in ended["progress"]["best"].items()}
    assert best == {one.name: one.winner.top1_validation for one in result.budgets if one.winner is not None}


@pytest.mark.ray
@pytest.mark.live
@pytest.mark.timeout(900)
def test_what_cannot_work_is_refused_before_anything_is_submitted(teacher: Path, tmp_path: Path, head: Head) -> None:
    here = place(tmp_path / "here", teacher, SPEC.replace("name: digits", "name: refused"))
    away = head.refused(here, "submit", "spec.yaml", "--uri", "http://127.0.0.1:1")
    assert "on the cluster's head: cannot use the MLflow store http://127.0.0.1:1" in away
    (here / "spec.yaml").write_text(f"{SPEC}cluster: {{gpus_per_trial: 2}}\n")
    assert "a trial needs 1 CPU, 2 GPU of one node, but the nodes of" in head.refused(here, "submit", "spec.yaml")
    (here / "spec.yaml").write_text(SPEC.replace("batch_size: 64", "batch_size: 64, workers: 40"))
    assert "a trial needs 1 CPU of one node for each of its 40 workers, but" in head.refused(
        here, "submit", "spec.yaml"
    )
    (here / "spec.yaml").write_text(SPEC)
    with (here / "images.bin").open("wb") as file:
        file.truncate(600_000_000)
    large = head.refused(here, "submit", "spec.yaml")
    assert "has 600 MB, most of it in images.bin, teacher.safetensors" in large
    assert "did not take the token" in head.refused(here, "list", RAY_AUTH_TOKEN=64 * "0")
    assert "no job 'nobody'" in head.refused(here, "status", "nobody")
    assert "no job '../api'" in head.refused(here, "stop", "../api")
    nowhere = head.refused(here, "list", "--address", "http://127.0.0.1:1")
    assert "no Ray cluster at 'http://127.0.0.1:1'" in nowhere
    assert not [job for job in head.told(here, "list") if job["id"].startswith("refused")]


SUBMIT = """
import sys
from cluster import Jobs
address, id, entrypoint = sys.argv[1:]
jobs = Jobs(address)
jobs.submit(entrypoint, id=id, folder=None, modules=[])
print([job.id for job in jobs.all()])
"""


@pytest.mark.ray
@pytest.mark.live
@pytest.mark.timeout(900)
def test_who_follows_a_log_learns_how_the_job_ended_and_can_leave_before(tmp_path: Path, head: Head) -> None:
    for id, entrypoint in (("odd", "echo nothing fits; exit 3"), ("long", "echo at work; exec sleep 600")):
        command = [sys.executable, "-P", "-c", SUBMIT, head.address, id, entrypoint]
        listed = subprocess.run(command, env=head.environment, capture_output=True, text=True, check=True).stdout
        assert id in listed
    odd = head.run(tmp_path, "logs", "-f", "odd")
    assert odd.returncode == 3
    assert "nothing fits" in odd.stdout
    assert "WebSocket" not in odd.stderr

    follower = subprocess.Popen(
        [sys.executable, "-P", "-m", "search.cli", "logs", "-f", "long", "--address", head.address],
        env=head.environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert follower.stdout is not None
    assert any("at work" in line for line in follower.stdout)
    follower.send_signal(signal.SIGINT)
    _, told = follower.communicate(timeout=WAIT_S)
    assert (follower.returncode, told.strip()) == (0, "long goes on; paredown stop long ends it")
    assert head.told(tmp_path, "status", "long")["status"] == "running"
    assert head.told(tmp_path, "stop", "long")["status"] == "stopped"
    assert head.run(tmp_path, "logs", "-f", "long").returncode == 1


def test_relative_stores_are_this_folders_and_have_to_be_seen_from_the_head(tmp_path: Path) -> None:
    parsed = reading.parse(SPEC, folder=tmp_path)
    found = submit.absolute_stores(parsed)
    assert found == submit.Stores(store(tmp_path), str(tmp_path / "paredown.studies"), [tmp_path, tmp_path])
    servers = "https://mlflow.example", "postgresql://studies.example/optuna"
    assert submit.absolute_stores(reading.with_stores(parsed, *servers)) == submit.Stores(*servers, [])
    absolute = "sqlite:////data/paredown.db", "/data/paredown.studies"
    assert submit.absolute_stores(reading.with_stores(parsed, *absolute)) == submit.Stores(*absolute, [])

    with submit.marker_file(tmp_path) as mark:
        probe.check(ProbeRequest("digits", [mark], []), found.uri, found.studies)
    with pytest.raises(SearchError, match="head does not see the folder"):
        probe.check(ProbeRequest("digits", [mark], []), found.uri, found.studies)
    with pytest.raises(SearchError, match=r"'teacher.safetensors', which the spec names, is not on"):
        probe.check(ProbeRequest("digits", [], ["teacher.safetensors"]), found.uri, found.studies)


def test_a_store_whose_files_cannot_be_kept_is_told_before_anything_is_submitted(tmp_path: Path) -> None:
    uri, studies = store(tmp_path), str(tmp_path / "paredown.studies")
    (tmp_path / "paredown.artifacts").touch()  # where a folder is to be
    with pytest.raises(SearchError, match=r"cannot use the MLflow store sqlite:///.*paredown.db: "):
        probe.check(ProbeRequest("digits", [], []), uri, studies)
    (tmp_path / "paredown.artifacts").unlink()
    probe.check(ProbeRequest("digits", [], []), uri, studies)
    with pytest.raises(SearchError, match="no search 'digits'"):
        progress(uri, "digits")  # what was tried is no search


def test_passwords_are_the_heads_own() -> None:
    for uri, studies in (
        ("http://ada:lovelace@mlflow.example", "paredown.studies"),
        ("http://mlflow.example", "postgresql://ada:lovelace@studies.example/optuna"),
    ):
        with pytest.raises(SearchError, match=r"\*\*\*@.*MLFLOW_TRACKING_PASSWORD") as told:
            submit.check_secrets(uri, studies)
        assert "lovelace" not in str(told.value)
    submit.check_secrets("http://mlflow.example", "postgresql://ada@studies.example/optuna")


def test_this_machines_own_servers_are_no_use_to_a_head_elsewhere(tmp_path: Path) -> None:
    parsed = reading.parse(SPEC, folder=tmp_path)
    own = submit.absolute_stores(reading.with_stores(parsed, "http://127.0.0.1:5000", None))
    submit.check_loopback("http://127.0.0.1:8265", own)
    with pytest.raises(SearchError, match=r"tracking.uri is http://127.0.0.1:5000, which is this machine's own"):
        submit.check_loopback("http://203.0.113.7:8265", own)
    database = submit.absolute_stores(
        reading.with_stores(parsed, "https://mlflow.example", "mysql://ada@localhost/studies")
    )
    with pytest.raises(SearchError, match=r"tracking.studies is mysql://ada@localhost/studies"):
        submit.check_loopback("http://203.0.113.7:8265", database)

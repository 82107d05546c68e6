"""The service over a Ray that takes jobs: a search is submitted, watched and read, and nothing else is touched."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from cluster import ClusterError, Jobs
from cluster.serve import connected
from search.base import SpecError
from search.driver.winners import check_model
from search.record.registry import Registry
from search.record.store import connect
from search.service.admission import AdmissionRules
from search.service.metadata import NAME, URI
from search.service.watching import Backends
from search.spec.reading import with_stores
from tests.support.searches import SPEC, parsed, place
from tests.support.services import KEY, YAML, quick

SMALL = f"{SPEC}cluster: {{max_parallel: 1}}\n"

pytestmark = [pytest.mark.ray, pytest.mark.live, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray that takes jobs, which it does only a while after it has started."""
    with connected("auto") as url:
        deadline = time.monotonic() + 120
        while not _takes_jobs(url):
            assert time.monotonic() < deadline
        yield url


def _takes_jobs(url: str) -> bool:
    try:
        run(url, f"first-{time.monotonic_ns()}", "true")  # one that was taken may still be answered with an error
    except ClusterError:
        return False
    return True


def run(url: str, id: str, command: str, **metadata: str) -> None:
    """A job that is not the service's."""
    package = Path(os.environ["RAY_TMPDIR"], "empty")  # Ray takes no job without a package
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    Jobs(url).submit(command, id=id, folder=None, modules=[package], metadata=metadata)


@dataclass(frozen=True)
class Done:
    """A search that was submitted and watched to its end: its id and every event."""

    where: Backends
    rules: AdmissionRules
    id: str
    events: list[tuple[str, dict]]


@pytest.fixture(scope="module")
def done(head: str, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("live")
    where = Backends(head, f"sqlite:///{folder}/paredown.db", f"{folder}/paredown.studies")
    rules = AdmissionRules(root=place(folder / "root", teacher))
    with TestClient(quick(where, rules=rules), headers=KEY) as client:
        answer = client.post("/searches", content=SMALL, headers=YAML)
        assert answer.status_code == 202, answer.text
        assert answer.json() == {"id": "digits-1", "name": "digits"}
        assert client.post("/searches", content=SMALL, headers=YAML).status_code == 409
        assert [one["id"] for one in client.get("/searches").json()["searches"]] == ["digits-1"]
        return Done(where, rules, "digits-1", told(client, "/searches/digits-1/events"))


def told(client: TestClient, path: str) -> list[tuple[str, dict]]:
    """All events of a stream, to its end."""
    events = []
    with client.stream("GET", path) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                events.append((value, {}))
            elif kind == "data":
                events[-1] = (events[-1][0], json.loads(value))
    return events


def test_a_search_is_submitted_watched_and_read(done: Done) -> None:
    kind, end = done.events[-1]
    assert (kind, end["phase"], end["trials"], end["expected"]) == ("end", "done", 3, 3), end
    points = [point for kind, value in done.events if kind == "points" for point in value["points"]]
    assert len({point["run_id"] for point in points}) == len(points)
    with TestClient(quick(done.where), headers=KEY) as client:
        frontier = client.get(f"/searches/{done.id}/frontier").json()
        winner = frontier["budgets"][0]["winner"]
        assert {point["run_id"] for point in points} >= {winner["run_id"]}
        assert end["best"]["half"]["run_id"] == winner["run_id"]
        assert winner["model_uri"] == "models:/digits@half"
        report = client.get(f"/searches/{done.id}/report")
        assert "<h1>digits</h1>" in report.text
        assert "sandbox" in report.headers["content-security-policy"]
        plain = client.get(f"/searches/{done.id}/report", headers={"accept-encoding": "identity"})
        assert tuple(one.headers.get("content-encoding") for one in (report, plain)) == ("gzip", None)
        assert plain.text == report.text
        assert client.get(f"/searches/{done.id}").json() == end
        assert client.delete(f"/searches/{done.id}").json() == end
        assert told(client, f"/searches/{done.id}/events")[-1] == ("end", end)


def test_what_a_store_holds_is_there_when_ray_has_forgotten_its_jobs(done: Done, tmp_path: Path) -> None:
    copy = tmp_path / "paredown.db"
    with sqlite3.connect(done.where.uri.removeprefix("sqlite:///")) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    source.close()
    target.close()
    end = done.events[-1][1]
    with TestClient(quick(replace(done.where, uri=f"sqlite:///{copy}")), headers=KEY) as client:
        (one,) = client.get("/searches").json()["searches"]
        assert (one["id"], one["name"], one["phase"]) == ("digits-0", "digits", "done")
        found = client.get("/searches/digits-0").json()
        assert {key: found[key] for key in ("trials", "expected", "best")} == {
            key: end[key] for key in ("trials", "expected", "best")
        }
        assert client.get("/searches/digits-0/frontier").json()["budgets"][0]["winner"]["alias"] == "half"
        assert [kind for kind, _ in told(client, "/searches/digits-0/events")] == ["progress", "points", "end"]
        assert client.delete("/searches/digits-0").json()["phase"] == "done"


def test_the_model_of_another_is_refused(done: Done) -> None:
    client = connect(done.where.uri)
    client.create_registered_model("production-model")
    Registry(client, "digits").check_made_by("digits")
    with TestClient(quick(done.where, rules=done.rules), headers=KEY) as service:
        spec = SPEC.replace("name: digits", "name: production-model", 1)
        answer = service.post("/searches", content=spec, headers=YAML)
        assert answer.status_code == 409
        assert "'production-model', made by hand" in answer.json()["error"]
    assert done.rules.root is not None
    with pytest.raises(SpecError, match="rename the search"):
        check_model(with_stores(parsed(done.rules.root, spec), done.where.uri, None))
    shared = f"{spec}\ntracking: {{uri: '{done.where.uri}', registered_model: production-model}}"
    check_model(parsed(done.rules.root, shared))  # as only the operator can say


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_it_does_what_its_description_says(done: Done, mode: GenerationMode) -> None:
    """It takes no spec at all, so that none is run by chance; what a schema can say of a spec is not all anyway."""
    app = quick(done.where, rules=AdmissionRules(allowed=()))
    described = schemathesis.openapi.from_asgi("/openapi.json", app, headers=KEY)
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) == 7

    for operation in operations:
        known = {"id": done.id} if "{id}" in operation.path else None

        @settings(max_examples=10, deadline=None)
        @given(case=operation.as_strategy(generation_mode=mode) | operation.as_strategy(path_parameters=known))
        def holds(case: schemathesis.Case) -> None:
            beside = [positive_data_acceptance] if case.method == "POST" else []
            case.call_and_validate(headers=KEY, excluded_checks=beside)

        holds()


def test_what_else_runs_on_the_cluster_is_not_touched(head: str, done: Done, tmp_path: Path) -> None:
    where = Backends(head, f"sqlite:///{tmp_path}/paredown.db", f"{tmp_path}/paredown.studies")
    run(head, "other-1", "sleep 600")
    run(head, "x-1", "sleep 600", **{NAME: "x", URI: "sqlite:///elsewhere.db"})
    with TestClient(quick(where), headers=KEY) as client:
        for id in ("other-1", "x-1", "digits-99", "digits-0", "%2e%2e", "x-1%00"):
            for method, path in (
                ("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/frontier"), ("GET", "/report"),
            ):  # fmt: skip
                answer = client.request(method, f"/searches/{id}{path}")
                assert answer.status_code == 404, (id, path)
                assert "GET /searches" in answer.json()["error"]
        assert client.get("/searches").json() == {"searches": []}
    jobs = Jobs(head)
    assert not [job.message for job in map(jobs.get, ("other-1", "x-1")) if job.is_over]
    elsewhere = quick(replace(where, uri="sqlite:///elsewhere.db"), rules=done.rules, searches=1)
    with TestClient(elsewhere, headers=KEY) as client:
        assert client.post("/searches", content=SPEC, headers=YAML).status_code == 429
    for id in ("other-1", "x-1"):
        jobs.stop(id)


def test_a_store_that_cannot_be_read_is_told(head: str, tmp_path: Path) -> None:
    (tmp_path / "paredown.db").write_text("no database")
    where = Backends(head, f"sqlite:///{tmp_path}/paredown.db", "paredown.studies")
    run(head, "lost-1", "true", **{NAME: "lost", URI: where.uri})
    with TestClient(quick(where), headers=KEY) as client:
        for path in ("", "/frontier", "/report"):
            answer = client.get(f"/searches/lost-1{path}")
            assert answer.status_code == 503
            assert "cannot use the MLflow store" in answer.json()["error"]


def test_a_killed_command_leaves_no_ray_behind() -> None:
    opened = "from cluster.head import own_head\nwith own_head() as (_, url):\n  print(url, flush=True)\n  input()"
    command = subprocess.Popen([sys.executable, "-c", opened], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    port = int(command.stdout.readline().rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=120) as dashboard:
        command.kill()
        command.communicate(timeout=30)
        assert dashboard.recv(1) == b""  # it is closed when Ray ends
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)

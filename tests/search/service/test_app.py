"""The service refuses every bad request with a reason, keeps serving, and never runs code that it was not allowed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

import cluster.jobs
from cluster import ClusterError
from search.base import SearchError
from search.cli.serve import TOKEN_VARIABLE, _end_on_signals, _page_links, read_token, serve
from search.service import guard
from search.service.admission import AdmissionRules
from search.service.app import Settings, app
from search.service.guard import LARGEST_BYTES, MOST_CLIENTS, Access, Buckets
from search.service.watching import Backends, Looks, Snapshot
from tests.support.services import KEY, TOKEN, YAML, quick

JSON = {"Content-Type": "application/json"}
NOWHERE = "http://127.0.0.1:9"
"""An address without a Ray: a refusal by the guard must not need one."""

FREE = """
name: digits
model: {source: zoo, name: resnet8}
data: {source: digits, validation: 0.2, calibration: 128}
methods: [itpruner, alds]
budgets: [{name: half, macs: 50%}]
search: {trials: 3, explore: 1}
recovery: {steps: 5, batch_size: 64}
"""
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


def spec_of(**changes: str) -> str:
    """A spec that names no file, with other text at some of its keys."""
    lines = FREE.strip().splitlines()
    known = {line.partition(":")[0] for line in lines}
    changed = [f"{key}: {changes[key]}" if (key := line.partition(":")[0]) in changes else line for line in lines]
    return "\n".join([*changed, *(f"{key}: {value}" for key, value in changes.items() if key not in known)])


def pieces(total: int) -> Iterator[bytes]:
    """A body of unknown length."""
    for _ in range(total // 2**16):
        yield b"#" * 2**16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that specs may name files of, with ways out of it."""
    folder = tmp_path_factory.mktemp("service") / "root"
    folder.mkdir()
    (folder.parent / "secret.safetensors").touch()
    (folder / "way-out.safetensors").symlink_to(folder.parent / "secret.safetensors")
    (folder / "pickle.pt").touch()
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    """A client of a service that can reach no Ray."""
    where = Backends(NOWHERE, f"sqlite:///{root.parent}/paredown.db", "paredown.studies")
    with TestClient(quick(where, rules=AdmissionRules(root=root))) as made:
        yield made


BAD: dict[str, tuple[int, str | bytes, dict[str, str]]] = {
    "no token": (401, FREE, {"Authorization": ""}),
    "another token": (401, FREE, {"Authorization": f"Bearer {TOKEN}s"}),
    "another scheme": (401, FREE, {"Authorization": f"Basic {TOKEN}"}),
    "50 MB": (413, b"#" * 50_000_000, {}),
    "a length that is none": (400, FREE, {"Content-Length": "many"}),
    "plain text": (415, FREE, {"Content-Type": "text/plain"}),
    "a form": (415, FREE, {"Content-Type": "application/x-www-form-urlencoded"}),
    "no content type": (415, FREE, {"Content-Type": ""}),
    "nothing": (422, "", {}),
    "no UTF-8": (400, b"name: \xff", {}),
    "a null character": (400, "name: \0", {}),
    "malformed YAML": (400, "name: [digits", {}),
    "two documents": (400, f"{FREE}\n---\n{FREE}", {}),
    "a bomb of aliases": (400, BOMB, {}),
    "an alias of itself": (400, "name: &a [*a]", {}),
    "a Python object": (400, "name: !!python/object/apply:os.system [id]", {}),
    "deep YAML": (400, "[" * 50_000, {}),
    "deep JSON": (400, "[" * 50_000, JSON),
    "many small values": (400, "- a\n" * 50_000, {}),
    "one long value": (400, f"name: 1{':1' * 50_000}", {}),
    "a date that is none": (400, "name: 2026-13-41", {}),
    "malformed JSON": (400, '{"name": "digits"', JSON),
    "not a number": (400, '{"name": NaN}', JSON),
    "a number of 5000 digits": (400, '{"name": ' + "9" * 5000 + "}", JSON),
    "half a character": (422, '{"name": "\\ud800"}', JSON),
    "a key twice": (422, f"{FREE}\nname: other", {}),
    "a key twice in JSON": (400, '{"name": "a", "name": "b"}', JSON),
    "keys that are no text": (422, "{1: 2, null: 3, 2026-01-02: 4}", {}),
    "a list": (422, "- digits", {}),
    "an unknown key": (422, spec_of(modle="x"), {}),
    "an unknown method": (422, spec_of(methods="[alsd]"), {}),
    "an unknown limit": (422, spec_of(budgets="[{name: half, flops: 50%}]"), {}),
    "a budget without a limit": (422, spec_of(budgets="[{name: half}]"), {}),
    "a name with a path": (422, spec_of(name="../digits"), {}),
    "a name too long for a file": (422, spec_of(name="d" * 101), {}),
    "a model factory": (403, spec_of(model="{source: factory, name: 'os:system', args: {command: id}}"), {}),
    "a factory in a file": (403, spec_of(model="{source: factory, name: './model.py:make'}"), {}),
    "a data factory": (403, spec_of(data="{source: factory, name: 'os:getcwd'}"), {}),
    "a factory of recovery data": (
        403, spec_of(recovery="{labels: false, data: {source: factory, name: 'os:getcwd'}}"), {},
    ),
    "a metric": (403, spec_of(metric="os:system"), {}),
    "a source as a metric": (422, spec_of(metric="zoo"), {}),
    "a logged model": (403, spec_of(model="{source: mlflow, name: 'models:/x/1'}"), {}),
    "weights above the root": (403, spec_of(model="{source: zoo, name: resnet8, weights: ../secret.safetensors}"), {}),
    "weights of the system": (403, spec_of(model="{source: zoo, name: resnet8, weights: /etc/passwd}"), {}),
    "weights by a link": (403, spec_of(model="{source: zoo, name: resnet8, weights: way-out.safetensors}"), {}),
    "weights in a pickle": (403, spec_of(model="{source: torchvision, name: resnet18, weights: pickle.pt}"), {}),
    "weights that are not there": (403, spec_of(model="{source: zoo, name: resnet8, weights: none.safetensors}"), {}),
    "weights of no path": (422, spec_of(model='{source: zoo, name: resnet8, weights: "a\\0b"}'), {}),
    "images elsewhere": (403, spec_of(data="{source: imagefolder, root: ../..}"), {}),
    "a home": (403, spec_of(data="{source: imagefolder, root: ~/}"), {}),
    "a roofline elsewhere": (403, spec_of(devices="{rock: {runtime: profile, file: /proc/self/environ}}"), {}),
    "another store": (403, spec_of(tracking="{uri: 'http://elsewhere:5000'}"), {}),
    "another's registered model": (403, spec_of(tracking="{registered_model: production}"), {}),
    "very many workers": (403, spec_of(cluster="{max_parallel: 100000}"), {}),
    "very many steps": (403, spec_of(recovery="{steps: 10000000}"), {}),
    "very large batches": (403, spec_of(recovery="{batch_size: 65536}"), {}),
    "many workers of one trial": (403, spec_of(recovery="{workers: 100}"), {}),
    "a trial of 10^15 steps": (422, spec_of(recovery="{steps: 1000000000000000}"), {}),
    "workers of 90 digits": (422, spec_of(recovery="{workers: " + "9" * 90 + "}"), {}),
    "workers of 900 digits": (400, spec_of(recovery="{workers: " + "9" * 900 + "}"), {}),
    "MACs of 90 digits": (422, spec_of(budgets="[{name: half, macs: " + "9" * 90 + "}]"), {}),
    "very many threads": (403, spec_of(devices="{edge: {threads: 1000}}"), {}),
    "a resource of Ray's": (422, spec_of(devices="{edge: {resources: {'node:10.0.0.5': 1}}}"), {}),
    "very many classes": (
        403, spec_of(model="{source: torchvision, name: resnet18, args: {num_classes: 1000000}}"), {},
    ),
    "very many budgets": (
        403, spec_of(budgets="[" + ", ".join(f"{{name: b{n}, macs: 50%}}" for n in range(21)) + "]"), {},
    ),
    "a key with an escape": (422, FREE + '\n"mo\\e[31mdel": 1', {}),
    "another cluster": (403, spec_of(cluster="{address: 'ray://elsewhere:10001'}"), {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_must_not_be_submitted_is_refused_with_a_reason(client: TestClient, kind: str) -> None:
    status, body, headers = BAD[kind]
    answer = client.post("/searches", content=body, headers=KEY | YAML | headers)
    assert answer.status_code == status, answer.text
    told = answer.json()["error"]
    assert len(told) > 30
    assert "Traceback" not in told
    assert told.replace("\n", "").isprintable()
    assert client.get("/openapi.json").status_code == 200


def test_a_body_without_a_length_is_counted_as_it_comes(client: TestClient) -> None:
    answer = client.post("/searches", content=pieces(50_000_000), headers=KEY | YAML)
    assert answer.status_code == 413
    assert f"{LARGEST_BYTES:,}" in answer.json()["error"]


@pytest.mark.parametrize(("method", "path", "status"), [
    ("PUT", "/searches", 405), ("PATCH", "/searches/digits-1", 405), ("DELETE", "/searches", 405),
    ("GET", "/nowhere", 404), ("GET", "/searches/", 404), ("GET", "/searches/..%2f..%2fetc", 404),
])  # fmt: skip
def test_an_unknown_operation_is_told_where_to_look(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path, headers=KEY)
    assert answer.status_code == status
    assert "/docs" in answer.json()["error"]


def test_two_tokens_are_none(client: TestClient) -> None:
    headers = [("Authorization", KEY["Authorization"]), ("Authorization", KEY["Authorization"])]
    assert client.get("/searches", headers=headers).status_code == 401


def test_a_spec_that_is_allowed_comes_as_far_as_the_cluster(client: TestClient) -> None:
    answer = client.post("/searches", content=FREE, headers=KEY | YAML)
    assert answer.status_code == 503
    assert NOWHERE in answer.json()["error"]


def test_a_cluster_that_is_away_is_told_and_asked_again(client: TestClient) -> None:
    for path in ("/searches", "/searches/digits-1", "/searches/digits-1/events"):
        assert client.get(path, headers=KEY).status_code == 503


def test_all_who_watch_a_search_share_one_look() -> None:
    looks = Looks(Backends(NOWHERE, "sqlite:///paredown.db", "paredown.studies"))

    async def watched() -> list[Snapshot | BaseException]:
        return await asyncio.gather(*(looks.snapshot("digits-1") for _ in range(8)), return_exceptions=True)

    told = asyncio.run(watched())
    assert isinstance(told[0], ClusterError)
    assert {id(one) for one in told} == {id(told[0])}


def test_a_look_is_taken_once_for_many_readers_and_anew_after_a_change() -> None:
    looks, taken = Looks(Backends(NOWHERE, "sqlite:///paredown.db", "paredown.studies")), []

    def look() -> int:
        taken.append(1)
        return len(taken)

    async def read() -> list[int]:
        found = await asyncio.gather(*(looks.shared(("a",), look) for _ in range(200)))
        looks.forget()
        return [*found, await looks.shared(("a",), look), await looks.shared(("b",), look)]

    assert asyncio.run(read()) == [1] * 200 + [2, 3]


def test_without_a_token_only_this_machine_is_answered(root: Path) -> None:
    service = app(Settings(Backends(NOWHERE, "sqlite:///paredown.db", "paredown.studies")))
    with TestClient(service, base_url="http://localhost:8700") as client:
        assert client.get("/").status_code == 200
        assert client.get("/", headers={"Host": "[::1]:8700"}).status_code == 200
        for host in ("rebound.example.org", "localhost.example.org:8700", "[::2]"):
            answer = client.get("/searches", headers={"Host": host})
            assert answer.status_code == 421, host
            assert "localhost" in answer.json()["error"]
        for origin in ("http://example.org", "http://localhost:8701", "null"):
            answer = client.delete("/searches/digits-1", headers={"Origin": origin})
            assert answer.status_code == 403, origin
        assert client.delete("/searches/digits-1", headers={"Origin": "http://localhost:8700"}).status_code == 503


@pytest.mark.parametrize("host", [
    "", "[", "evil@localhost", "localhost@example.org", "localhost/", "localhost:", "localhost:port", "local host",
    "localhost,example.org", "\\localhost", "localhost#",
])  # fmt: skip
def test_a_host_that_is_none_is_refused_with_and_without_a_token(client: TestClient, host: str) -> None:
    service = app(Settings(Backends(NOWHERE, "sqlite:///paredown.db", "paredown.studies")))
    for answering in (client, TestClient(service, base_url="http://localhost:8700")):
        answer = answering.get("/openapi.json", headers=KEY | {"Host": host})
        assert answer.status_code == 400
        assert "Host" in answer.json()["error"]


def test_a_request_for_no_host_or_for_two_is_refused() -> None:
    service = app(Settings(Backends(NOWHERE, "sqlite:///paredown.db", "paredown.studies")))
    for hosts in ([], [(b"host", b"localhost"), (b"host", b"localhost")]):
        sent: list[Message] = []

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": hosts, "client": None}
        asyncio.run(service(scope, lambda: asyncio.sleep(0, {"type": "http.request"}), send))
        assert sent[0]["status"] == 400


def test_who_calls_too_often_waits_and_others_do_not() -> None:
    now = 0.0
    buckets = Buckets(rate=2.0, burst=4.0, clock=lambda: now)
    assert [buckets.take("ada", 1.0) for _ in range(4)] == [0.0] * 4
    assert buckets.take("ada", 1.0) == 0.5
    assert buckets.take("grace", 4.0) == 0.0
    now = 0.5
    assert buckets.take("ada", 1.0) == 0.0
    for number in range(2 * MOST_CLIENTS):
        buckets.take(f"client {number}", 1.0)
    assert len(buckets) == MOST_CLIENTS


def test_calls_that_change_something_run_out_first() -> None:
    service = app(
        Settings(Backends(NOWHERE, "sqlite:///paredown.db", "paredown.studies"), access=Access(None, 1e-9, 25.0))
    )
    with TestClient(service, base_url="http://localhost") as client:
        assert [client.delete("/searches/x").status_code for _ in range(3)] == [503, 503, 429]
        answer = client.delete("/searches/x")
        assert int(answer.headers["retry-after"]) > 0
        assert [client.get("/docs").status_code for _ in range(6)] == [200] * 5 + [429]


def test_every_answer_keeps_a_browser_in_check(client: TestClient) -> None:
    for path in ("/", "/docs", "/style.css", "/page.js", "/nowhere", "/searches"):
        headers = client.get(path, headers=KEY).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert not [name for name in headers if name.startswith("access-control")]


def test_the_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in guard.OPEN_PATHS:
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert "https://" not in answer.text.replace("https://github.com/ray-project", "")
        assert TOKEN not in answer.text
    page, docs = client.get("/").text, client.get("/docs").text
    assert "style=" not in page + docs
    for path in ("/searches/{id}/events", "/searches/{id}/frontier", "SearchSpec", "BudgetSpec"):
        assert path in docs


def test_a_web_socket_is_refused(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect) as told, client.websocket_connect("/searches", headers=KEY):
        pass
    assert told.value.code == 1008


def test_a_cluster_that_never_answers_is_away_and_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.jobs, "ANSWER_S", 3)
    silent = socket.create_server(("127.0.0.1", 0))
    where = Backends(f"http://127.0.0.1:{silent.getsockname()[1]}", "sqlite:///paredown.db", "paredown.studies")
    with TestClient(quick(where), headers=KEY) as client:
        statuses: list[int] = []
        waiting = threading.Thread(target=lambda: statuses.append(client.get("/searches").status_code))
        waiting.start()
        lines = [silent.accept()[0] for _ in range(2)]  # of the check that somebody listens, and of Ray's client
        assert client.get("/docs").status_code == 200
        assert not statuses
        waiting.join(60)
        assert statuses == [503]
    for line in (*lines, silent):
        line.close()


def test_others_are_not_served_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "workstation"):
        with pytest.raises(SearchError, match="there is no token"):
            serve(host=host)
    with pytest.raises(SearchError, match="--allow"):
        serve(allow=["./model.py:make"])
    with pytest.raises(SearchError, match="--root"):
        serve(root=Path("nowhere"))
    with pytest.raises(SearchError, match="password"):
        serve(studies="postgresql://ada:lovelace@db/studies")


def test_links_lead_where_the_reader_is() -> None:
    here, there = "http://127.0.0.1:5000", "http://mlflow:5000"
    assert _page_links("sqlite:///paredown.db", here, "127.0.0.1") == {"Ray": here}
    assert _page_links(there, here, "localhost") == {"MLflow": there, "Ray": here}
    assert _page_links(there, here, "0.0.0.0") == {"MLflow": there}


def test_a_closed_terminal_ends_it_unless_nohup_says_no() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        _end_on_signals()
        for number in (signal.SIGTERM, signal.SIGHUP):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _end_on_signals()
        signal.raise_signal(signal.SIGHUP)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


def test_the_token_stays_with_who_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    file = tmp_path / "token"
    made = read_token(file)
    assert made is not None
    assert len(made) > 40
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_token(file) == made
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_token(file) == TOKEN.encode()
    assert TOKEN_VARIABLE not in os.environ  # or every job would have it
    file.chmod(0o640)
    with pytest.raises(SearchError, match="0640"):
        read_token(file)
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(SearchError, match="5 characters") as told:
        read_token(None)
    assert "short" not in str(told.value)

"""The page in a real browser, over the service on Ray Serve: submit, watch points appear, read the winners, stop."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray
import uvicorn

from cluster import ClusterError
from cluster.head import free_ports
from cluster.serve import connected, serving
from search.driver.loop import search
from search.service.admission import AdmissionRules
from search.service.app import Settings, app
from search.service.guard import Access, digest_of
from search.service.watching import Backends
from search.spec.reading import with_stores
from tests.support.searches import SPEC, inline, parsed, place, quiet
from tests.support.sockets import beyond_loopback
from tests.whole.browser import CHROMIUM, DRIVER, Browser, browsing

LONG = SPEC.replace("name: digits", "name: long").replace("trials: 3", "trials: 500") + "cluster: {max_parallel: 1}\n"
LONG_S = 240
"""Seconds that a machine shared with other jobs may take for what takes one second on an idle one."""

pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on PATH"),
    # Ray Serve's own use of pydantic.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Browser]:
    with browsing(tmp_path / "profile", *free_ports(1)) as made:
        yield made


@pytest.fixture
def url(tmp_path: Path, teacher: Path) -> Iterator[str]:
    """A service on Ray Serve, for this machine alone, whose store holds a search that was run without it."""
    root = place(tmp_path / "root", teacher)
    uri, studies = f"sqlite:///{tmp_path}/paredown.db", f"{tmp_path}/paredown.studies"
    search(with_stores(parsed(root), uri, studies), inline, quiet)
    with connected("auto") as head:
        build = partial(app, Settings(Backends(head, uri, studies), AdmissionRules(root=root), links={"Ray": head}))
        with serving(build, name="paredown", host="127.0.0.1", port=free_ports(1)[0]) as found:
            yield found


def fill(page: Browser, spec: str) -> None:
    """Submits a spec with the form."""
    page.ask(f"document.getElementById('spec').value = {spec!r}")
    page.ask("document.getElementById('submit').click()")


POINTS = "document.querySelectorAll('#chart .point').length"
PHASE = "document.getElementById('phase').textContent"


@pytest.mark.live
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_search_is_read_and_another_submitted_watched_and_stopped_on_the_page(page: Browser, url: str) -> None:
    assert beyond_loopback() == []
    page.go(url)
    page.wait("document.querySelector('#searches a')", LONG_S)
    page.ask("document.querySelector('#searches a').click()")
    page.wait(f"{PHASE} === 'done' && {POINTS} > 0", LONG_S)
    snippet = page.wait("document.getElementById('snippet').textContent", LONG_S)
    assert 'mlflow.pytorch.load_model("models:/digits@half")' in snippet
    assert page.ask("document.getElementById('trials').textContent") == "3 of 3"

    fill(page, LONG.replace("itpruner", "itprunner"))
    page.wait("document.getElementById('mistakes').textContent.includes(\"did you mean 'itpruner'\")", LONG_S)
    fill(page, LONG)
    page.wait(f"document.getElementById('name').textContent === 'long' && {POINTS} > 1", LONG_S)
    assert page.ask(PHASE) == "trials"
    page.ask("document.getElementById('stop').click()")
    page.wait(f"{PHASE} === 'stopped'", LONG_S)
    found = page.ask(POINTS)

    page.go(f"{url}/docs")
    page.go(f"{url}/#long-1")
    page.wait(f"{PHASE} === 'stopped' && {POINTS} >= {found}", LONG_S)
    page.resize(390, 844)
    assert page.ask("document.scrollingElement.scrollWidth <= innerWidth")
    page.go(f"{url}/searches/digits-0/report")
    page.wait("document.querySelectorAll('.js-plotly-plot .point').length > 0", LONG_S)
    wrong = [line for line in page.complaints() if " 422 " not in line]
    assert not wrong

    _listens_here_alone(url)
    _refuses_a_body_without_end(url)
    with pytest.raises(ClusterError, match="already runs paredown"), serving(dict, name="x", host="", port=1):
        pass
    with urlopen(url) as answer:
        assert answer.status == 200  # it was not shut down


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _listens_here_alone(url: str) -> None:
    """Without a token the service must not be heard of elsewhere: Serve is told where to listen, and obeys."""
    address = ray.util.get_node_ip_address()
    if not address.startswith("127."):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, _port(url)), timeout=10)


def _refuses_a_body_without_end(url: str) -> None:
    """Through Serve a body comes in pieces, and is cut off all the same."""
    with socket.create_connection(("127.0.0.1", _port(url)), timeout=60) as line:
        head = ("POST /searches HTTP/1.1", "Host: localhost", "Content-Type: text/yaml", "Transfer-Encoding: chunked")
        line.sendall("\r\n".join([*head, "", ""]).encode())
        piece = b"10000\r\n" + b"#" * 2**16 + b"\r\n"
        for _ in range(8):
            line.sendall(piece)
        assert b" 413 " in line.recv(4096)


def test_the_page_asks_for_the_token(page: Browser, tmp_path: Path) -> None:
    where = Backends("http://127.0.0.1:9", f"sqlite:///{tmp_path}/paredown.db", "paredown.studies")
    service = app(Settings(where, access=Access(digest_of(b"a token of some length"))))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        page.go(f"http://127.0.0.1:{listening.getsockname()[1]}")
        for token, told in (("a wrong token", "the token is another"), ("a token of some length", "no Ray cluster")):
            page.wait("!document.getElementById('door').hidden", LONG_S)
            page.ask(f"document.getElementById('token').value = {token!r}")
            page.ask("document.querySelector('#door button').click()")
            page.wait(f"document.getElementById('trouble').textContent.includes({told!r})", LONG_S)
        assert page.ask("document.getElementById('door').hidden")
        assert page.ask("document.cookie") == ""
    finally:
        server.should_exit = True
        thread.join(30)

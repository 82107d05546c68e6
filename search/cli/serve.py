"""`paredown serve`: the HTTP service and its page, on Ray Serve."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import stat
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from search.base import DEFAULT_STORE, DEFAULT_STUDIES, SearchError
from search.cli.options import Store
from search.service.metadata import STUDIES_VARIABLE

if TYPE_CHECKING:
    from search.service.app import Settings
    from search.service.guard import Access
    from search.service.watching import Backends

LEAST_TOKEN = 16
TOKEN_VARIABLE = "PAREDOWN_TOKEN"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Added to the service's process, so that a caller learns in seconds, not minutes, that the MLflow server is away."""


Head = Annotated[
    str, typer.Option(help="The Ray cluster whose head this machine is, such as 127.0.0.1:6379; auto starts one.")
]
Host = Annotated[str, typer.Option(help="What to listen on; anything but this machine alone needs a token.")]
Port = Annotated[int, typer.Option(min=1, max=65535)]
Studies = Annotated[str, typer.Option(help="Optuna's journal file or database.", envvar=STUDIES_VARIABLE)]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="zoo, torchvision, or a factory pkg.mod:fn, which specs may name; the first two unless given."),
]
Root = Annotated[Path | None, typer.Option(help="The folder whose files specs may name; without it, none.")]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"The token's file, made where there is none; ${TOKEN_VARIABLE} goes before it.")
]
Searches = Annotated[
    int, typer.Option(min=1, help="How many may run at once; each takes about 1 GB of this machine's memory.")
]


def add(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(serve)


def serve(
    address: Head = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8700,
    uri: Store = DEFAULT_STORE,
    studies: Studies = DEFAULT_STUDIES,
    allow: Allow = None,
    root: Root = None,
    token_file: TokenFile = None,
    searches: Searches = 4,
) -> None:
    """Serve searches over HTTP, with a page: submit, watch, stop. Runs on the head node of the cluster."""
    if address == "auto":
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads this once, when it is imported
    from cluster.reach import check_cluster

    check_cluster(address)
    from search.service.admission import SOURCES, AdmissionRules
    from search.service.app import Settings
    from search.service.watching import Backends

    access = _access(token_file, host)
    rules = AdmissionRules(tuple(allow or SOURCES), None if root is None else root.resolve())
    backends = Backends("", _absolute_store(uri), _absolute_store(studies))
    _check_stores(backends)
    _serve_until_signal(Settings(backends, rules, access, searches=searches), address, host, port)


def _serve_until_signal(settings: Settings, address: str, host: str, port: int) -> None:
    """Serve until Ctrl-C or a signal, with the job address and the links of this Ray in the settings."""
    from cluster.serve import connected, serving
    from search.service import app

    logging.getLogger("search").setLevel(logging.INFO)
    _end_on_signals()
    with suppress(KeyboardInterrupt), connected(address) as dashboard:
        backends = replace(settings.backends, jobs=dashboard)
        build = partial(app.app, replace(settings, backends=backends, links=_page_links(backends.uri, dashboard, host)))
        with serving(build, name="paredown", host=host, port=port, environment=ENVIRONMENT) as url:
            _end_on_signals()  # Ray has taken SIGTERM
            needs = "behind its token" if settings.access.digest else "for this machine alone"
            typer.echo(f"Paredown is at {url}, {needs}; it records in {backends.uri}. Ctrl-C ends it.")
            known = f"RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS={dashboard}"
            typer.echo(f"In another terminal: export {known}, then paredown list, paredown logs ID")
            signal.pause()


def _end_on_signals() -> None:
    """Make SIGTERM and a closed terminal end the command as Ctrl-C does, with all that it started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, signal.default_int_handler)


def _access(token_file: Path | None, host: str) -> Access:
    """Return the access to the service: by the token if there is one, else for this machine alone.

    Raises:
        SearchError: others can reach the host, and there is no token.
    """
    from search.service.guard import LOOPBACK, Access, digest_of

    token = read_token(token_file)
    if token is None and host not in LOOPBACK:
        raise SearchError(
            f"--host is {host!r} and there is no token; expected one, since others can reach this address; "
            f"give --token-file, or set {TOKEN_VARIABLE}"
        )
    return Access(None if token is None else digest_of(token))


def _check_stores(backends: Backends) -> None:
    """Refuse stores that no job can use, before anything is started."""
    from search.record.store import check_store, sqlite_path
    from search.service.submit import check_secrets

    check_secrets(backends.uri, backends.studies)
    if sqlite_path(backends.uri) is not None:
        check_store(backends.uri)


def _page_links(uri: str, dashboard: str, host: str) -> dict[str, str]:
    """Return the page's links to MLflow and Ray, those on loopback only if nobody else can reach the service."""
    from search.service.guard import LOOPBACK

    links = {"MLflow": uri} if uri.startswith(("http://", "https://")) else {}
    links["Ray"] = dashboard
    return {name: url for name, url in links.items() if host in LOOPBACK or urlsplit(url).hostname not in LOOPBACK}


def read_token(file: Path | None) -> bytes | None:
    """Return the token, if there is one, and take it out of the environment, so that no child inherits it.

    Raises:
        SearchError: it is too short, or others can read its file.
    """
    given = os.environ.pop(TOKEN_VARIABLE, None)
    source = f"${TOKEN_VARIABLE}"
    if given is None and file is not None:
        source = str(file)
        given = _read_or_make_token(file)
    if given is None:
        return None
    if len(given.strip()) < LEAST_TOKEN or not given.isascii():
        raise SearchError(
            f"the token in {source} has {len(given.strip())} characters; expected {LEAST_TOKEN} or more, of ASCII; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return given.strip().encode()


def _read_or_make_token(file: Path) -> str:
    """Return the token in the file, and make the file first if it is missing."""
    from cluster.token import write_once

    write_once(file, secrets.token_urlsafe())
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise SearchError(f"the token's file {file} has mode {mode:04o}; expected 0600, for you alone; chmod it")
    return file.read_text()


def _absolute_store(place: str) -> str:
    """Return a store or a journal file by its whole path, since the service runs in another folder."""
    if place.startswith("sqlite:///"):
        return f"sqlite:///{Path(place.removeprefix('sqlite:///')).resolve()}"
    return place if "://" in place else str(Path(place).resolve())

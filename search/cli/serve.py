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

if TYPE_CHECKING:
    from search.service.app import Settings
    from search.service.guard import Door
    from search.service.watching import Place

LEAST_TOKEN = 16
VARIABLE = "PAREDOWN_TOKEN"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Of the service's process: who asks over HTTP is told that a server is away, and does not wait for minutes."""


Head = Annotated[
    str, typer.Option(help="The Ray cluster whose head this machine is, such as 127.0.0.1:6379; auto starts one.")
]
Host = Annotated[str, typer.Option(help="What to listen on; anything but this machine alone needs a token.")]
Port = Annotated[int, typer.Option(min=1, max=65535)]
Uri = Annotated[str, typer.Option(help="The MLflow store.", envvar="PAREDOWN_URI")]
Studies = Annotated[str, typer.Option(help="Optuna's journal file or database.", envvar="PAREDOWN_STUDIES")]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="zoo, torchvision, or a factory pkg.mod:fn, which specs may name; the first two unless given."),
]
Root = Annotated[Path | None, typer.Option(help="The folder whose files specs may name; without it, none.")]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"The token's file, made where there is none; ${VARIABLE} goes before it.")
]
Searches = Annotated[
    int, typer.Option(min=1, help="How many may run at once; each takes about 1 GB of this machine's memory.")
]


def add(app: typer.Typer) -> None:
    """Makes the command the app's own."""
    app.command()(serve)


def serve(
    address: Head = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8700,
    uri: Uri = DEFAULT_STORE,
    studies: Studies = DEFAULT_STUDIES,
    allow: Allow = None,
    root: Root = None,
    token_file: TokenFile = None,
    searches: Searches = 4,
) -> None:
    """Serve searches over HTTP, with a page: submit, watch, stop. Runs on the head node of the cluster."""
    if address == "auto":
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads this once, when it is imported
    from search.service.admission import SOURCES, Rules
    from search.service.app import Settings
    from search.service.watching import Place

    door = _door(token_file, host)
    rules = Rules(tuple(allow or SOURCES), None if root is None else root.resolve())
    place = Place("", _absolute(uri), _absolute(studies))
    _check_stores(place)
    _run(Settings(place, rules, door, searches=searches), address, host, port)


def _run(settings: Settings, address: str, host: str, port: int) -> None:
    """Serves until Ctrl-C or a signal; the settings' address of jobs and links become those of this Ray."""
    from cluster.serve import connected, serving
    from search.service import app

    logging.getLogger("search").setLevel(logging.INFO)
    _end_alike()
    with suppress(KeyboardInterrupt), connected(address) as dashboard:
        place = replace(settings.place, jobs=dashboard)
        build = partial(app.app, replace(settings, place=place, links=_links(place.uri, dashboard, host)))
        with serving(build, name="paredown", host=host, port=port, environment=ENVIRONMENT) as url:
            _end_alike()  # Ray has taken SIGTERM
            needs = "behind its token" if settings.door.digest else "for this machine alone"
            typer.echo(f"Paredown is at {url}, {needs}; it records in {place.uri}. Ctrl-C ends it.")
            known = f"RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS={dashboard}"
            typer.echo(f"In another terminal: export {known}, then paredown list, paredown logs ID")
            signal.pause()


def _end_alike() -> None:
    """Has SIGTERM and a closed terminal end the command as Ctrl-C does, with all that it started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, signal.default_int_handler)


def _door(token_file: Path | None, host: str) -> Door:
    """Whom to let in.

    Raises:
        SearchError: others can reach the host, and there is no token.
    """
    from search.service.guard import LOOPBACK, Door, digest_of

    token = token_of(token_file)
    if token is None and host not in LOOPBACK:
        raise SearchError(
            f"--host is {host!r} and there is no token; expected one, since others can reach this address; "
            f"give --token-file, or set {VARIABLE}"
        )
    return Door(None if token is None else digest_of(token))


def _check_stores(place: Place) -> None:
    """Refuses stores that no job can use, before anything is started."""
    from search.record.store import check_store, sqlite_path
    from search.service.submit import check_secrets

    check_secrets(place.uri, place.studies)
    if sqlite_path(place.uri) is not None:
        check_store(place.uri)


def _links(uri: str, dashboard: str, host: str) -> dict[str, str]:
    """Where a person finds the rest; without what is on loopback, where others can reach the service."""
    from search.service.guard import LOOPBACK

    links = {"MLflow": uri} if uri.startswith(("http://", "https://")) else {}
    links["Ray"] = dashboard
    return {name: url for name, url in links.items() if host in LOOPBACK or urlsplit(url).hostname not in LOOPBACK}


def token_of(file: Path | None) -> bytes | None:
    """The token, where there is one; what this process starts inherits no copy.

    Raises:
        SearchError: it is too short, or others can read its file.
    """
    given = os.environ.pop(VARIABLE, None)
    source = f"${VARIABLE}"
    if given is None and file is not None:
        source = str(file)
        given = _kept(file)
    if given is None:
        return None
    if len(given.strip()) < LEAST_TOKEN or not given.isascii():
        raise SearchError(
            f"the token in {source} has {len(given.strip())} characters; expected {LEAST_TOKEN} or more, of ASCII; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return given.strip().encode()


def _kept(file: Path) -> str:
    """The token in the file, which is made where there is none."""
    from cluster.token import write_once

    write_once(file, secrets.token_urlsafe())
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise SearchError(f"the token's file {file} has mode {mode:04o}; expected 0600, for you alone; chmod it")
    return file.read_text()


def _absolute(place: str) -> str:
    """A store or a journal file by its whole path: the service runs in another folder."""
    if place.startswith("sqlite:///"):
        return f"sqlite:///{Path(place.removeprefix('sqlite:///')).resolve()}"
    return place if "://" in place else str(Path(place).resolve())

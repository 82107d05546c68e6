"""`paredown serve`: the HTTP service and its page, on Ray Serve."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from search.base import SearchError, masked

LEAST_TOKEN = 16
VARIABLE = "PAREDOWN_TOKEN"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Of the service's process: who asks over HTTP is told that a server is away, and does not wait for minutes."""


def add(app: typer.Typer) -> None:
    """Makes the command the app's own."""
    app.command()(serve)


def serve(
    address: Annotated[
        str, typer.Option(help="The Ray cluster whose head this machine is, such as 127.0.0.1:6379; auto starts one.")
    ] = "auto",
    host: Annotated[
        str, typer.Option(help="What to listen on; anything but this machine alone needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8700,
    uri: Annotated[str, typer.Option(help="The MLflow store.", envvar="PAREDOWN_URI")] = "sqlite:///paredown.db",
    studies: Annotated[
        str, typer.Option(help="Optuna's journal file or database.", envvar="PAREDOWN_STUDIES")
    ] = "paredown.studies",
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="zoo, torchvision, or a factory pkg.mod:fn, which specs may name; the first two unless given."
        ),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="The folder whose files specs may name; without it, none.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help=f"The token's file, made where there is none; ${VARIABLE} goes before it.")
    ] = None,
) -> None:
    """Serve searches over HTTP, with a page: submit, watch, stop. Runs on the head node of the cluster."""
    if address == "auto":
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads this once, when it is imported
    from cluster.serve import connected, serving
    from search import service
    from search.admission import SOURCES, Rules
    from search.guard import LOOPBACK, Door, digest_of
    from search.store import check_store, sqlite_path
    from search.watching import Place

    token = token_of(token_file)
    if token is None and host not in LOOPBACK:
        raise SearchError(
            f"--host is {host!r} and there is no token; expected one, since others can reach this address; "
            f"give --token-file, or set {VARIABLE}"
        )
    door = Door(None if token is None else digest_of(token))
    rules = Rules(tuple(allow or SOURCES), None if root is None else root.resolve())
    if sqlite_path(uri) is not None:
        check_store(uri)
    logging.getLogger("search").setLevel(logging.INFO)
    with connected(address) as dashboard, suppress(KeyboardInterrupt):
        place = Place(dashboard, _absolute(uri), _absolute(studies))
        build = partial(service.app, service.Settings(place, rules, door, _links(uri, dashboard)))
        with serving(build, name="paredown", host=host, port=port, environment=ENVIRONMENT) as url:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)  # Ray has taken them
            needs = "behind its token" if token else "for this machine alone"
            typer.echo(f"Paredown is at {url}, {needs}; it records in {masked(uri)}. Ctrl-C ends it.")
            signal.pause()


def _links(uri: str, dashboard: str) -> dict[str, str]:
    """Where a person finds the rest, without what a store's address may hold of a password."""
    place = urlsplit(uri)
    if place.scheme not in ("http", "https"):
        return {"Ray": dashboard}
    return {"MLflow": f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}", "Ray": dashboard}


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

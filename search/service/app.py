"""The HTTP service: searches submitted, watched and stopped over HTTP, a page for people, OpenAPI for programs.

It keeps no state: a search's id is that of its Ray job, its results are in MLflow, and all who read share what was
seen of both within a second. `app` builds it, and `cluster.serve` runs it. `search.service.guard` stands before it, and
`search.service.admission` judges submitted specs.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, StreamingResponse
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from cluster.base import ClusterError
from cluster.jobs import Job
from search.base import SearchError, TrackingError, masked
from search.driver.winners import check_model
from search.record.searches import find_search
from search.record.store import FAULTS
from search.report import html
from search.report.figures import LABELS, SYMBOLS
from search.results import SearchResult
from search.service import watching
from search.service.admission import JSON, YAML, AdmissionRules, admit
from search.service.guard import LARGEST_BYTES, Access, Guard, Refused
from search.service.submit import submit
from search.service.watching import Backends, Looks, View
from search.spec import SearchSpec
from search.spec.reading import with_stores

log = logging.getLogger(__name__)

BODY_S = 30.0
"""Seconds that a client may take to send a spec."""
RESUME_HINT = "submit the spec to the service again"
"""The way to resume a stopped search, for its log."""
MOST_WATCHERS = 64
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts allow-downloads"
)
"""The report holds its own script and style; in a sandbox no text of a spec makes it a page of this service."""


@dataclass(frozen=True)
class Settings:
    """The settings that the service is started with.

    `links` are those on the page, from a name to an address; `searches` is the number that may run at once.
    """

    backends: Backends
    rules: AdmissionRules = field(default_factory=AdmissionRules)
    access: Access = field(default_factory=Access)
    links: dict[str, str] = field(default_factory=dict)
    searches: int = 4


class Submitted(BaseModel):
    """A search that was submitted."""

    id: str
    name: str


class Searches(BaseModel):
    """All searches of the cluster, the latest first."""

    searches: list[View]


class Told(BaseModel):
    """The reason for a refusal: the mistake, the expectation, and the way to mend it."""

    error: str


def app(settings: Settings) -> ASGIApp:
    """Build the whole service behind its guard, as an ASGI app."""
    inner = FastAPI(title="Paredown", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    looks = Looks(settings.backends)
    _add_search_routes(inner, settings, looks)
    _add_result_routes(inner, looks)
    _add_pages(inner, settings)
    _add_error_answers(inner, settings.backends.uri)
    inner.openapi = lambda: _openapi(inner, needs_token=settings.access.digest is not None)  # type: ignore[method-assign]
    return Guard(inner, settings.access)


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the answers of an operation that refuse it."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Told"}}}
    described = {"description": "Refused", "content": content}
    return dict.fromkeys((*statuses, 401, 403, 413, 421, 422, 429, 503), described)


BODY = {
    "requestBody": {
        "required": True,
        "description": f"The spec, at most {LARGEST_BYTES:,} bytes. Shares and times may be written as in a spec file.",
        "content": {kind: {"schema": {"$ref": "#/components/schemas/SearchSpec"}} for kind in (YAML[0], JSON[0])},
    }
}

EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["progress", "points", "trouble", "end"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


def _add_search_routes(inner: FastAPI, settings: Settings, looks: Looks) -> None:
    """Add the operations that submit, list, show and stop searches."""
    backends = settings.backends
    submitting: set[str] = set()

    @inner.post("/searches", status_code=202, responses=_refusals(400, 408, 409, 415), openapi_extra=BODY)
    async def submit_search(request: Request) -> Submitted:
        """Submit a spec; the search runs as a job of the cluster. Submitting a spec again resumes its search."""
        body = await _read_body(request)
        kind = request.headers.get("content-type", "")
        spec = await run_in_threadpool(admit, body, kind, settings.rules)
        running = await run_in_threadpool(watching.running_names, backends)
        _check_room(spec.name, running | submitting, settings.searches)
        submitting.add(spec.name)  # at once, since the cluster knows of it only after a while
        try:
            return await run_in_threadpool(_submit_spec, spec, backends)
        finally:
            submitting.remove(spec.name)
            looks.forget()

    @inner.get("/searches", responses=_refusals())
    async def list_searches() -> Searches:
        """All searches of the cluster, the latest first, without their results."""
        return Searches(searches=[watching.summary(job) for job in await looks.searches()])

    @inner.get("/searches/{id}", responses=_refusals(404))
    async def show_search(id: str) -> View:
        """The progress of a search: its phase, trials, the best of each budget so far, and the seconds spent."""
        return (await looks.snapshot(id)).view

    @inner.delete("/searches/{id}", responses=_refusals(404))
    async def stop_search(id: str) -> View:
        """Stop a search; every finished trial is kept, and submitting its spec again resumes it."""
        looks.forget()
        job = await looks.job(id)
        if not job.is_over:
            await run_in_threadpool(lambda: watching.jobs_at(backends.jobs).stop(job.id))
            looks.forget()
        return (await looks.snapshot(id)).view


async def _read_body(request: Request) -> bytes:
    """Read the whole body, and refuse a client that is too slow."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.body()
    except TimeoutError as error:
        raise Refused(408, f"the body took more than {BODY_S:g} s; expected a spec at once; send it again") from error


def _submit_spec(spec: SearchSpec, backends: Backends) -> Submitted:
    """Submit an admitted spec; its folder is gone once the cluster has a copy."""
    check_model(with_stores(spec, backends.uri, None))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{spec.name}.yaml")
        path.write_text(spec.text, encoding="utf-8")
        job = submit(
            watching.jobs_at(backends.jobs), path, uri=backends.uri, studies=backends.studies, again=RESUME_HINT
        )
    log.info("submitted %s", job.id)
    return Submitted(id=job.id, name=spec.name)


def _check_room(name: str, running: set[str], most: int) -> None:
    """Refuse a second search of a name, and more than `most` in all."""
    if name in running:
        raise Refused(409, f"search {name!r} is running; expected one at a time of a name; wait, stop it, or rename it")
    if len(running) >= most:
        raise Refused(429, f"{len(running)} searches run; expected fewer than {most}; wait for one, or stop one")


def _add_result_routes(inner: FastAPI, looks: Looks) -> None:
    """Add the operations that give the results of a search, once or as they come."""
    watchers = 0

    @inner.get("/searches/{id}/frontier", responses=_refusals(404), response_model=dict[str, Any])
    async def show_frontier(id: str) -> Response:
        """The frontier and the winners so far, with the keys of `paredown frontier --json`."""
        job = await looks.job(id)
        read = partial(_frontier_json, job, looks.backends)
        return Response(await looks.shared(("frontier", id), read), media_type="application/json")

    @inner.get("/searches/{id}/report", response_class=HTMLResponse, responses=_refusals(404))
    async def show_report(id: str, request: Request) -> HTMLResponse:
        """The report so far: one page that can be kept and opens anywhere."""
        job = await looks.job(id)
        page, packed = await looks.shared(("report", id), partial(_report_pages, job, looks.backends))
        headers = {"content-security-policy": REPORT_POLICY, "cross-origin-opener-policy": "unsafe-none"}
        headers["vary"] = "accept-encoding"
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return HTMLResponse(page, headers=headers)
        return HTMLResponse(packed, headers=headers | {"content-encoding": "gzip"})

    stream = {"content": {"text/event-stream": {"schema": EVENT}}}

    @inner.get("/searches/{id}/events", response_class=StreamingResponse, responses={200: stream, **_refusals(404)})
    async def watch_search(id: str) -> StreamingResponse:
        """Server-sent events: `progress` (a search as above), `points` (new candidates), `trouble`, at last `end`."""
        await looks.job(id)
        if watchers >= MOST_WATCHERS:
            raise Refused(429, f"{watchers} streams are open; expected fewer than {MOST_WATCHERS}; close one")
        return StreamingResponse(counted(id), media_type="text/event-stream")

    async def counted(id: str) -> AsyncIterator[str]:
        nonlocal watchers
        watchers += 1
        try:
            async for event in watching.events(looks, id):
                yield event
        finally:
            watchers -= 1


def _report_pages(job: Job, backends: Backends) -> tuple[bytes, bytes]:
    """The report as it is, and compressed: most of it is plotly.js, and many may ask at once."""
    page = html.html(_recorded_result(job, backends)).encode()
    return page, gzip.compress(page, compresslevel=1)  # a third of its size, in a tenth of a second


def _frontier_json(job: Job, backends: Backends) -> str:
    return json.dumps(_recorded_result(job, backends).to_json(), allow_nan=False)


def _recorded_result(job: Job, backends: Backends) -> SearchResult:
    """Read the result of a job's search from its record.

    Raises:
        Refused: there is none yet.
    """
    name = watching.name_of(job)
    record = watching.find_recorded(backends.uri, lambda: find_search(backends.uri, name))
    if record is None:
        raise Refused(
            404, f"search {job.id!r} has found nothing yet; expected its teacher's figures first; try again later"
        )
    return record.read.result()


def _add_pages(inner: FastAPI, settings: Settings) -> None:
    """Add the pages for people: the page with its style and script, and the description of the operations."""
    rooms = ChoiceLoader([PackageLoader("search.service"), PackageLoader("search.report")])
    templates = Environment(loader=rooms, autoescape=True, undefined=StrictUndefined)
    page = templates.get_template("page.html").render(links=settings.links, methods=LABELS, symbols=SYMBOLS)
    style = "".join(templates.get_template(name).render() for name in ("report.css", "page.css"))

    @inner.get("/", include_in_schema=False)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @inner.get("/docs", include_in_schema=False)
    def show_docs() -> HTMLResponse:
        return HTMLResponse(templates.get_template("docs.html").render(document=inner.openapi()))

    @inner.get("/style.css", include_in_schema=False)
    def show_style() -> Response:
        return Response(style, media_type="text/css")

    for name in ("page.js", "chart.js"):
        script = templates.get_template(name).render()
        inner.add_api_route(f"/{name}", _script_route(script), include_in_schema=False)


def _script_route(text: str) -> Any:
    def show_script() -> Response:
        return Response(text, media_type="text/javascript")

    return show_script


def _add_error_answers(inner: FastAPI, uri: str) -> None:
    """Turn every error into an answer with a reason."""

    def answer(status: int, reason: str, headers: Any = None) -> Response:
        # ASCII throughout: a reason may quote a character that UTF-8 cannot hold
        return Response(json.dumps({"error": reason}), status, headers, media_type="application/json")

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return answer(error.status, error.reason, dict(error.headers))

    def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reason = f"{request.method} {request.url.path[:200]}: {error.detail}; expected an operation that /docs lists"
        return answer(error.status_code, f"{reason}; correct the method or the path", error.headers)

    def away(request: Request, error: Exception) -> Response:
        log.warning("%s %s: %s", request.method, request.url.path, watching.outage_reason(error, uri))
        return answer(503, watching.outage_reason(error, uri))

    inner.add_exception_handler(Refused, refused)
    inner.add_exception_handler(HTTPException, unknown)
    inner.add_exception_handler(RequestValidationError, lambda request, error: answer(422, str(error)))
    inner.add_exception_handler(SearchError, lambda request, error: answer(409, masked(str(error))))
    inner.add_exception_handler(ClientDisconnect, lambda request, error: answer(400, "the client went away"))
    for kind in (ClusterError, TrackingError, *FAULTS):
        inner.add_exception_handler(kind, away)
    inner.add_exception_handler(
        Exception, lambda request, error: answer(500, "a fault of the service; see its log, and tell its operator")
    )


def _openapi(inner: FastAPI, *, needs_token: bool) -> dict[str, Any]:
    """Build the OpenAPI document, with the spec's own schema, and the token if one is needed."""
    if inner.openapi_schema is None:
        made = get_openapi(title=inner.title, version=inner.version, description=__doc__, routes=inner.routes)
        spec = SearchSpec.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
        made["components"]["schemas"] |= spec.pop("$defs") | {"SearchSpec": spec, "Told": Told.model_json_schema()}
        if needs_token:
            made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"token": []}]
        inner.openapi_schema = made
    return inner.openapi_schema

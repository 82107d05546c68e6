"""The state of searches for callers over HTTP: the list of all, and the progress, new points and end of each.

A job is Ray's, and its results are MLflow's. This file keeps only what it saw last, for a second.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from cluster.base import ClusterError
from cluster.jobs import Job, Jobs, Status
from search.base import NOTHING_FITS, TrackingError, masked
from search.limits import latency_on
from search.record.progress import Progress, so_far
from search.record.searches import Listed, find_begun, list_searches
from search.record.store import FAULTS, check_store, unwritable
from search.service.guard import Refused
from search.service.metadata import NAME, URI, search_of
from search.trials import Candidate, Teacher
from search.units import TOP1, Scale

T = TypeVar("T")

FRESH_S = 1.0
"""Seconds for which what was seen of a search is told to others who ask."""
EVERY_S = 2.0
"""Seconds between two snapshots of a watched search."""
HEARTBEAT_S = 15.0
"""Seconds without news before a comment is sent, so that no proxy takes the connection for dead."""
END_PHASES = ("done", "stopped", "failed")
PAST_SUFFIX = "-0"
"""The end of the id of a search whose job the cluster does not know; the numbers of jobs begin at 1."""


@dataclass(frozen=True)
class Backends:
    """The servers behind the service: Ray's job API, the MLflow store and Optuna's storage, without relative paths."""

    jobs: str
    uri: str
    studies: str


class View(BaseModel):
    """A search as it stands. Times are Unix times in seconds; `best` is per budget the best model so far and its costs.

    `phase` is `starting`, `running` (if no more is known), `scoring`, `trials`, `registering`, `done`, `stopped` or
    `failed`. `metric` is the name of what decides, and its values where a top-1 is 0 and 1; `value` in `best` is its
    own.
    """

    id: str
    name: str
    phase: str
    message: str
    started: float | None
    ended: float | None
    trials: int = 0
    expected: int = 0
    stopped: int = 0
    wall_s: float = 0.0
    best: dict[str, Any] = {}
    metric: dict[str, Any] = asdict(TOP1)


@dataclass(frozen=True)
class Snapshot:
    """A search at one moment: its progress, and the `points` it found, which are None until its teacher is measured."""

    view: View
    points: Mapping[str, Any] | None


@lru_cache(maxsize=1)
def jobs_at(address: str) -> Jobs:
    """Connect to the jobs at this address, and keep the connection once it has answered."""
    return Jobs(address)


def submitted_jobs(backends: Backends) -> list[Job]:
    """List the jobs of searches recorded in this store, the latest first, and no others."""
    found = [job for job in jobs_at(backends.jobs).all() if search_of(job) and job.metadata.get(URI) == backends.uri]
    return found[::-1]


def all_searches(backends: Backends) -> list[Job]:
    """List the searches recorded in this store, the latest first: those with a job here, then those without."""
    found = submitted_jobs(backends)
    names = {name_of(job) for job in found}
    return found + [_job_of_record(one, backends.uri) for one in list_searches(backends.uri) if one.name not in names]


def _job_of_record(one: Listed, uri: str) -> Job:
    """Make a job that is over, for a recorded search without one."""
    status = {"done": "succeeded", "stopped": "stopped"}.get(one.phase, "failed")
    left = f"its record ends at {one.phase!r}, and no job here goes on with it; submit its spec again"
    return Job(
        id=f"{one.name}{PAST_SUFFIX}",
        status=cast(Status, status),
        message="" if one.phase in END_PHASES else left,
        exit_code=None,
        metadata={NAME: one.name, URI: uri},
        started=one.started,
        ended=one.ended,
    )


def running_names(backends: Backends) -> set[str]:
    """The names of the searches that have not ended."""
    return {name_of(job) for job in submitted_jobs(backends) if not job.is_over}


def job_of(searches: Sequence[Job], id: str) -> Job:
    """Find the job of a search among those that are known.

    Raises:
        Refused: there is none of this id.
    """
    for job in searches:
        if job.id == id:
            return job
    raise Refused(404, f"no search {id[:100]!r} here; expected one of those that GET /searches lists; check the id")


def name_of(job: Job) -> str:
    """The search's name."""
    name = search_of(job)
    assert name is not None
    return name


def summary(job: Job) -> View:
    """The state of a search as its job alone tells it."""
    phase = {"pending": "starting", "succeeded": "done"}.get(job.status, job.status)
    message = ""
    if job.status == "failed" and job.exit_code == NOTHING_FITS:
        phase, message = "done", "no feasible model for some budget"
    elif job.status == "failed":  # Ray gives the end of its log, of which the last line says why
        message = next((line for line in masked(job.message).splitlines()[::-1] if line.strip()), "")
    return View(id=job.id, name=name_of(job), phase=phase, message=message, started=job.started, ended=job.ended)


def take_snapshot(job: Job, uri: str) -> Snapshot:
    """Read a search's progress and points; its job decides whether it has ended, and its record does not."""
    view, name = summary(job), name_of(job)
    record = find_recorded(uri, lambda: find_begun(uri, name))
    if record is None:
        return Snapshot(view if job.is_over else view.model_copy(update={"phase": "starting"}), None)
    trials = record.read.trials()
    far = so_far(record, name, trials)
    is_telling = not job.is_over and far.phase not in END_PHASES
    told = view.model_copy(update=_progress_fields(far) | ({"phase": far.phase} if is_telling else {}))
    teacher = record.search.teacher()
    return Snapshot(told, None if teacher is None else points(teacher, trials, far.metric))


def _progress_fields(far: Progress) -> dict[str, Any]:
    kept = ("trials", "expected", "stopped", "wall_s", "best", "metric")
    return {key: value for key, value in far.to_json().items() if key in kept}


def find_recorded(uri: str, seek: Callable[[], T]) -> T | None:
    """Return what `seek` finds in the store, or None if that holds nothing of the search yet.

    Raises:
        TrackingError: the store cannot be reached.
    """
    try:
        return seek()
    except TrackingError:
        check_store(uri)  # tells a store that is away from one that is empty
        return None


def points(teacher: Teacher, trials: Sequence[Candidate], metric: Scale) -> dict[str, Any]:
    """Every model, its costs as shares of the teacher's, its top-1 as a share on the scale of `metric`."""
    axes = ["macs", "params", *map(latency_on, teacher.latency_ms)]
    models = [one for one in trials if one.is_model]
    return {
        "metric": asdict(metric),
        "teacher": teacher.top1_validation,
        "axes": axes,
        "points": [_point_json(one, teacher, axes) for one in models],
    }


def _point_json(one: Candidate, teacher: Teacher, axes: list[str]) -> dict[str, Any]:
    costs = {axis: one.costs[axis] / teacher.costs[axis] for axis in axes if axis in one.costs}
    named = {"run_id": one.run_id, "budget": one.budget, "trial": one.trial, "method": one.method}
    return named | {"top1": one.top1_validation, "costs": costs}


class Looks:
    """Looks at the cluster and the store, each shared by all who ask for it while it lasts and for `FRESH_S` after.

    Everybody who reads asks here, so that many readers cost as much as one. Raises as the looks do.
    """

    def __init__(self, backends: Backends) -> None:
        self.backends = backends
        self._latest: dict[tuple[str, ...], tuple[float, asyncio.Future[Any]]] = {}

    async def searches(self) -> list[Job]:
        """Return what `all_searches` does."""
        return await self.shared(("searches",), lambda: all_searches(self.backends))

    async def job(self, id: str) -> Job:
        """Return the job of a search.

        Raises:
            Refused: there is none of this id.
        """
        if id.endswith(PAST_SUFFIX):
            return job_of(await self.searches(), id)
        return job_of(await self.shared(("jobs",), lambda: submitted_jobs(self.backends)), id)

    async def snapshot(self, id: str) -> Snapshot:
        """Return the state of a search."""
        job = await self.job(id)
        return await self.shared(("snapshot", id), lambda: take_snapshot(job, self.backends.uri))

    async def shared(self, key: tuple[str, ...], look: Callable[[], T]) -> T:
        """Return what `look` does: now in a thread, or what it did for another who asked with this key."""
        now = time.monotonic()
        self._latest = {key: one for key, one in self._latest.items() if now - one[0] < FRESH_S or not one[1].done()}
        if key not in self._latest:
            self._latest[key] = now, asyncio.ensure_future(run_in_threadpool(look))
        return cast(T, await asyncio.shield(self._latest[key][1]))  # who hangs up must not cancel it for the others

    def forget(self) -> None:
        """Look again for all who ask from now on, since something was changed."""
        self._latest = {}


async def events(looks: Looks, id: str) -> AsyncIterator[str]:
    """Yield a search's server-sent events: `progress` and `points` whenever they changed, `end` with its last state.

    `points` holds those that were not sent before. `trouble` reports a store or a cluster that is away for a while.
    """
    view: View | None = None
    sent: set[str] | None = None
    silent_s = 0.0
    now: View | None
    while True:
        try:
            seen = await looks.snapshot(id)
            now, new = seen.view, _new_points(seen.points, sent)
        except Refused:
            return  # its job is gone from the cluster
        except (ClusterError, TrackingError, *FAULTS) as error:
            now, new = view, {"error": outage_reason(error, looks.backends.uri)}
        silent_s = 0.0 if now != view or new else silent_s + EVERY_S
        if now is not None and now != view:
            yield _format_event("progress", now.model_dump())
        if new:
            yield _format_event("trouble" if "error" in new else "points", new)
        if "points" in new:
            sent = (sent or set()) | {point["run_id"] for point in new["points"]}
        if now is not None and now.phase in END_PHASES:
            yield _format_event("end", now.model_dump())
            return
        if silent_s >= HEARTBEAT_S:
            silent_s = 0.0
            yield ": still here\n\n"
        view = now
        await asyncio.sleep(EVERY_S)


def _new_points(known: Mapping[str, Any] | None, sent: set[str] | None) -> dict[str, Any]:
    """The points that were not sent yet; the first time also none, since the axes go along."""
    if known is None:
        return {}
    new = [point for point in known["points"] if point["run_id"] not in (sent or ())]
    return {**known, "points": new} if new or sent is None else {}


def outage_reason(error: Exception, uri: str) -> str:
    """The reason why the cluster or the store cannot be used now, without any password."""
    return masked(str(error)) if isinstance(error, ClusterError | TrackingError) else unwritable(uri, str(error))


def _format_event(kind: str, value: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"

"""What those who watch a search over HTTP are told: how far it is, every point as it is found, and that it ended.

Nothing is kept here: a job is Ray's, what it found is MLflow's, and both are asked anew each time.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from cluster.base import ClusterError
from cluster.jobs import Job, Jobs
from search.base import TrackingError, masked
from search.frontier import Candidate, Teacher, cost_of
from search.guard import Refused
from search.progress import Progress, progress
from search.records import find_search
from search.store import FAULTS, check_store, unwritable
from search.submit import URI, search_of
from search.targets import LATENCY

T = TypeVar("T")

EVERY_S = 2.0
"""How often a watched search is looked at."""
HEARTBEAT_S = 15.0
"""After so long without news a comment is sent, so that nobody on the way takes the connection for dead."""
NOTHING_FITS = 3
ENDED = ("done", "stopped", "failed")


@dataclass(frozen=True)
class Place:
    """Where searches are: the address of Ray's job API, the MLflow store, and Optuna's storage; no relative files."""

    jobs: str
    uri: str
    studies: str


class View(BaseModel):
    """A search as it stands. Times are Unix times in seconds; `best` is per budget the best model so far and its costs.

    `phase` is `starting`, `running` (where no more is known), `scoring`, `trials`, `registering`, `done`, `stopped` or
    `failed`.
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


@lru_cache(maxsize=1)
def jobs(address: str) -> Jobs:
    """The jobs at this address, once it has answered."""
    return Jobs(address)


def ours(place: Place) -> list[Job]:
    """The searches recorded in this store, the latest first; other jobs are none of this service's business."""
    found = [job for job in jobs(place.jobs).all() if search_of(job) and job.metadata.get(URI) == masked(place.uri)]
    return found[::-1]


def running(place: Place) -> set[str]:
    """The names of the searches that have not ended."""
    return {name_of(job) for job in ours(place) if not job.is_over}


def found(place: Place, id: str) -> Job:
    """The job of a search.

    Raises:
        Refused: there is none of this id.
    """
    for job in ours(place):
        if job.id == id:
            return job
    raise Refused(404, f"no search {id[:100]!r} here; expected one of those that GET /searches lists; check the id")


def name_of(job: Job) -> str:
    """The search's name."""
    name = search_of(job)
    assert name is not None
    return name


def in_short(job: Job) -> View:
    """What is known of a search without a look at its record."""
    phase = {"pending": "starting", "succeeded": "done"}.get(job.status, job.status)
    message = ""
    if job.status == "failed" and job.exit_code == NOTHING_FITS:
        phase, message = "done", "no feasible model for some budget"
    elif job.status == "failed":  # Ray gives the end of its log, of which the last line says why
        message = next((line for line in masked(job.message).splitlines()[::-1] if line.strip()), "")
    return View(id=job.id, name=name_of(job), phase=phase, message=message, started=job.started, ended=job.ended)


def in_full(job: Job, uri: str) -> View:
    """How far a search is; it has ended when its job has, whatever the record of this or an earlier sitting says."""
    view = in_short(job)
    far = recorded(uri, lambda: progress(uri, name_of(job)))
    if far is None:
        return view if job.is_over else view.model_copy(update={"phase": "starting"})
    is_telling = not job.is_over and far.phase not in ENDED
    return view.model_copy(update=_known(far) | ({"phase": far.phase} if is_telling else {}))


def _known(far: Progress) -> dict[str, Any]:
    kept = ("trials", "expected", "stopped", "wall_s", "best")
    return {key: value for key, value in far.to_json().items() if key in kept}


def recorded(uri: str, look: Callable[[], T]) -> T | None:
    """What `look` finds in the store; None where it holds nothing of the search yet.

    Raises:
        TrackingError: the store cannot be reached.
    """
    try:
        return look()
    except TrackingError:
        check_store(uri)  # tells a store that is away from one that is empty
        return None


def points(uri: str, name: str) -> dict[str, Any] | None:
    """Every candidate that was measured to the end, its costs as shares of the teacher's; None before there is one."""
    tracker = recorded(uri, lambda: find_search(uri, name))
    teacher = tracker.teacher() if tracker is not None else None
    if tracker is None or teacher is None:
        return None
    axes = ["macs", "params", *(f"{LATENCY}{device}" for device in teacher.latency_ms)]
    complete = [one for one in tracker.trials() if one.state == "complete"]
    return {
        "teacher": teacher.top1_validation,
        "axes": axes,
        "points": [_point(one, teacher, axes) for one in complete],
    }


def _point(one: Candidate, teacher: Teacher, axes: list[str]) -> dict[str, Any]:
    shares = {axis: cost_of(one, axis) / cost_of(teacher, axis) for axis in axes}
    costs = {axis: share for axis, share in shares.items() if math.isfinite(share)}
    named = {"run_id": one.run_id, "budget": one.budget, "trial": one.trial, "method": one.method}
    return named | {"top1": one.top1_validation, "costs": costs}


async def events(place: Place, id: str) -> AsyncIterator[str]:
    """A search's server-sent events: `progress` and `points` whenever they changed, `end` with its last state.

    `points` holds those that were not sent before. A store or a cluster that is away for a while is told as `trouble`.
    """
    view: View | None = None
    sent: set[str] = set()
    silent_s = 0.0
    now: View | None
    while True:
        try:
            now, new = await run_in_threadpool(_news, place, id, view, sent)
        except Refused:
            return  # its job is gone from the cluster
        except (ClusterError, TrackingError, *FAULTS) as error:
            now, new = view, {"error": reason(error, place.uri)}
        silent_s = 0.0 if now != view or new else silent_s + EVERY_S
        if now is not None and now != view:
            yield _event("progress", now.model_dump())
        if new:
            yield _event("trouble" if "error" in new else "points", new)
            sent |= {point["run_id"] for point in new.get("points", ())}
        if now is not None and now.phase in ENDED:
            yield _event("end", now.model_dump())
            return
        if silent_s >= HEARTBEAT_S:
            silent_s = 0.0
            yield ": still here\n\n"
        view = now
        await asyncio.sleep(EVERY_S)


def _news(place: Place, id: str, before: View | None, sent: set[str]) -> tuple[View, dict[str, Any]]:
    """How far the search is, and the points that were not sent yet."""
    job = found(place, id)
    view = in_full(job, place.uri)
    if before is not None and view.trials == before.trials:
        return view, {}
    known = points(place.uri, name_of(job))
    if known is None:
        return view, {}
    new = [point for point in known["points"] if point["run_id"] not in sent]
    return view, known | {"points": new} if new or not sent else {}


def reason(error: Exception, uri: str) -> str:
    """Why the cluster or the store cannot be used now, without any password."""
    return masked(str(error)) if isinstance(error, ClusterError | TrackingError) else unwritable(uri, str(error))


def _event(kind: str, value: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"

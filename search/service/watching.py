"""What those who watch a search over HTTP are told: how far it is, every point as it is found, and that it ended.

A job is Ray's and what it found is MLflow's. Nothing is kept here but the latest look at each search that is watched.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from cluster.base import ClusterError
from cluster.jobs import Job, Jobs, Status
from search.base import NOTHING_FITS, TrackingError, masked
from search.record.progress import Progress, so_far
from search.record.searches import Recorded, find_begun
from search.record.searches import recorded as on_record
from search.record.store import FAULTS, check_store, unwritable
from search.service.guard import Refused
from search.service.metadata import NAME, URI, search_of
from search.trials import LATENCY, Candidate, Teacher, cost_of

T = TypeVar("T")

EVERY_S = 2.0
"""How often a watched search is looked at."""
HEARTBEAT_S = 15.0
"""After so long without news a comment is sent, so that nobody on the way takes the connection for dead."""
ENDED = ("done", "stopped", "failed")
PAST = "-0"
"""What the id of a search ends with of which the cluster knows no job, or no longer; those of jobs begin at 1."""


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


@dataclass(frozen=True)
class Look:
    """A search as it was seen: how far it is, and the `points` that were found, once its teacher is measured."""

    view: View
    points: Mapping[str, Any] | None


@lru_cache(maxsize=1)
def jobs(address: str) -> Jobs:
    """The jobs at this address, once it has answered."""
    return Jobs(address)


def submitted(place: Place) -> list[Job]:
    """The jobs of searches recorded in this store, the latest first; others are none of this service's business."""
    found = [job for job in jobs(place.jobs).all() if search_of(job) and job.metadata.get(URI) == place.uri]
    return found[::-1]


def ours(place: Place) -> list[Job]:
    """The searches recorded in this store, the latest first; after those with a job here those of another cluster."""
    found = submitted(place)
    names = {name_of(job) for job in found}
    return found + [_past(one, place.uri) for one in on_record(place.uri) if one.name not in names]


def _past(one: Recorded, uri: str) -> Job:
    """A search without a job, as one that is over."""
    status = {"done": "succeeded", "stopped": "stopped"}.get(one.phase, "failed")
    left = f"its record ends at {one.phase!r}, and no job here goes on with it; submit its spec again"
    return Job(
        id=f"{one.name}{PAST}",
        status=cast(Status, status),
        message="" if one.phase in ENDED else left,
        exit_code=None,
        metadata={NAME: one.name, URI: uri},
        started=one.started,
        ended=one.ended,
    )


def running(place: Place) -> set[str]:
    """The names of the searches that have not ended."""
    return {name_of(job) for job in submitted(place) if not job.is_over}


def found(place: Place, id: str) -> Job:
    """The job of a search.

    Raises:
        Refused: there is none of this id.
    """
    for job in ours(place) if id.endswith(PAST) else submitted(place):
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


def look(job: Job, uri: str) -> Look:
    """How far a search is and what it found; it has ended when its job has, whatever the record of a sitting says."""
    view, name = in_short(job), name_of(job)
    tracker = recorded(uri, lambda: find_begun(uri, name))
    if tracker is None:
        return Look(view if job.is_over else view.model_copy(update={"phase": "starting"}), None)
    trials = tracker.trials()
    far = so_far(tracker, name, trials)
    is_telling = not job.is_over and far.phase not in ENDED
    told = view.model_copy(update=_known(far) | ({"phase": far.phase} if is_telling else {}))
    teacher = tracker.teacher()
    return Look(told, None if teacher is None else points(teacher, trials))


def _known(far: Progress) -> dict[str, Any]:
    kept = ("trials", "expected", "stopped", "wall_s", "best")
    return {key: value for key, value in far.to_json().items() if key in kept}


def recorded(uri: str, seek: Callable[[], T]) -> T | None:
    """What `seek` finds in the store; None where it holds nothing of the search yet.

    Raises:
        TrackingError: the store cannot be reached.
    """
    try:
        return seek()
    except TrackingError:
        check_store(uri)  # tells a store that is away from one that is empty
        return None


def points(teacher: Teacher, trials: Sequence[Candidate]) -> dict[str, Any]:
    """Every candidate that was measured to the end, its costs as shares of the teacher's."""
    axes = ["macs", "params", *(f"{LATENCY}{device}" for device in teacher.latency_ms)]
    complete = [one for one in trials if one.state == "complete"]
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


class Looks:
    """The latest look at each search that is watched: one every `EVERY_S` seconds, however many watch it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._latest: dict[str, tuple[float, asyncio.Future[Look]]] = {}

    async def at(self, id: str) -> Look:
        """The search as it was seen at most `EVERY_S` seconds ago, or is seen now."""
        now = time.monotonic()
        self._latest = {key: one for key, one in self._latest.items() if now - one[0] < EVERY_S or not one[1].done()}
        if id not in self._latest:
            self._latest[id] = now, asyncio.ensure_future(run_in_threadpool(self._look, id))
        return await asyncio.shield(self._latest[id][1])  # one that hangs up ends no look of the others

    def _look(self, id: str) -> Look:
        return look(found(self.place, id), self.place.uri)


async def events(looks: Looks, id: str) -> AsyncIterator[str]:
    """A search's server-sent events: `progress` and `points` whenever they changed, `end` with its last state.

    `points` holds those that were not sent before. A store or a cluster that is away for a while is told as `trouble`.
    """
    view: View | None = None
    sent: set[str] | None = None
    silent_s = 0.0
    now: View | None
    while True:
        try:
            seen = await looks.at(id)
            now, new = seen.view, _unsent(seen.points, sent)
        except Refused:
            return  # its job is gone from the cluster
        except (ClusterError, TrackingError, *FAULTS) as error:
            now, new = view, {"error": reason(error, looks.place.uri)}
        silent_s = 0.0 if now != view or new else silent_s + EVERY_S
        if now is not None and now != view:
            yield _event("progress", now.model_dump())
        if new:
            yield _event("trouble" if "error" in new else "points", new)
        if "points" in new:
            sent = (sent or set()) | {point["run_id"] for point in new["points"]}
        if now is not None and now.phase in ENDED:
            yield _event("end", now.model_dump())
            return
        if silent_s >= HEARTBEAT_S:
            silent_s = 0.0
            yield ": still here\n\n"
        view = now
        await asyncio.sleep(EVERY_S)


def _unsent(known: Mapping[str, Any] | None, sent: set[str] | None) -> dict[str, Any]:
    """The points that were not sent yet; at first also where there is none, for the axes."""
    if known is None:
        return {}
    new = [point for point in known["points"] if point["run_id"] not in (sent or ())]
    return {**known, "points": new} if new or sent is None else {}


def reason(error: Exception, uri: str) -> str:
    """Why the cluster or the store cannot be used now, without any password."""
    return masked(str(error)) if isinstance(error, ClusterError | TrackingError) else unwritable(uri, str(error))


def _event(kind: str, value: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"

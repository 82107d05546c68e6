"""Jobs on a Ray cluster: submit a command over HTTP to the head, which runs it; watch and stop it.

Ray's client is imported where it is used: every worker imports this package, and none of them submits anything.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError

from cluster.base import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

Status: TypeAlias = Literal["pending", "running", "succeeded", "failed", "stopped"]

NOT_SENT = (
    *("__pycache__", ".venv", "venv", ".git", "mlruns", "mlartifacts", "*.db", "*.db-journal", "*.artifacts"),
    *("paredown.studies*", "paredown.reports", ".paredown.*"),
)
"""Patterns of files that are not sent, besides those in ignore files: environments, and the files of searches."""

MOST_BYTES = 512 * 1024**2
"""A larger folder is not even packed. Ray's job server takes 100 MiB, packed, and itself refuses more."""

CONNECT_S, ANSWER_S, POLL_S = 10, 60, 0.5
"""Time for the head to take a call; to say something each time, even with 100 MiB sent; between two looks at a job."""

STOP_WAIT_S = 60
"""Time for a stopped job to finish its records; Ray's own 3 seconds are too few for an MLflow server."""

INSTALL_S = 900
"""Time for a node to install packages: as long as Ray by itself waits for a job to start."""

NODES = 10_000
"""The most nodes asked for, since Ray's own default is 100."""


@dataclass(frozen=True)
class Job:
    """A job as it stands. `started` and `ended` are Unix times in seconds; `exit_code` is its command's, once ended."""

    id: str
    status: Status
    message: str
    exit_code: int | None
    metadata: Mapping[str, str]
    started: float | None
    ended: float | None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status in ("succeeded", "failed", "stopped")

    @property
    def reason(self) -> str:
        """The line of `message` that says most: the last one where Ray could not start the command, else the first."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()] or [""]
        return lines[-1 if self.status == "failed" and self.exit_code is None else 0]


class Jobs:
    """The jobs of the cluster whose head answers at `address`, such as `http://HEAD:8265`.

    Where the cluster asks for a token, it is Ray's own: `RAY_AUTH_TOKEN`, or the file `~/.ray/auth_token`.

    Raises:
        ClusterError: nobody answers there, or the token is missing or wrong. So does every method.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _check_answer(self.address)
        with self._own_errors(), _without_overrides():
            self._client = _client(self.address)

    def submit(
        self,
        entrypoint: str,
        *,
        id: str,
        folder: Path | None,
        modules: Sequence[Path],
        environment: Mapping[str, str] = MappingProxyType({}),
        packages: Sequence[str] = (),
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> Job:
        """Run a shell command on the head; return its job as soon as Ray has taken it.

        Args:
            folder: becomes the command's working folder, and that of its workers, without `NOT_SENT`.
            modules: folders of packages, which the command and its workers import before any installed one.
            environment: variables of the command and its workers; every user of the cluster can read them.
            packages: requirements that Ray installs on every node before anything runs there.

        Raises:
            ClusterError: there is a job of this `id`, or the folder is too large.
        """
        wanted: dict[str, Any] = {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **environment},
            "excludes": list(NOT_SENT),
        }
        if modules:
            wanted["py_modules"] = [str(module) for module in modules]
        if folder is not None:
            _check_size(folder)
            wanted["working_dir"] = str(folder)
        if packages:
            wanted |= {"uv": list(packages), "config": {"setup_timeout_seconds": INSTALL_S}}
        with self._own_errors():
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=id, runtime_env=wanted, metadata=dict(metadata)
            )
        return self.get(id)

    def get(self, id: str) -> Job:
        """The job of that id.

        Raises:
            ClusterError: there is none; the message names those there are.
        """
        found = self._details(id) if re.fullmatch(r"\w[\w.-]*", id) else None  # it becomes part of an address
        if found is None or found.submission_id is None:
            known = ", ".join(job.id for job in self.all()) or "none"
            raise ClusterError(
                f"no job {id!r} on {self.address}; it has {known}; expected one of them; check the id and the address"
            )
        return _job(found)

    def all(self) -> list[Job]:
        """Every job submitted to the cluster since it was started, newest last."""
        with self._own_errors():
            found = [_job(one) for one in self._client.list_jobs() if one.submission_id is not None]
        return sorted(found, key=lambda job: job.started or 0.0)

    def logs(self, id: str) -> str:
        """The output of the job so far."""
        self.get(id)
        with self._own_errors():
            return str(self._client.get_job_logs(id))

    def follow(self, id: str) -> Iterator[str]:
        """Yield the output of the job, past and coming, piece by piece, until it ends."""
        from aiohttp import ClientError

        shown = 0
        self.get(id)
        while True:
            position = 0
            with suppress(RuntimeError, ClientError):  # a proxy may cut a connection that is silent for long
                for piece in _blocking(self._client.tail_job_logs(id)):
                    if new := piece[max(0, shown - position) :]:
                        yield new
                    position += len(piece)
                    shown = max(shown, position)
            if self.get(id).is_over:
                yield self.logs(id)[shown:]
                return
            time.sleep(POLL_S)

    def stop(self, id: str, timeout_s: float = STOP_WAIT_S + 30) -> Job:
        """Ask the job to end by SIGTERM, and wait until it has; one that has ended stays as it is."""
        if not self.get(id).is_over:
            with self._own_errors():
                self._client.stop_job(id)
        return self.wait(id, timeout_s)

    def wait(self, id: str, timeout_s: float) -> Job:
        """Wait until the job has ended.

        Raises:
            ClusterError: it has not ended after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not (job := self.get(id)).is_over:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {id!r} is still {job.status} after {timeout_s:g} s: {job.reason}; expected its end; "
                    "look at its log, and try again"
                )
            time.sleep(POLL_S)
        return job

    def nodes(self) -> list[dict[str, float]]:
        """The resources in Ray of each living node."""
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        with self._own_errors(RayStateApiException), _without_overrides():
            found = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")], limit=NODES)
        return [dict(node.resources_total) for node in found]

    def may_grow(self) -> bool:
        """Whether nodes may come with demand: True if an autoscaler is at work, or cannot be ruled out.

        Ray tells this nowhere. Without an autoscaler its monitor gives every node a type of its own, `node_` and the
        node's id; the newer of Ray's two autoscalers writes nothing there at all.
        """
        with self._own_errors():
            answer = self._client._do_request("GET", "/api/cluster_status").json()
        report = ((answer.get("data") or {}).get("clusterStatus") or {}).get("autoscalerReport") or {}
        types = report.get("nodeTypeMapping")
        return not types or any(kind != f"node_{node}" for node, kind in types.items())

    def _details(self, id: str) -> JobDetails | None:
        """Ray's own record of a job, or None."""
        with self._own_errors():
            try:
                return self._client.get_job_info(id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    @contextmanager
    def _own_errors(self, kind: type[Exception] = OSError) -> Iterator[None]:
        """Raise errors of Ray's client, and those of this `kind`, as ClusterError."""
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"{self.address} did not take the token: {str(error).partition(chr(10))[0]}; expected the cluster's "
                "own; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file ~/.ray/auth_token"
            ) from error
        except (OSError, RuntimeError, ValueError, KeyError, kind) as error:
            raise ClusterError(_refusal(self.address, str(error))) from error


def _client(address: str) -> JobSubmissionClient:
    """Ray's client with time limits: by itself it would wait for ever for a silent head."""
    from ray.job_submission import JobSubmissionClient

    for noisy in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{noisy}").setLevel(logging.WARNING)  # now, since their import sets it, too

    class Impatient(JobSubmissionClient):  # its constructor asks, too
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options)

    return Impatient(address)


def _check_answer(address: str) -> None:
    """Make sure that a server listens there: Ray's own client would wait for minutes."""
    try:
        place = urlsplit(address)
        port = place.port or {"http": 80, "https": 443}[place.scheme]
        socket.create_connection((place.hostname or "", port), timeout=CONNECT_S).close()
    except (OSError, KeyError, ValueError) as error:
        # what Python says of a port may be a part of a password
        reason = error if isinstance(error, OSError) else "it is no http://HOST:PORT"
        raise ClusterError(
            f"no Ray cluster at {address!r}: {reason}; expected the dashboard of a running head, such as "
            "http://127.0.0.1:8265; check the address, or make a tunnel to it"
        ) from error


@contextmanager
def _without_overrides() -> Iterator[None]:
    """Hide the variables by which Ray replaces an address, even one that is given to it."""
    kept = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _refusal(address: str, reason: str) -> str:
    """The message for an answer that is an error."""
    lines = [line.strip() for line in reason.splitlines() if line.strip(" .^~")]
    brief = lines[-1] if lines else "nothing"
    if "already exists" in brief:
        return f"{brief} It was submitted meanwhile, by somebody else; expected a new id; submit again"
    if re.search("body size|exceeds the maximum size|status code 413", reason):
        return (
            f"the folder is too large for {address}: {brief}; expected at most 100 MiB, packed; keep data elsewhere, "
            "on a path that the nodes have, or name what is not needed in a .rayignore file"
        )
    return f"{address} answered with: {brief}; expected a Ray cluster of a like version; check the address and the head"


def _check_size(folder: Path) -> None:
    """Refuse a folder that could never be sent, before it is packed; with an ignore file it may have less to send."""
    if any((folder / name).is_file() for name in (".gitignore", ".rayignore")):
        return
    sizes = {entry.name: _size(entry) for entry in folder.iterdir() if not _is_left_out(entry)}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise ClusterError(
            f"the folder {folder} has {total / 1e6:,.0f} MB, most of it in {', '.join(largest)}; expected at most "
            "100 MiB, packed; keep data elsewhere, on a path that the nodes have, or name it in a .rayignore file"
        )


def _size(entry: Path) -> int:
    """The bytes of a file, or of the files in a folder that would be sent."""
    if not entry.is_dir():
        return entry.stat().st_size if entry.exists() else 0
    return sum(_size(inner) for inner in entry.iterdir() if not (_is_left_out(inner) or inner.is_symlink()))


def _is_left_out(entry: Path) -> bool:
    return any(entry.match(pattern) for pattern in NOT_SENT)


def _job(found: JobDetails) -> Job:
    return Job(
        id=str(found.submission_id),
        status=cast(Status, str(found.status.value).lower()),
        message=found.message or "",
        exit_code=found.driver_exit_code,
        metadata=found.metadata or {},
        started=None if found.start_time is None else found.start_time / 1000,
        ended=None if found.end_time is None else found.end_time / 1000,
    )


def _blocking(pieces: AsyncIterator[str]) -> Iterator[str]:
    """Turn an asynchronous iterator into a plain one."""

    async def following() -> str | None:
        return await anext(pieces, None)

    with asyncio.Runner() as runner:
        while (piece := runner.run(following())) is not None:
            yield piece

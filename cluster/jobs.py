"""Jobs on a Ray cluster: a command of ours, submitted over HTTP to the head and run there, watched and stopped.

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
"""What of a folder stays here, beside what its ignore files name: environments, and what searches write."""

MOST_BYTES = 512 * 1024**2
"""A larger folder is not even packed. Ray's job server takes 100 MiB, packed: of that, Ray itself says so."""

CONNECT_S, ANSWER_S, POLL_S = 10, 60, 0.5
"""How long the head has to take a call and, each time, to say something; the latter with a folder of 100 MiB sent."""

STOP_WAIT_S = 60
"""What a stopped job has for putting its books in order; Ray's own 3 seconds are too few for an MLflow server."""

INSTALL_S = 900
"""What a node has for installing packages: as long as Ray by itself waits for a job to start."""

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
        """Whether it has ended, in whatever way."""
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
        with self._asking(), _without_overrides():
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
        """Runs a shell command on the head, and says so as soon as Ray has taken it.

        Args:
            folder: becomes the command's working folder, and that of its workers, without `NOT_SENT`.
            modules: folders of packages, which the command and its workers import before any installed one.
            environment: variables of the command and its workers; whoever may use the cluster can read them.
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
        with self._asking():
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
            held = ", ".join(job.id for job in self.all()) or "none"
            raise ClusterError(
                f"no job {id!r} on {self.address}; it has {held}; expected one of them; check the id and the address"
            )
        return _job(found)

    def all(self) -> list[Job]:
        """Every job submitted to the cluster since it was started, newest last."""
        with self._asking():
            found = [_job(one) for one in self._client.list_jobs() if one.submission_id is not None]
        return sorted(found, key=lambda job: job.started or 0.0)

    def logs(self, id: str) -> str:
        """What the job has written so far."""
        self.get(id)
        with self._asking():
            return str(self._client.get_job_logs(id))

    def follow(self, id: str) -> Iterator[str]:
        """What the job has written and writes, piece by piece, until it ends."""
        from aiohttp import ClientError

        told = 0
        self.get(id)
        while True:
            position = 0
            with suppress(RuntimeError, ClientError):  # as a proxy makes of what is silent for long
                for piece in _in_turn(self._client.tail_job_logs(id)):
                    if new := piece[max(0, told - position) :]:
                        yield new
                    position += len(piece)
                    told = max(told, position)
            if self.get(id).is_over:
                yield self.logs(id)[told:]
                return
            time.sleep(POLL_S)

    def stop(self, id: str, timeout_s: float = STOP_WAIT_S + 30) -> Job:
        """Asks the job to end by SIGTERM, and waits until it has; one that has ended stays as it is."""
        if not self.get(id).is_over:
            with self._asking():
                self._client.stop_job(id)
        return self.wait(id, timeout_s)

    def wait(self, id: str, timeout_s: float) -> Job:
        """The job, once it has ended.

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
        """What each living node has of Ray's resources."""
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        with self._asking(RayStateApiException), _without_overrides():
            found = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")], limit=NODES)
        return [dict(node.resources_total) for node in found]

    def may_grow(self) -> bool:
        """Whether nodes may come with demand: True where an autoscaler is at work, or where one cannot be ruled out.

        Ray tells this nowhere. Without an autoscaler its monitor gives every node a type of its own, `node_` and the
        node's id; the newer of Ray's two autoscalers writes nothing there at all.
        """
        with self._asking():
            answer = self._client._do_request("GET", "/api/cluster_status").json()
        report = ((answer.get("data") or {}).get("clusterStatus") or {}).get("autoscalerReport") or {}
        types = report.get("nodeTypeMapping")
        return not types or any(kind != f"node_{node}" for node, kind in types.items())

    def _details(self, id: str) -> JobDetails | None:
        """What Ray knows of a job, or None where it knows of none."""
        with self._asking():
            try:
                return self._client.get_job_info(id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    @contextmanager
    def _asking(self, kind: type[Exception] = OSError) -> Iterator[None]:
        """What Ray's client raises, and errors of this `kind`, as ours."""
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
    """Ray's client, which by itself would wait for ever for a head that is silent."""
    from ray.job_submission import JobSubmissionClient

    for noisy in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{noisy}").setLevel(logging.WARNING)  # now, since their import sets it, too

    class Impatient(JobSubmissionClient):  # its constructor asks, too
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options)

    return Impatient(address)


def _check_answer(address: str) -> None:
    """Makes sure that somebody listens there: Ray's own client would wait for minutes."""
    try:
        place = urlsplit(address)
        port = place.port or {"http": 80, "https": 443}[place.scheme]
        socket.create_connection((place.hostname or "", port), timeout=CONNECT_S).close()
    except (OSError, KeyError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster at {address!r}: {error}; expected the dashboard of a running head, such as "
            "http://127.0.0.1:8265; check the address, or make a tunnel to it"
        ) from error


@contextmanager
def _without_overrides() -> Iterator[None]:
    """Hides the variables by which Ray replaces an address, even one that was given in so many words."""
    kept = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _refusal(address: str, reason: str) -> str:
    """What to tell of an answer that is not the one that was asked for."""
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
    """Refuses a folder that could never be sent, before it is packed; one with an ignore file may have less to send."""
    if any((folder / name).is_file() for name in (".gitignore", ".rayignore")):
        return
    sizes = {entry.name: _bytes(entry) for entry in folder.iterdir() if not _stays(entry)}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise ClusterError(
            f"the folder {folder} has {total / 1e6:,.0f} MB, most of it in {', '.join(largest)}; expected at most "
            "100 MiB, packed; keep data elsewhere, on a path that the nodes have, or name it in a .rayignore file"
        )


def _bytes(entry: Path) -> int:
    """The size of a file, or of what a folder would send."""
    if not entry.is_dir():
        return entry.stat().st_size if entry.exists() else 0
    return sum(_bytes(inner) for inner in entry.iterdir() if not (_stays(inner) or inner.is_symlink()))


def _stays(entry: Path) -> bool:
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


def _in_turn(pieces: AsyncIterator[str]) -> Iterator[str]:
    """An asynchronous iterator as a plain one."""

    async def following() -> str | None:
        return await anext(pieces, None)

    with asyncio.Runner() as runner:
        while (piece := runner.run(following())) is not None:
            yield piece

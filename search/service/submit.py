"""Submit a search as a job of a Ray cluster, and refuse one that cannot run there at once, not in minute 40.

The job is the same `paredown search`, run on the head by the code that this process has imported. Ray logs all that a
job is given and shows it to every user of the cluster, so no secret goes along: the head has its own.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import cluster
import methods
import search
from cluster import ClusterError, Job, Jobs
from cluster.jobs import INSTALL_S
from search.base import SearchError, masked
from search.cache import digest
from search.record.store import sqlite_path
from search.service.metadata import DIGEST, NAME, RESUME_VARIABLE, STUDIES_VARIABLE, URI, URI_VARIABLE, search_of
from search.service.probe import PROBE_VARIABLE, REFUSAL_PREFIX, ProbeRequest
from search.spec import SearchSpec, load
from search.spec.reading import with_stores

log = logging.getLogger(__name__)

PROBE_S = 300
"""Seconds that the head has for its answer, besides the time to install packages."""


@dataclass(frozen=True)
class Stores:
    """The stores of results, as the head is to open them; it has to see the folders of this machine in `marked`."""

    uri: str
    studies: str
    marked: Sequence[Path]


def submit(
    jobs: Jobs,
    spec: Path,
    *,
    uri: str | None = None,
    studies: str | None = None,
    install: bool = False,
    again: str | None = None,
) -> Job:
    """Submit the search of a spec; a stopped one is resumed, as the record tells, just as by `paredown search`.

    The spec's folder goes along, without what its .gitignore and .rayignore name.

    Args:
        uri: an MLflow store instead of the spec's.
        studies: Optuna's storage instead of the spec's.
        install: has Ray install this project's locked requirements on every node.
        again: the way to resume the search once it is stopped; the same `paredown submit` unless given.

    Raises:
        SpecError: the spec is wrong.
        SearchError: it runs already, or the cluster cannot run it, or its stores or files cannot be had there.
        ClusterError: the cluster does not answer.
    """
    settings = with_stores(load(spec), uri, studies)
    file = spec.resolve()
    id, places = _id_and_stores(jobs, settings)
    packages = _locked_requirements() if install else ()
    environment = {URI_VARIABLE: places.uri, STUDIES_VARIABLE: places.studies, "COLUMNS": "120"}
    _probe_head(jobs, id, file, settings, places, environment=environment, packages=packages)
    again = again or _submit_command(spec, jobs.address, uri, studies, install=install)
    return jobs.submit(
        f'exec python -P -m search.cli search {shlex.quote(file.name)} --address "$RAY_ADDRESS"',
        id=id,
        folder=file.parent,
        modules=_package_folders(),
        environment=environment | {RESUME_VARIABLE: again},
        packages=packages,
        metadata={NAME: settings.name, DIGEST: digest(settings.decisive()), URI: places.uri},
    )


def _id_and_stores(jobs: Jobs, settings: SearchSpec) -> tuple[str, Stores]:
    """The id of a search's next job and its stores, after all checks that this machine can make."""
    check_secrets(settings.tracking.uri, settings.tracking.studies)
    number = _next_number(jobs, settings.name)
    _check_resources(jobs, settings)
    places = absolute_stores(settings)
    check_loopback(jobs.address, places)
    return f"{settings.name}-{number}", places


def _submit_command(spec: Path, address: str, uri: str | None, studies: str | None, *, install: bool) -> str:
    """The command line that submits the spec with the given options."""
    given = {"--address": address, "--uri": uri, "--studies": studies}
    options = [word for key, value in given.items() if value for word in (key, value)]
    return shlex.join(["paredown", "submit", str(spec), *options, *(["--install"] if install else [])])


def _next_number(jobs: Jobs, name: str) -> int:
    """The number of a search's next job.

    Raises:
        SearchError: it has one that has not ended.
    """
    of_it = [job for job in jobs.all() if search_of(job) == name]
    if running := [job for job in of_it if not job.is_over]:
        raise SearchError(
            f"search {name!r} is {running[-1].status} as job {running[-1].id}; expected one job at a time of a name, "
            "which all users of a cluster share; wait for it, stop it, or give the spec another name"
        )
    numbers = [int(found[1]) for job in of_it if (found := re.fullmatch(rf"{re.escape(name)}-(\d+)", job.id))]
    return max(numbers, default=0) + 1


def _check_resources(jobs: Jobs, settings: SearchSpec) -> None:
    """Refuse a search whose trials or devices need resources that no node has.

    Only trials can wait for nodes that come with demand, and only if the spec gives the number at once.
    """
    gpus, workers = settings.cluster.gpus_per_trial, settings.recovery.workers
    needed: dict[str, Mapping[str, float]] = {
        f"device {name!r}": device.resources for name, device in settings.devices.items() if device.resources
    }
    needed["a trial"] = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
    times = {"a trial": workers}
    nodes = jobs.nodes()
    lacking = [what for what, wanted in needed.items() if _times_available(nodes, wanted) < times.get(what, 1)]
    if not lacking:
        return
    each = f" for each of its {workers} workers" if workers > 1 else ""
    wants = ", ".join(
        f"{what} needs {_resource_text(needed[what])} of one node{each if what in times else ''}" for what in lacking
    )
    have = "; ".join(
        _resource_text({key: node[key] for key in node if not _is_on_every_node(key)}) or "nothing" for node in nodes
    )
    message = f"{wants}, but the nodes of {jobs.address} have {have}"
    if settings.cluster.max_parallel == "auto" or lacking != ["a trial"] or not jobs.may_grow():
        raise SearchError(
            f"{message}; expected nodes with all of it; add some, or correct the spec; where nodes for trials come "
            "with demand, give cluster.max_parallel as a number"
        )
    log.warning("%s; expected the cluster to grow when trials ask for more", message)


def _times_available(nodes: Sequence[Mapping[str, float]], wanted: Mapping[str, float]) -> int:
    """The number of times that the nodes hold the wanted resources, each time on one node."""
    return sum(min(math.floor(node.get(key, 0) / amount) for key, amount in wanted.items()) for node in nodes)


def _resource_text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _is_on_every_node(resource: str) -> bool:
    """Whether Ray gives the resource to every node."""
    return ":" in resource or resource in ("memory", "object_store_memory")


def absolute_stores(settings: SearchSpec) -> Stores:
    """The spec's stores by absolute paths; relative ones start at this process's folder."""
    uri, studies, marked = settings.tracking.uri, settings.tracking.studies, list[Path]()
    path = sqlite_path(uri)
    if path is not None and not path.is_absolute():
        uri = f"sqlite:///{path.resolve()}"
        marked.append(path.resolve().parent)
    if (path := sqlite_path(studies)) is not None and not path.is_absolute():
        studies = f"sqlite:///{path.resolve()}"
        marked.append(path.resolve().parent)
    elif "://" not in studies and not Path(studies).is_absolute():
        studies = str(Path(studies).resolve())
        marked.append(Path(studies).parent)
    return Stores(uri, studies, marked)


def check_secrets(uri: str, studies: str) -> None:
    """Refuse stores whose addresses hold a password.

    Raises:
        SearchError: one does.
    """
    for key, place in (("tracking.uri", uri), ("tracking.studies", studies)):
        if masked(place) != place:
            raise SearchError(
                f"{key} is {masked(place)}: Ray would log its password on every node; expected that in the environment "
                "of `ray start` on the head, such as MLFLOW_TRACKING_USERNAME with MLFLOW_TRACKING_PASSWORD, or as "
                "PGPASSWORD; set it there, and leave it out here"
            )


def check_loopback(address: str, places: Stores) -> None:
    """Refuse servers on this machine's loopback if the head, by its address, is another machine."""
    if _is_this_machine(urlsplit(address).hostname or ""):
        return  # or the end of a tunnel: then the head itself says what it can reach
    for key, place in (("tracking.uri", places.uri), ("tracking.studies", places.studies)):
        if "://" in place and _is_loopback(urlsplit(place).hostname or ""):
            raise SearchError(
                f"{key} is {place}, which is this machine's own, but the head is {address}; expected a server "
                "that the head can reach; give its address there"
            )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _is_this_machine(host: str) -> bool:
    """Whether a socket of this process can have that address."""
    try:
        family, kind, *_, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as here:
            here.bind(place)
    except OSError:
        return False
    return True


def _locked_requirements() -> list[str]:
    """The locked requirements of this project.

    Raises:
        SearchError: they are not beside it.
    """
    path = Path(methods.__file__).parent.parent / "requirements.lock"
    if not path.is_file():
        raise SearchError(
            f"--install needs {path}, which an installed package does not have; expected a checkout; install the "
            "packages on the nodes, as in their image, and leave --install out"
        )
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def _package_folders() -> list[Path]:
    """The folders of our packages, as this process has imported them."""
    return [Path(str(package.__file__)).resolve().parent for package in (cluster, search, methods)]


def _named_paths(settings: SearchSpec) -> list[str]:
    """The files and folders that the spec names, without relative ones that do not exist."""
    other = settings.recovery.data
    places = [settings.model.weights, settings.data.root, other.root if other else None]
    places += [device.file for device in settings.devices.values()]
    functions = [settings.model.name, settings.data.name, other.name if other else None, settings.metric.function]
    places += [name.rpartition(":")[0] for name in functions if name and ".py:" in name]
    known = {place for place in places if place}
    return sorted(place for place in known if place[0] in "/~" or Path(settings.folder, place).exists())


def _probe_head(
    jobs: Jobs,
    id: str,
    file: Path,
    settings: SearchSpec,
    places: Stores,
    *,
    environment: Mapping[str, str],
    packages: Sequence[str],
) -> None:
    """Make the head open the stores and look for the spec's files, by a job of its own before the one of that `id`.

    Ray keeps it in its list, where it is no search: one that is deleted as soon as it has ended comes back as failed.

    Raises:
        SearchError: something is wrong; the message is the head's.
    """
    check = f"check-{id}-{secrets.token_hex(4)}"
    with ExitStack() as marks:
        markers = [marks.enter_context(marker_file(folder)) for folder in places.marked]
        sought = ProbeRequest(settings.name, markers, _named_paths(settings))
        patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
        jobs.submit(
            "exec python -P -m search.service.probe",
            id=check,
            folder=file.parent,
            modules=_package_folders(),
            environment={**environment, **patience, PROBE_VARIABLE: sought.to_text()},
            packages=packages,
        )
        try:
            job = jobs.wait(check, PROBE_S + (INSTALL_S if packages else 0))
        except BaseException:
            with suppress(ClusterError):  # the first error is the one to report
                jobs.stop(check)
            raise
        if job.status != "succeeded":
            raise SearchError(_probe_refusal(job, jobs.logs(check)))


def _probe_refusal(job: Job, log_text: str) -> str:
    """The head's reason against the search; if it gave none, the last line that it printed."""
    lines = [line for line in log_text.splitlines() if line.strip() and not line.startswith("Running entrypoint")]
    reason = "\n".join(lines).partition(REFUSAL_PREFIX)[2]
    if reason:
        return f"on the cluster's head: {reason}"
    last = job.reason if job.exit_code is None or not lines else lines[-1]
    return (
        f"the head cannot run Paredown: {masked(last)}; expected its `python` to have this project's requirements; "
        "start Ray with that environment's bin folder first on PATH, or submit with --install"
    )


@contextmanager
def marker_file(folder: Path) -> Iterator[str]:
    """Put a file into a folder of this machine for a while: a head that sees the file sees the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".paredown.{secrets.token_hex(8)}"
    path.touch()
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)

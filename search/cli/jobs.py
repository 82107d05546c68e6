"""The commands for searches as jobs of a cluster: `paredown submit`, `status`, `logs`, `stop` and `list`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.base import FAILED, NOTHING_FITS
from search.cli.options import OtherStore, OtherStudies
from search.cli.output import fail, print_json

if TYPE_CHECKING:
    from cluster import Job
    from search.record.progress import Progress
    from search.results import BudgetResult
    from search.units import Scale

JobId = Annotated[str, typer.Argument(help="The job, as submit and list name it.", show_default=False)]
Dashboard = Annotated[str, typer.Option(help="The dashboard of the cluster's head.", envvar="RAY_API_SERVER_ADDRESS")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LOCAL_DASHBOARD = "http://127.0.0.1:8265"


def add(app: typer.Typer) -> None:
    """Add these commands to the app."""
    for command in (submit, status, logs, stop):
        app.command()(command)
    app.command("list")(show_all)


def submit(
    spec: Annotated[Path, typer.Argument(help="The spec file (YAML); its folder goes along.", show_default=False)],
    address: Dashboard = LOCAL_DASHBOARD,
    uri: OtherStore = None,
    studies: OtherStudies = None,
    install: Annotated[bool, typer.Option("--install", help="Have Ray install the locked requirements.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a search as a job on a cluster. The same command resumes one that was stopped."""
    from search.spec import load

    load(spec)  # a mistake is told at once, not after the imports
    from cluster import Jobs

    jobs = Jobs(address)  # nobody there is told before the imports too
    from search.service.submit import submit as run

    job = run(jobs, spec, uri=uri, studies=studies, install=install)
    if as_json:
        print_json(_job_json(job))
        return
    at = "" if address == LOCAL_DASHBOARD else f" --address {address}"
    print(f"submitted {job.id}")
    for command, does in {"status": "how far it is", "logs -f": "what it says", "stop": "stop it"}.items():
        print(f"  paredown {command} {job.id}{at}    {does}")


def status(id: JobId, address: Dashboard = LOCAL_DASHBOARD, uri: OtherStore = None, as_json: AsJson = False) -> None:
    """Say how far a job's search is, and the best model of each budget so far where its store can be reached."""
    from cluster import Jobs

    job = Jobs(address).get(id)
    found = _find_progress(job, uri)
    if as_json:
        far = {"progress": None, "reason": found} if isinstance(found, str) else {"progress": found.to_json()}
        print_json(_job_json(job) | far)
        return
    print(f"{job.id}: {_state_text(job)}")
    if isinstance(found, str):
        print(f"  how far: {found}")
        return
    print(f"  {found.phase}: {found.trials} of {found.expected} trials, {found.stopped} stopped early")
    for budget, best in found.best.items():
        print(f"  {budget}: {'nothing fits yet' if best is None else _winner_text(best, found.metric)}")


def logs(
    id: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    address: Dashboard = LOCAL_DASHBOARD,
) -> None:
    """Print what a job has written. With -f, Ctrl-C ends the printing, not the job."""
    from cluster import Jobs

    jobs = Jobs(address)
    if not follow:
        print(jobs.logs(id), end="")
        return
    try:
        for piece in jobs.follow(id):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        typer.echo(f"\n{id} goes on; paredown stop {id} ends it", err=True)
        return
    job = jobs.get(id)
    if job.status != "succeeded":
        fail(f"{id} has {_state_text(job)}", NOTHING_FITS if job.exit_code == NOTHING_FITS else FAILED)


def stop(id: JobId, address: Dashboard = LOCAL_DASHBOARD, as_json: AsJson = False) -> None:
    """Stop a job; every finished trial is kept, and submitting its spec again goes on."""
    from cluster import Jobs

    jobs = Jobs(address)
    was_over = jobs.get(id).is_over
    job = jobs.stop(id)
    if as_json:
        print_json(_job_json(job))
    elif was_over:
        print(f"{id} had {_state_text(job)}")
    else:
        print(f"{id} is stopped; every finished trial is kept. To go on, submit its spec again.")


def show_all(address: Dashboard = LOCAL_DASHBOARD, as_json: AsJson = False) -> None:
    """List the cluster's searches, the newest last."""
    from cluster import Jobs
    from search.service.metadata import search_of

    found = [job for job in Jobs(address).all() if search_of(job) is not None]
    if as_json:
        print_json([_job_json(job) for job in found])
        return
    for job in found:
        begun = "" if job.started is None else f"{datetime.fromtimestamp(job.started):%Y-%m-%d %H:%M}"
        print(f"{job.id:<24} {job.status:<10} {begun:<17} {search_of(job)}")


def _job_json(job: Job) -> dict[str, Any]:
    """Return the job as JSON-ready values."""
    return asdict(job) | {"metadata": dict(job.metadata)}


def _state_text(job: Job) -> str:
    """Return the job's state in a few words."""
    if job.status == "failed" and job.exit_code == NOTHING_FITS:
        return "ended: no feasible model for some budget"
    return f"failed: {job.reason.partition(', last available logs')[0]}" if job.status == "failed" else job.status


def _winner_text(best: BudgetResult, metric: Scale) -> str:
    winner = best.to_json()["winner"]
    return f"{winner['method']}, validation {metric.told(winner['top1_validation'])}, {winner['macs']:,} MACs"


def _find_progress(job: Job, uri: str | None) -> Progress | str:
    """Return the progress of the job's search by its record, or the reason why it is not known here."""
    from cluster.reach import answers
    from search.base import TrackingError
    from search.record.progress import progress
    from search.record.store import sqlite_path
    from search.service.metadata import URI, search_of

    name, place = search_of(job), uri or job.metadata.get(URI, "")
    if name is None:
        return "this job is no search"
    if (path := sqlite_path(place)) is not None and not path.is_file():
        return f"its store {place} is a file of the head's; ask there, or give the search an MLflow server"
    if not answers(place):
        return f"its store {place} does not answer from here"
    try:
        return progress(place, name)
    except TrackingError as error:
        return str(error) if job.is_over else f"nothing is on record yet: {error}"

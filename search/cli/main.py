"""The command `paredown`. Exit codes: 0 done, 1 failed, 2 wrong input, 3 done, but nothing fits some budget.

A command reads its spec first and imports what works on it afterwards: that takes seconds, a mistake is told at once.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from search.base import DEFAULT_STORE, FAILED, NOTHING_FITS, WRONG_INPUT, one_line
from search.cli import init, jobs, serve
from search.cli.options import AsJson, OtherStore, OtherStudies, RayAddress, SearchName, SpecFile, Store
from search.cli.output import (
    degrade_output,
    exit_code,
    fail,
    log_handler,
    open_closed_streams,
    place_in_user_code,
    print_json,
    reason_for,
    settle_output,
)
from search.service.metadata import RESUME_VARIABLE

if TYPE_CHECKING:
    from cluster import Cluster, RayCluster
    from search.results import SearchResult
    from search.spec import SearchSpec
    from search.workload import Workload

app = typer.Typer(
    help="One trained vision network in; for every device you name, the best smaller network that fits it, out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def check(
    spec: SpecFile,
    explain: Annotated[
        bool, typer.Option("--explain", help="List for every layer which method may change it, and why not.")
    ] = False,
    address: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Say what each method can do for each budget, without training a student.

    If recovery.steps is 0, this builds the student of each method's first plan, and says what it keeps of top-1.
    """
    from search.spec import load

    settings = load(spec)
    _check_cluster(address or settings.cluster.address)
    from search.cli import console
    from search.driver.preflight import preflight

    with console.bars(hidden=as_json) as report:
        found = preflight(settings, lambda made: _inline_or_ray(made, settings, address), report, explain=explain)
    print_json(found.to_json()) if as_json else console.show_preflight(found)
    unreachable = [budget.budget for budget in found.budgets if not budget.is_reachable]
    if unreachable:
        fail(f"no method reaches {', '.join(unreachable)}; raise the limits to what is reachable", NOTHING_FITS)


@app.command()
def search(
    spec: SpecFile,
    address: RayAddress = None,
    fork: Annotated[
        str | None, typer.Option(help="Run it as a search of this name, beside one on record with another spec.")
    ] = None,
    uri: OtherStore = None,
    studies: OtherStudies = None,
    as_json: AsJson = False,
) -> None:
    """Search every budget, record it in MLflow and register the winners. The same command resumes a stopped search."""
    from search.base import masked
    from search.spec import load
    from search.spec.reading import renamed, with_stores

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends the search as Ctrl-C does
    resubmit = os.environ.get(RESUME_VARIABLE)  # in a job: the command that submitted it, and resumes it
    settings = with_stores(load(spec), uri, studies)
    if fork is not None:
        settings = renamed(settings, fork)
    _check_cluster(address or settings.cluster.address)
    from search.cli import console
    from search.driver import loop

    try:
        with console.bars(hidden=as_json) as report:
            result = loop.search(settings, lambda made: _ray_cluster(made, settings, address), report)
    except KeyboardInterrupt:
        given = {"--address": address, "--fork": fork, "--uri": uri, "--studies": studies}
        options = [word for key, value in given.items() if value for word in (key, masked(value))]
        again = resubmit or shlex.join(["paredown", "search", str(spec), *options, *(["--json"] if as_json else [])])
        typer.echo(f"stopped; every finished trial is kept. To go on:  {again}", err=True)
        raise typer.Exit(FAILED) from None
    if as_json:
        print_json(result.to_json())
    else:
        console.show_result(result, None if resubmit else loop.report_path(settings))
    _fail_without_winners(result)


def _ray_cluster(workload: Workload, settings: SearchSpec, address: str | None) -> RayCluster:
    """Start workers on Ray, and take SIGTERM back from it: a polite kill must still close the record."""
    from cluster import RayCluster
    from methods.pipeline import trial
    from search.workload.usercode import user_modules

    found = RayCluster(
        workload.worker_inputs(),
        address=address or settings.cluster.address,
        max_parallel=settings.cluster.max_parallel,
        gpus_per_worker=settings.cluster.gpus_per_trial,
        stall_s=settings.cluster.stall_timeout,
        shared={trial: settings.recovery.workers},
        by_value=user_modules(),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return found


def _check_cluster(address: str) -> None:
    """Refuse a cluster that nobody answers for, before a teacher is trained, a search is taken or a model is read."""
    from cluster.reach import check_cluster

    check_cluster(address)


def _inline_or_ray(workload: Workload, settings: SearchSpec, address: str | None) -> Cluster:
    """Use this process alone, unless an address is given, a device is another node's, or several workers recover."""
    from cluster import InlineCluster

    is_elsewhere = any(device.resources for device in settings.devices.values()) or settings.recovery.workers > 1
    return (
        _ray_cluster(workload, settings, address)
        if address or is_elsewhere
        else InlineCluster(workload.worker_inputs())
    )


@app.command()
def frontier(
    name: SearchName,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write the HTML report to this file.")] = None,
    uri: Store = DEFAULT_STORE,
) -> None:
    """Show a search's frontier and winners, as recorded in MLflow."""
    from search.cli import console
    from search.record.searches import find_search

    result = find_search(uri, name).read.result()
    if html is not None:
        from search.report.html import html as page

        html.write_text(page(result), encoding="utf-8")
    if as_json:
        print_json(result.to_json())
    else:
        console.show_result(result, html)
    _fail_without_winners(result)


@app.command()
def compress(
    spec: SpecFile,
    method: Annotated[str, typer.Option(help="A method, uniform, or a chain such as practise+alds.")],
    budget: Annotated[str, typer.Option(help="The name of one of the spec's budgets.")],
    out: Annotated[Path, typer.Option(help="The folder to write the compressed model to.")],
    knob: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, for a knob that is not to have its default.")
    ] = None,
    address: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Compress once: one method or chain, one budget, no search. Knobs have their defaults unless told otherwise."""
    from search.spec import load

    settings, values = load(spec), _parse_knobs(knob or [])
    _check_cluster(address or settings.cluster.address)
    from search.cli import console
    from search.driver.compress import compress as run

    with console.bars(hidden=as_json) as report:
        figures = run(
            settings,
            lambda made: _inline_or_ray(made, settings, address),
            method="+".join(re.findall(r"[\w-]+", method)),
            budget=budget,
            out=out,
            report=report,
            knobs=values,
        )
    print_json(figures) if as_json else console.show_figures(figures)
    if figures["exceeded"]:
        fail(f"the model is over its limits of {', '.join(figures['exceeded'])}", NOTHING_FITS)


@app.command()
def promote(
    name: SearchName,
    budget: Annotated[str, typer.Argument(help="The budget whose winner is meant.", show_default=False)],
    alias: Annotated[str, typer.Option(help="The alias to point at it.")] = "production",
    uri: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Point an alias of the registered model at the winner of a budget."""
    from search.driver.winners import promote as run

    found = run(uri, name, budget, alias)
    if as_json:
        print_json(found)
    else:
        before = found["previous_version"]
        was = f", which was version {before}" if before else ""
        print(f"{found['model']}@{found['alias']}{was}, is version {found['version']}: {found['model_uri']}")


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="NAME@BUDGET, NAME@ALIAS or NAME/VERSION of a registered model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder to write the files to, new or empty.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over the files of an export there.")] = False,
    uri: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Write a winner as files to ship: model.pt2, model.onnx, and a model card as README.md and card.json."""
    from search.shipping.ship import ship

    found = ship(uri, model, out, overwrite=overwrite)
    if as_json:
        print_json(found)
    else:
        parity = found["parity"]
        told = f"outputs differ by {parity['deviation']:.1e} of the largest at most" if parity else "there is no ONNX"
        print(f"{found['model']}, version {found['version']}, is in {out}: {', '.join(found['files'])}; {told}")


@app.command()
def measure(
    model: Annotated[
        str, typer.Argument(help="A .pt2 or .onnx file, a folder of paredown compress, or models:/NAME@ALIAS.")
    ],
    device: Annotated[str, typer.Option(help="A device of the spec, the one it was searched for, or cpu-N.")],
    spec: Annotated[Path | None, typer.Option(help="The spec that names the device.")] = None,
    address: RayAddress = None,
    uri: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of a saved model the way a search does."""
    from search.spec import load

    settings = None if spec is None else load(spec)
    _check_cluster(address or "auto")
    from search.cli import console
    from search.devices.measure import measure as run

    found = run(model, device, spec=settings, address=address, uri=uri)
    print_json(found) if as_json else console.show_measured(found)


init.add(app)
jobs.add(app)
serve.add(app)


def _parse_knobs(given: list[str]) -> dict[str, str]:
    """Read each NAME=VALUE."""
    from search.base import SpecError

    wrong = [pair for pair in given if not re.fullmatch(r"[^=]+=[^=]+", pair)]
    if wrong:
        raise SpecError(f"--knob is {wrong[0]!r}; expected NAME=VALUE, such as measure=rss; correct it")
    names = [pair.split("=")[0] for pair in given]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"--knob gives {min(twice)!r} twice; expected each knob once; keep one of them")
    return dict(pair.split("=") for pair in given)


def _fail_without_winners(result: SearchResult) -> None:
    """Exit if a budget has no winner: with 1 and the first error if every trial failed, else with 3."""
    empty = [budget.name for budget in result.budgets if budget.winner is None]
    if empty and result.candidates and all(one.state == "failed" for one in result.candidates):
        error = (result.candidates[0].error or "no reason on record").partition("\n")[0]
        fail(
            f"all {len(result.candidates)} trials failed, the first with {error}; expected compressed networks; "
            "see the trials' runs in MLflow for where it happened",
            FAILED,
        )
    if empty:
        typer.echo(
            f"no feasible model for {', '.join(empty)}; paredown check says what each method can reach", err=True
        )
        raise typer.Exit(NOTHING_FITS)


def main() -> NoReturn:
    """Run the command line; an error that a user can mend ends it in one paragraph and no traceback."""
    open_closed_streams()
    degrade_output()
    logging.basicConfig(level=logging.WARNING, handlers=[log_handler()])
    try:
        _run()
    finally:
        settle_output()


def _run() -> NoReturn:
    try:
        app(prog_name="paredown")
    except Exception as error:
        if (code := exit_code(error)) is not None:
            fail(reason_for(error), code)
        _blame_user_code(error)
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        _blame_user_code(error)
        raise  # an exit of ours
    raise SystemExit(0)


def _blame_user_code(error: BaseException) -> None:
    """End the command if an error, or an exit, comes from the user's own code."""
    if place := place_in_user_code(error):
        fail(
            f"your code at {place} raised {type(error).__name__}: {one_line(error)}; expected it to return; run it by "
            "itself to mend it",
            WRONG_INPUT,
        )

"""The command `paredown`: thin words around the library. Exit codes: 0 done, 1 failed, 2 wrong input, 3 nothing fits."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from search.workload import Workload

FAILED, WRONG_INPUT, NOTHING_FITS = 1, 2, 3

app = typer.Typer(
    help="One trained vision network in; for every device you name, the best smaller network that fits it, out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Spec = Annotated[Path, typer.Argument(help="The spec file (YAML).", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; without it the spec decides.")]


@app.command()
def check(spec: Spec, as_json: AsJson = False) -> None:
    """Say what each method can do for each budget, without training anything."""
    from cluster import InlineCluster
    from search import console
    from search.preflight import preflight
    from search.spec import load

    settings = load(spec)
    with console.bars(hidden=as_json) as report:
        found = preflight(settings, InlineCluster, report)
    print(json.dumps(found.to_json(), indent=2)) if as_json else console.show_preflight(found)
    if not all(budget.is_reachable for budget in found.budgets):
        raise typer.Exit(NOTHING_FITS)


@app.command()
def search(spec: Spec, address: Address = None, as_json: AsJson = False) -> None:
    """Search every budget, record it in MLflow and register the winners. The same command resumes a stopped search."""
    from cluster import RayCluster
    from search import console, loop
    from search.spec import load
    from search.workload import user_modules

    settings = load(spec)

    def workers(workload: Workload) -> RayCluster:
        return RayCluster(
            workload.bench(),
            address=address or settings.cluster.address,
            max_parallel=settings.cluster.max_parallel,
            gpus_per_worker=settings.cluster.gpus_per_trial,
            by_value=user_modules(settings.folder),
        )

    with console.bars(hidden=as_json) as report:
        result = loop.search(settings, workers, report)
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        console.show_result(result, loop.report_path(settings))
    _end(result.to_json()["budgets"])


@app.command()
def frontier(
    name: Annotated[str, typer.Argument(help="The search's name.", show_default=False)],
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write the HTML report to this file.")] = None,
    uri: Annotated[str, typer.Option(help="The MLflow store.")] = "sqlite:///paredown.db",
) -> None:
    """Show a search's frontier and winners, as recorded in MLflow."""
    from search import console, report
    from search.tracking import find_search

    result = find_search(uri, name).result()
    if html is not None:
        html.write_text(report.html(result))
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        console.show_result(result, html)
    _end(result.to_json()["budgets"])


@app.command()
def compress(
    spec: Spec,
    method: Annotated[str, typer.Option(help="One of the methods, or uniform.")],
    budget: Annotated[str, typer.Option(help="The name of one of the spec's budgets.")],
    out: Annotated[Path, typer.Option(help="The folder to write the compressed model to.")],
    as_json: AsJson = False,
) -> None:
    """Compress once: one method at its defaults, one budget, no search."""
    from cluster import InlineCluster
    from search import console
    from search.compress import compress as run
    from search.spec import load

    settings = load(spec)
    with console.bars(hidden=as_json) as report:
        figures = run(settings, InlineCluster, method=method, budget=budget, out=out, report=report)
    print(json.dumps(figures, indent=2)) if as_json else console.show_figures(figures)


def _end(budgets: list[dict[str, Any]]) -> None:
    """Exits with 3 where a budget has no winner, naming it."""
    empty = [budget["name"] for budget in budgets if budget["winner"] is None]
    if empty:
        typer.echo(
            f"no feasible model for {', '.join(empty)}; paredown check says what each method can reach", err=True
        )
        raise typer.Exit(NOTHING_FITS)


def main() -> NoReturn:
    """Runs the command line; errors a user can mend end in one paragraph and no traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _refuse_foreign_modules()
    from cluster import ClusterError
    from methods.base import Infeasible, MethodError
    from search.base import SearchError

    try:
        app(standalone_mode=True)
    except Infeasible as error:
        _stop(str(error), NOTHING_FITS)
    except (SearchError, ClusterError, MethodError) as error:
        _stop(str(error), WRONG_INPUT)
    except PermissionError as error:
        _stop(
            f"cannot write {error.filename}: {error.strerror}; expected a writable folder; choose another", WRONG_INPUT
        )
    raise SystemExit(0)


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"paredown: {message}", err=True)
    raise SystemExit(code)


def _refuse_foreign_modules() -> None:
    """Our packages have common names: stops where one of them is somebody else's."""
    import cluster
    import methods

    home = Path(__file__).resolve().parent.parent
    for module in (cluster, methods):
        found = Path(str(module.__file__)).resolve().parent.parent
        if found != home:
            _stop(
                f"the module {module.__name__!r} comes from {found}, not from Paredown in {home}; expected ours; "
                "rename that file, or run from another folder",
                WRONG_INPUT,
            )


if __name__ == "__main__":
    sys.exit(main())

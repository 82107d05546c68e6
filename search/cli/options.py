"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.service.metadata import STUDIES_VARIABLE, URI_VARIABLE

SpecFile = Annotated[Path, typer.Argument(help="The spec file (YAML).", show_default=False)]
SearchName = Annotated[str, typer.Argument(help="The search's name.", show_default=False)]
RayAddress = Annotated[str | None, typer.Option(help="A running Ray cluster; without it the spec decides.")]
Store = Annotated[str, typer.Option(help="The MLflow store.", envvar=URI_VARIABLE)]
OtherStore = Annotated[str | None, typer.Option(help="An MLflow store instead of the spec's.", envvar=URI_VARIABLE)]
OtherStudies = Annotated[
    str | None,
    typer.Option(help="Optuna's journal file or database instead of the spec's.", envvar=STUDIES_VARIABLE),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")]

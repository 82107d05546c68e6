"""Read a spec file once, as a `SearchSpec`, and report all its mistakes at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from search.base import SpecError, printable
from search.spec.checks import check_store
from search.spec.contradictions import contradictions
from search.spec.documents import quoted, read, suggestion
from search.spec.schema import (
    EVERY_METHOD,
    NAME,
    BudgetSpec,
    ClusterSpec,
    DataSpec,
    DeviceSpec,
    MetricSpec,
    ModelSpec,
    RecoverySpec,
    SearchSettings,
    SearchSpec,
    TaskSpec,
    TrackingSpec,
)

LONGEST, MOST_SHOWN = 1_000_000, 50
"""The characters of a spec, and the mistakes that are listed of one."""


def load(path: Path) -> SearchSpec:
    """Read the spec in the file at `path`.

    Raises:
        SpecError: the file cannot be read or is wrong; every mistake is listed, with the nearest valid key.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the spec {path}: {error}; expected a YAML file; check the path") from error
    if len(text) > LONGEST:
        raise SpecError(f"the spec {path} has over {LONGEST:,} characters; expected a YAML file; check the path")
    return parse(text, folder=path.resolve().parent)


def parse(text: str, *, folder: Path) -> SearchSpec:
    """Read the spec in `text`, whose relative files lie in `folder`. Raises as `load` does."""
    try:
        raw, mistakes = read(text)
    except yaml.YAMLError as error:
        raise SpecError(printable(f"the spec is not valid YAML: {error}")) from error
    if not isinstance(raw, dict):
        raise SpecError(f"the spec is {type(raw).__name__}; expected keys such as name, model, data and budgets")
    mistakes += [f"unknown key {key!r}; it is set from outside" for key in ("text", "folder") if key in raw]
    spec = None
    try:
        spec = SearchSpec.model_validate({**raw, "text": text, "folder": str(folder)})
    except ValidationError as error:
        mistakes += [_describe_mistake(mistake) for mistake in error.errors()]
    mistakes += contradictions(raw, EVERY_METHOD)
    if mistakes or spec is None:
        raise SpecError(f"{_mistake_count(mistakes)} in the spec:\n{_listed(mistakes)}")
    return spec


def _listed(mistakes: list[str]) -> str:
    """The mistakes as a list that a terminal can be shown, the first `MOST_SHOWN` of them."""
    lines = [f"  - {printable(mistake)}" for mistake in mistakes[:MOST_SHOWN]]
    return "\n".join(lines + [f"  - and {len(mistakes) - MOST_SHOWN:,} more"] * (len(mistakes) > MOST_SHOWN))


def renamed(spec: SearchSpec, name: str) -> SearchSpec:
    """The same spec under another name.

    Raises:
        SpecError: it is no name.
    """
    if not re.fullmatch(NAME, name):
        raise SpecError(
            f"--fork is {quoted(name)}; expected up to 100 letters, digits, '-' and '_', such as digits-2; correct it"
        )
    return spec.model_copy(update={"name": name})


def with_stores(spec: SearchSpec, uri: str | None, studies: str | None) -> SearchSpec:
    """The same spec with another MLflow store or another storage of studies; None keeps the spec's own.

    Raises:
        SpecError: one is no place of a store.
    """
    given = {key: value for key, value in {"uri": uri, "studies": studies}.items() if value is not None}
    for key, value in given.items():
        try:
            check_store(value)
        except ValueError as error:
            raise SpecError(f"--{key}: {error}") from error
    return spec.model_copy(update={"tracking": spec.tracking.model_copy(update=given)})


def _mistake_count(mistakes: list[str]) -> str:
    return "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"


def _describe_mistake(mistake: Any) -> str:
    """Turn one of pydantic's errors into a sentence with the place, the mistake and the expectation."""
    place = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        parent, key = mistake["loc"][:-1], str(mistake["loc"][-1])
        return f"{place}: unknown key{suggestion(key, _valid_keys(parent))}"
    if mistake["type"] == "missing":
        return f"{place}: missing; it has to be given"
    reason = str(mistake["msg"]).removeprefix("Value error, ")
    given = "" if mistake["type"] == "value_error" else f", but it is {quoted(mistake['input'])}"
    return f"{place}: {reason}{given}"


def _valid_keys(parent: Iterable[object]) -> list[str]:
    """The valid keys at a place in the spec."""
    sections: dict[str, type[BaseModel]] = {
        "model": ModelSpec, "data": DataSpec, "metric": MetricSpec, "task": TaskSpec, "devices": DeviceSpec,
        "budgets": BudgetSpec, "search": SearchSettings, "recovery": RecoverySpec, "cluster": ClusterSpec,
        "tracking": TrackingSpec,
    }  # fmt: skip
    section = next((str(part) for part in reversed(list(parent)) if str(part) in sections), None)
    fields = (sections[section] if section else SearchSpec).model_fields
    return [key for key in fields if key not in ("text", "folder")]

"""Admit the specs that name nothing but code and files that the operator of the HTTP service allowed.

A caller over HTTP need not be trusted as far as a user of the command: a factory is code, a path is a file of this
machine, and YAML can be a bomb. The judged spec is also the one that runs: it is written out anew from the parsed one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from search.base import SpecError
from search.service.guard import Refused
from search.spec import SearchSpec, parse
from search.spec.documents import read
from search.spec.schema import WEIGHT_FILES, DataSpec

JSON = ("application/json",)
YAML = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")
SOURCES = ("zoo", "torchvision")
"""The values of `model.source` that are allowed unless the operator names others."""

DEEPEST = 16
MOST_EVENTS = 20_000
LONGEST_SCALAR = 1000
MOST = {
    "trials": 1000, "explore": 10, "timeout": 7 * 24 * 3600, "steps": 1_000_000, "batch_size": 8192,
    "images": 10_000_000,
    "workers": 64, "max_parallel": 1024, "gpus_per_trial": 64, "stall_timeout": 24 * 3600, "threads": 256,
    "batch": 1024, "channels": 1024, "size": 1024, "resize": 1024, "crop": 1024, "calibration": 65_536,
}  # fmt: skip
"""The most that a spec may ask for, by key; a user of the command may ask for more."""
MOST_BUDGETS, MOST_ARGUMENT = 20, 100_000
FACTORY = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


@dataclass(frozen=True)
class AdmissionRules:
    """The names that a spec may use: sources and factories in `allowed`, and files inside `root`, if that is given.

    Raises:
        SpecError: something allowed is neither a source nor `pkg.mod:fn`, or the root is no folder.
    """

    allowed: tuple[str, ...] = SOURCES
    root: Path | None = None

    def __post_init__(self) -> None:
        for name in self.allowed:
            if name not in SOURCES and not re.fullmatch(FACTORY, name, re.ASCII):
                raise SpecError(
                    f"--allow is {name!r}; expected {', '.join(SOURCES)} or a factory by its whole name, pkg.mod:fn; "
                    "correct it"
                )
        if self.root is not None and not self.root.is_dir():
            raise SpecError(f"--root is {str(self.root)!r}; expected a folder; create it, or name another")


def admit(body: bytes, media: str, rules: AdmissionRules) -> SearchSpec:
    """Read and judge the spec in a request's body; its `text` is the document to run.

    Raises:
        Refused: 415 if the body is neither YAML nor JSON, 400 if it cannot be read, 422 if it is no spec, 403 if it
            uses a name that is not allowed; all mistakes of a kind are reported at once.
    """
    raw = _read_mapping(_decode_body(body, media))
    spec = _parse_spec(raw)
    refusals = [*_code_refusals(spec, rules.allowed), *_operator_refusals(raw), *_size_refusals(spec)]
    paths = _named_paths(spec)
    for place, path in paths.items():
        try:
            _set_at(raw, place, str(_resolve_inside(path, rules.root)))
        except ValueError as error:
            refusals.append(f"{place} is {path!r}: {error}")
    if refusals:
        raise Refused(403, "; ".join(refusals) + "; leave it out, or ask the operator of this service to allow it")
    return _parse_spec(raw)


def _decode_body(body: bytes, media: str) -> str:
    """Decode the body as one YAML document."""
    kind = media.partition(";")[0].strip().lower()
    if kind not in (*JSON, *YAML):
        raise Refused(
            415, f"the content type is {media[:100]!r}; expected {YAML[0]} or {JSON[0]}; set the header Content-Type"
        )
    try:
        text = body.decode()
        if kind in YAML:
            return text
        return _to_yaml(json.loads(text, object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant))
    except UnicodeDecodeError as error:
        raise Refused(400, f"byte {error.start} is no UTF-8; expected a spec as UTF-8 text; encode it so") from error
    except (ValueError, RecursionError) as error:
        raise Refused(
            400, f"the body is not valid JSON: {error}; expected one object, with each key once; correct it"
        ) from error


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} given twice")
    return found


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _to_yaml(document: object) -> str:
    return yaml.safe_dump(document, sort_keys=False)


def _read_mapping(text: str) -> dict[Any, Any]:
    """Read the mapping in a YAML text, unless it would be larger, when read, than it looks."""
    try:
        _check_plain(text)
        raw, mistakes = read(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Refused(400, f"the spec is not valid YAML: {error}; expected one plain document; correct it") from error
    if mistakes:
        raise Refused(422, "; ".join(mistakes))
    if not isinstance(raw, dict):
        raise Refused(422, f"the spec is {type(raw).__name__}; expected keys such as name, model, data and budgets")
    return raw


def _check_plain(text: str) -> None:
    """Refuse YAML that is dear to read: anchors, tags, deep nesting, and very many or very long values."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
            raise ValueError(f"line {line} has an anchor, an alias or a tag, which are not read here; write it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or number > MOST_EVENTS:
            raise ValueError(f"at line {line} it is more than {DEEPEST} levels deep or {MOST_EVENTS:,} parts long")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_SCALAR:
            raise ValueError(
                f"line {line} has a value of {len(event.value):,} characters, of {LONGEST_SCALAR:,} at most"
            )


def _parse_spec(raw: dict[Any, Any]) -> SearchSpec:
    try:
        return parse(_to_yaml(raw), folder=Path("/"))
    except SpecError as error:
        raise Refused(422, str(error)) from error


def _code_refusals(spec: SearchSpec, allowed: Sequence[str]) -> list[str]:
    """A reason for each function or source of the spec that is not allowed."""
    named = {} if spec.metric.is_ours else {"metric": spec.metric.function}
    named |= {} if spec.task.factory is None else {"task.factory": spec.task.factory}
    if spec.model.source != "factory":
        named["model.source"] = spec.model.source
    else:
        named["model.name"] = spec.model.name
    sections = _data_sections(spec).items()
    named |= {f"{place}.name": data.name or "" for place, data in sections if data.source == "factory"}
    sources = [one for one in allowed if one in SOURCES]
    functions = [one for one in allowed if one not in SOURCES]
    expected = {place: sources if place == "model.source" else functions for place in named}
    return [
        f"{place} is {name!r}, which is not allowed over HTTP; expected one of {', '.join(expected[place]) or 'none'}"
        for place, name in named.items()
        if name not in expected[place]
    ]


def _operator_refusals(raw: Mapping[str, Any]) -> list[str]:
    """A reason for each key that only the operator decides: the place and the record of searches."""
    given = ["tracking"] if raw.get("tracking") else []
    given += ["cluster.address"] if "address" in (raw.get("cluster") or {}) else []
    return [f"{place} is set by the service; expected a spec without it" for place in given]


def _size_refusals(spec: SearchSpec) -> list[str]:
    """A reason for each number by which one request asks for too much."""
    devices = {f"devices.{name}": device for name, device in spec.devices.items()}
    places = {"search": spec.search, "recovery": spec.recovery, "cluster": spec.cluster, **devices}
    numbers = {
        f"{place}.{key}": (getattr(section, key, None), most)
        for place, section in (places | _data_sections(spec)).items()
        for key, most in MOST.items()
    }
    numbers["the number of budgets"] = len(spec.budgets), MOST_BUDGETS
    if spec.model.source == "torchvision":
        numbers |= {f"model.args.{key}": (value, MOST_ARGUMENT) for key, value in spec.model.args.items()}
    return [
        f"{place} is {value:,}; expected {most:,} at most"
        for place, (value, most) in numbers.items()
        if isinstance(value, int | float) and value > most
    ]


def _data_sections(spec: SearchSpec) -> dict[str, DataSpec]:
    return {"data": spec.data} | ({"recovery.data": spec.recovery.data} if spec.recovery.data else {})


def _named_paths(spec: SearchSpec) -> dict[str, str]:
    """Every file and folder that the spec names, by its place."""
    found = {f"{place}.root": data.root for place, data in _data_sections(spec).items()}
    found |= {f"devices.{name}.file": device.file for name, device in spec.devices.items()}
    weights = spec.model.weights
    is_enum = spec.model.source == "torchvision" and re.fullmatch(r"\w+(\.\w+)?", weights or "") is not None
    if weights != "train" and not (is_enum and Path(weights or "").suffix not in WEIGHT_FILES):
        found["model.weights"] = weights
    return {place: path for place, path in found.items() if path is not None}


def _resolve_inside(path: str, root: Path | None) -> Path:
    """Resolve a path to the file itself, through all links.

    Raises:
        ValueError: it does not lie in `root`, or holds pickles.
    """
    if root is None:
        raise ValueError("this service reads no files that a spec names")
    try:
        found = (root / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError("it is no path") from error
    if not found.is_relative_to(root.resolve()):
        raise ValueError("it does not lie in the folder that this service reads from")
    if found.suffix in WEIGHT_FILES[1:]:
        raise ValueError("over HTTP weights are read from .safetensors files only")
    if not found.exists():
        raise ValueError("there is no such file or folder")
    return found


def _set_at(raw: dict[Any, Any], place: str, value: str) -> None:
    """Set the value at a dotted place."""
    *parents, last = place.split(".")
    for name in parents:
        raw = raw[name]
    raw[last] = value

"""The checks of single values of a spec: text, names, numbers and lists that its keys take."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import date
from typing import Any
from urllib.parse import urlsplit

from methods.names import NAMES, links_of
from search.spec.documents import is_odd, quoted, suggestion

LONGEST_TEXT = 4096
"""The characters of a path, which no system takes more of."""

MOST_BUDGETS, MOST_WORKERS, MOST_GPUS, MOST_ARGUMENT, MOST_METRIC = 100, 100_000, 1024, 1_000_000, 1e12
"""Budgets of a spec, workers, GPUs of a worker, classes or channels that torchvision is asked for, a metric's value."""

OF_RAY = {"CPU", "GPU", "memory", "object_store_memory"}
"""The resources that Ray counts by itself; those with a colon it names itself too."""


def check_text(value: str) -> str:
    """Refuse text that is empty, long, begins or ends with white space, or holds a sign that cannot be seen.

    Raises:
        ValueError: it does.
    """
    if not value or value != value.strip():
        raise ValueError(f"{quoted(value)} is empty, or has white space around it; write it without")
    if odd := next((sign for sign in value if is_odd(sign) or sign in "\t\n"), None):
        raise ValueError(f"{quoted(value)} holds U+{ord(odd):04X}, which cannot be seen; write it without")
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"{quoted(value)} has {len(value):,} characters, of {LONGEST_TEXT:,} at most; shorten it")
    return value


def check_address(value: str) -> str:
    """Refuse the address of a cluster that can be none. Raises as `check_text` does."""
    if value not in ("auto", "local") and not re.fullmatch(r"\S*:\S*", check_text(value)):
        raise ValueError(f"{quoted(value)} is no address; write auto, or HOST:PORT")
    return value


def check_store(value: str) -> str:
    """Refuse the place of a store that is no text, or an address that none can be. Raises as `check_text` does."""
    if check_text(value).startswith(("http://", "https://")):
        try:
            if urlsplit(value).port == 0:
                raise ValueError("port 0")
        except ValueError as error:
            raise ValueError(f"{quoted(value)} is no address: {error}; write http://HOST:PORT") from error
    elif "://" in value and not value.startswith("sqlite:"):
        _check_database(value)
    return value


def _check_database(address: str) -> None:
    """Refuse the address of a database that SQLAlchemy cannot read; its reason may show a part of a password."""
    from sqlalchemy.engine import make_url  # takes time to import, and most stores are files
    from sqlalchemy.exc import ArgumentError

    try:
        place = make_url(address)
        is_one = (place.port or 1) in range(1, 2**16) and not set("[]") & set(place.host or "")
    except (ArgumentError, ValueError):
        is_one = False
    if not is_one:
        raise ValueError(f"{quoted(address)} is no address; write DIALECT://USER@HOST:PORT/NAME, or a file's name")


def _check_once(values: list[str], what: str) -> None:
    twice = sorted(value for value, times in Counter(values).items() if times > 1)
    if twice:
        raise ValueError(f"{what} {', '.join(twice)} given twice; name each once")


def _method_name(entry: object) -> str:
    """The name of a method, or `first+second` for a chain, which is a list of methods."""
    if not isinstance(entry, str | list):
        raise ValueError(f"{quoted(str(entry))} is not a method{suggestion('', _known_methods())}")
    links = [str(name).strip() for name in (entry if isinstance(entry, list) else entry.split("+"))]
    for name in links:
        if name == "uniform":
            raise ValueError("'uniform' is the baseline of every search; leave it out of the list")
        if name not in _known_methods():
            raise ValueError(f"{quoted(name)} is not a method{suggestion(name, _known_methods())}")
    if isinstance(entry, list) and len(entry) < 2:
        raise ValueError(f"the chain {entry} is too short; give at least two methods, or one without brackets")
    return "+".join(links_of("+".join(links)))


def _known_methods() -> list[str]:
    return [name for name in NAMES if name != "uniform"]


def read_methods(value: object) -> tuple[list[str], list[str]]:
    """The names of the methods in the list `value`, and a reason for refusing each other entry."""
    names, refusals = [], []
    for entry in value if isinstance(value, list) else ():
        try:
            names.append(_method_name(entry))
        except ValueError as error:
            refusals.append(str(error))
    return names, refusals


def check_methods(value: object) -> object:
    """The names of a list of methods. Raises a ValueError if it is none, or empty, or repeats one."""
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list with at least one method, such as [itpruner, alds, [practise, alds]]")
    names, refusals = read_methods(value)
    if refusals:
        raise ValueError("; ".join(refusals[:5]))
    _check_once(names, "method")
    return tuple(names)


def check_budgets(value: object) -> object:
    """A list of budgets as a tuple. Raises a ValueError if it is none, or empty, or very long, or repeats a name."""
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list with at least one budget, such as [{name: half, macs: 50%}]")
    if len(value) > MOST_BUDGETS:
        raise ValueError(f"{len(value):,} budgets, of {MOST_BUDGETS} at most; leave some out")
    _check_once([quoted(b["name"]).strip("'") for b in value if isinstance(b, dict) and "name" in b], "budget")
    return tuple(value)


def check_keep(value: object) -> object:
    """A list of names as a tuple. Raises a ValueError if it is none, or repeats one."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{quoted(value)} is no list of layers; write one, such as [head, 'stem.*']")
    _check_once(value, "layer")
    return tuple(value)


def check_output(value: object) -> object:
    """Refuse what names no output. Raises as `check_text` does."""
    if isinstance(value, str):
        return check_text(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"{quoted(value)} is no output; write a name, such as logits, or a place, such as 0")
    return value


def check_alias(value: object) -> object:
    """Refuse what MLflow's registry keeps for itself. Raises a ValueError."""
    if isinstance(value, str) and (value.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", value)):
        raise ValueError(f"{quoted(value)} is reserved by the model registry; choose another name, such as edge")
    return value


def check_gpus(value: float) -> float:
    """Refuse a number of GPUs that no node has, or above 1 and not whole. Raises a ValueError."""
    if value > MOST_GPUS or (value > 1 and not value.is_integer()):
        raise ValueError(f"{value} GPUs cannot be had; write 0, a share up to 1, or a whole number")
    return value


def check_most_workers(value: object) -> object:
    """Refuse what is neither `auto` nor a number of workers. Raises a ValueError."""
    if value != "auto" and (type(value) is not int or not 0 < value <= MOST_WORKERS):
        raise ValueError(f"{quoted(value)} is no number of workers; write auto, or 1 to {MOST_WORKERS:,}")
    return value


def check_model_name(value: object) -> object:
    """Refuse a name that MLflow has no model by. Raises a ValueError."""
    if isinstance(value, str) and (not value.strip() or set(value) & set("/:")):
        raise ValueError(
            f"{quoted(value)} is no name for MLflow; write one that is not empty and has no '/' and no ':'"
        )
    return value


def check_resources(value: dict[str, float]) -> dict[str, float]:
    """Refuse resources that Ray itself gives to workers and nodes. Raises a ValueError."""
    for name in value:
        check_text(name)
        if name in OF_RAY or ":" in name:
            what = "what workers take" if name in OF_RAY else "Ray's own"
            raise ValueError(f"{quoted(name)} is {what}; name a resource of the node's own, such as board: 1")
    return value


def check_channels(value: object) -> tuple[float, ...]:
    """Three numbers in [0, 1], one for each channel. Raises a ValueError."""
    found = [float(one) for one in value if _is_pixel(one)] if isinstance(value, list) else []
    if len(found) != 3 or not isinstance(value, list) or len(value) != 3:
        raise ValueError("expected three numbers, of red, green and blue in [0, 1], such as [0.5, 0.5, 0.5]")
    if max(found) > 1:
        raise ValueError(f"{max(found):g} is above 1; pixels are scaled to [0, 1] first, so divide by 255")
    return tuple(found)


def _is_pixel(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 256


def check_providers(value: object) -> tuple[str, ...]:
    """Names of onnxruntime's execution providers. Raises a ValueError."""
    named = value if isinstance(value, list) else [value]
    for name in named:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]{1,40}ExecutionProvider", name):
            raise ValueError(f"{quoted(name)} is no execution provider; write its whole name: CUDAExecutionProvider")
    if len(set(named)) < len(named):
        raise ValueError(f"{named[0]} is named twice; expected each execution provider once")
    return tuple(named)


def check_task(value: str, names: list[str]) -> str:
    """One of the tasks that are ours. Raises a ValueError."""
    if value not in names:
        raise ValueError(
            f"no task {quoted(value)}{suggestion(value, names)}; a task of your own is {{factory: FUNCTION}}"
        )
    return value


def check_range(value: object) -> tuple[float, float]:
    """Two numbers, the first of which is the lower. Raises a ValueError."""
    found = [float(one) for one in value if _is_number(one)] if isinstance(value, list) else []
    if len(found) != 2 or not isinstance(value, list) or len(value) != 2 or not found[0] < found[1]:
        raise ValueError("expected its lowest and its highest value, two numbers such as [0, 100]")
    return found[0], found[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST_METRIC


def check_deviation(value: object) -> tuple[float, ...]:
    """Three numbers in (0, 1]. Raises a ValueError."""
    channels = check_channels(value)
    if 0 in channels:
        raise ValueError("0 is no deviation; give three numbers above 0")
    return channels


def check_args(value: Any) -> Any:
    """Refuse arguments that no JSON can hold, such as bytes or a set: they are recorded. Raises a ValueError."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            check_args(one)
    elif not isinstance(value, str | int | float | date | None):
        raise ValueError(f"{quoted(value)} is a {type(value).__name__}; expected text, numbers, lists and mappings")
    return value


def check_builder(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse a builder's argument, torchvision's or timm's, that no network has memory for. Raises a ValueError."""
    for name, value in args.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int | float) and not abs(one) <= MOST_ARGUMENT:
                raise ValueError(f"{name} is {quoted(one)}, of {MOST_ARGUMENT:,} at most; correct it")
    return args

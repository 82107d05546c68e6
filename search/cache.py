"""The cache between searches: trained zoo teachers, scores and timed layers, each under the hash of its content."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def folder() -> Path:
    """The folder of the cache: `$PAREDOWN_CACHE`, or `paredown` in the user's cache folder."""
    named = os.environ.get("PAREDOWN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "paredown"


def digest(*parts: object) -> str:
    """Hash text and bytes as they are and any other value as JSON with its keys in order, one part after the other.

    Caches and records name their entries so: a change of the result would make all of them start anew.

    >>> digest({"b": 1, "a": [2]}), digest('{"a": [2], ', b'"b": 1}')
    ('2b6ebe05de45a5ee5c253227c24a8140', '2b6ebe05de45a5ee5c253227c24a8140')
    """
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if not isinstance(part, str | bytes | memoryview):
            part = json.dumps(part, sort_keys=True)
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def keep(path: Path, write: Callable[[Path], None], *, once: bool = False) -> None:
    """Write `path` by `write`, whole or not at all: a reader never meets half a file.

    Args:
        path: the file.
        write: fills the file it is given.
        once: leaves a file alone that another process has put there meanwhile; it may be in use.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        if not once:
            Path(name).replace(path)
        elif not path.exists():
            _link(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _link(name: str, path: Path) -> None:
    """Give the file `name` a second name, unless that is another file's by now."""
    try:
        os.link(name, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            Path(name).replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a file of the cache; a missing or damaged file gives an empty one."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_json(path: Path, values: Mapping[str, object]) -> None:
    """Write an object to a file of the cache, whole or not at all."""

    def write(place: Path) -> None:
        place.write_text(json.dumps(values, indent=0, sort_keys=True))

    keep(path, write)

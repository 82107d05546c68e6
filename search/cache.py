"""What is worth keeping between searches: trained zoo teachers and scores, by content hash."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    """Where kept files live: `$PAREDOWN_CACHE`, or `paredown` in the user's cache folder."""
    named = os.environ.get("PAREDOWN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "paredown"


def keep(path: Path, write: Callable[[Path], None]) -> None:
    """Makes `path` by `write`, whole or not at all: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)

"""A local store that was moved or copied with its files: they are looked for beside it, not at their old place."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import pathname2url

log = logging.getLogger(__name__)

LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)
"""The columns of MLflow's database that say where files are."""


def local_path(location: str) -> Path | None:
    """The folder that a location of MLflow's is, if it is one of this machine.

    >>> local_path("file:///data/a%20b"), local_path("s3://bucket/x")
    (PosixPath('/data/a b'), None)
    """
    if location.startswith("/"):
        return Path(location)
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme == "file" and not parts.netloc else None


def reroot(database: Path) -> None:
    """Point every experiment whose files were moved with the database at the folder beside it.

    An experiment's files lie in `NAME.artifacts/EXPERIMENT`. Where the record names another folder, and that very one
    lies beside the database, this process and every later one uses the latter; no file is touched.
    """
    if not database.is_file():
        return
    try:
        with closing(sqlite3.connect(f"file:{pathname2url(str(database))}?mode=rw", uri=True, timeout=20)) as opened:
            found = opened.execute("SELECT artifact_location FROM experiments").fetchall()
            for old, new in _moved(database, (location for (location,) in found)).items():
                with opened:
                    _replace(opened, old, new)
                log.warning("the store %s was moved: its files are those in %s, no longer in %s", database, new, old)
    except sqlite3.DatabaseError:
        return  # no database of MLflow's, which who opens it says better


def _moved(database: Path, locations: Iterable[str | None]) -> dict[str, str]:
    """The new location of each experiment whose folder of files lies beside the database, by the old one."""
    found = {}
    for location in locations:
        old = local_path(location or "")
        if old is None or not old.parent.name.endswith(".artifacts"):
            continue
        new = database.parent / old.parent.name / old.name
        if new != old and new.is_dir():
            found[str(location)] = new.as_uri()
    return found


def _replace(opened: sqlite3.Connection, old: str, new: str) -> None:
    """Replace the beginning of every location."""
    for table, column in LOCATIONS:
        opened.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )

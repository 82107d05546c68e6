"""Readings kept on disk: a student that was measured once need not be measured again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster import Runtime
from search import cache
from search.cache import keep_json, read_json
from search.trials import Times, Timing


def folder_of(identity: Mapping[str, str], runtime: Runtime) -> Path:
    """Return the folder for the figures of all devices of this identity and runtime."""
    return cache.folder() / "latency" / cache.digest([identity, runtime.identity()])


class Readings:
    """The readings of one teacher's students on one device, by a key of each student; not corrected for drift.

    A quiet reading is kept for every search of this teacher on such a device, a noisy one for this search alone, so
    that a resumed search plans as it did before.

    Args:
        folder: see `folder_of`.
        teacher: the fingerprint of the teacher and its data.
        reference: the teacher's latency when the search began; no other search saw just these times.
    """

    def __init__(self, folder: Path, teacher: str, reference: Times) -> None:
        self._folder = folder
        self._teacher = teacher
        self._reference = reference
        self._known: dict[str, Timing] = {}

    def find(self, key: str) -> Timing | None:
        """Return the reading of a student, or None if it has none yet."""
        for path in (self._path(key, is_quiet=False), self._path(key, is_quiet=True)):  # this search's own first
            if key not in self._known and (found := read_json(path)):
                self._known[key] = Timing(found["student"], found["teacher"], found["noise"])
        return self._known.get(key)

    def keep(self, key: str, reading: Timing) -> None:
        """Keep the reading of a student, in memory and on disk."""
        self._known[key] = reading
        kept = {"student": reading.latency_ms, "teacher": reading.teacher_latency_ms, "noise": reading.noise}
        keep_json(self._path(key, is_quiet=reading.noise is None), kept)

    def _path(self, key: str, *, is_quiet: bool) -> Path:
        search = [] if is_quiet else sorted(self._reference.items())
        return self._folder / f"{cache.digest([self._teacher, key, search])}.json"

"""The account of a search: the wall seconds and seconds of devices it has taken, written to its record."""

from __future__ import annotations

import time

from search.driver.planning.fitting import Fitter
from search.record.search_run import SearchRun

WRITE_S = 10
"""Seconds between two writes while trials end; a kill forgets as much at most."""


class Account:
    """Adds up what was taken since it was last written; `started` is when the sitting began, on the monotonic clock.

    Seconds in which no trial ended are not written: a search that is opened again and has nothing to do costs nothing.
    """

    def __init__(self, run: SearchRun, started: float) -> None:
        self._run = run
        self._written = started
        self._is_owing = False

    def owe(self) -> None:
        """Take note that a trial has ended."""
        self._is_owing = True

    @property
    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._written > WRITE_S

    def write(self, fitter: Fitter) -> None:
        """Add to the record what was taken, if any trial has ended since."""
        if self._is_owing:
            self._run.add(wall_s=self.lap(), **fitter.planner.spent(), **fitter.stopwatch.spent())
            self._is_owing = False

    def lap(self) -> float:
        """Return the wall seconds that are still to be written, and count them as written."""
        passed = time.monotonic() - self._written
        self._written += passed
        return passed

"""The words that every file of `search` shares: defaults, exit codes, errors, and the report of progress."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import TypeAlias

DEFAULT_STORE = "sqlite:///paredown.db"
"""The MLflow store of a search whose spec and command name none."""
DEFAULT_STUDIES = "paredown.studies"
"""Optuna's journal file for the same search."""

FAILED, WRONG_INPUT, NOTHING_FITS = 1, 2, 3
"""The exit codes of the command, besides 0: no result, a mistake of the user's, or a result without some budget."""

Report: TypeAlias = Callable[[str, int, int, str], None]
"""Reports progress: called with the stage, units done, units in all, and a short note."""


class SearchError(Exception):
    """Base of all errors that a user can mend; the message has the mistake, the expectation and the mend."""


class SpecError(SearchError):
    """The spec is wrong; the message lists every mistake that was found."""


class DataError(SearchError):
    """The data cannot be used."""


class WorkloadError(SearchError):
    """The teacher, a factory or the metric cannot be used."""


class TrackingError(SearchError):
    """The MLflow store cannot be used, or does not hold what was asked for."""


def masked(text: str) -> str:
    """A text without the passwords of the addresses in it, fit to be shown or kept.

    >>> masked("postgresql://ada:lovelace@db/studies and http://mlflow:5000?token=abc")
    'postgresql://ada:***@db/studies and http://mlflow:5000?token=***'
    """
    text = re.sub(r"//([^:/@\s]*):[^/\s]+@", r"//\1:***@", text)
    return re.sub(r"([?&](?:password|passwd|secret|token)=)[^&\s'\"]+", r"\1***", text)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, at most 400 characters long."""
    return textwrap.shorten(str(error).strip().partition("\n")[0], 400, placeholder=" ...")


def one_line(error: BaseException) -> str:
    """Another library's message on one line, at most 400 characters long."""
    return textwrap.shorten(str(error), 400, placeholder=" ...")

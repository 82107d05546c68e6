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


SECRET = (
    r"(?:password|passwd|passphrase|pwd|pass|secret|token|bearer|credentials?|signature|sig|auth|authorization|jwt|"
    r"(?:api|access|account|private|secret|shared|encryption)[_.-]?key)"
)
"""The ends of the names of secrets, case aside."""

_KEY = rf"((?:^|[?#&;,\s{{'\"]|%3b|%26|%3f)[\w.-]*{SECRET}(?: ?= ?|%3d))"
_VALUE = r"(?:'[^'\n]*'|\"[^\"\n]*\"|\{[^}\n]*\}|(?:(?!%3b|%26)[^&;\s'\"])+)"

MASKS = (
    # a password with spaces, unless a port stands in its place
    (r"//([^:/@\s]*):(?!\d{1,5}(?:[/?#;,)\s]|$))(?:(?!://)[^\n'\"])*@(?=[\w.\[-])", r"//\1:***@"),
    # one with quotation marks, which else end a text
    (r"//([^:/@\s]*):(?:[^\s'\"]|['\"](?![\s,:;)\]}]|$)){1,2000}@", r"//\1:***@"),
    # USER:PASSWORD@HOST:PORT
    (r"(?<![\w.+/@:-])([\w.+-]+):(?!/)[^\s'\"@]+@(?=[\w.-]+:\d{1,5}(?!\w))", r"\1:***@"),
    (r"(https?)://[^/@\s'\"]+@", r"\1://***@"),  # a token as user name
    (r"//(?=[^/@\s'\"]*\d)[^:/@\s'\"]{20,}(:[^/@\s]*)?@", "//***@"),
    (_KEY + _VALUE, r"\1***"),
)
"""What is hidden of a text, in order: each is a pattern and the text in its place."""


def masked(text: str) -> str:
    """A text without the secrets of the addresses in it, fit to be shown or kept.

    >>> masked("postgresql://ada:lovelace@db/studies and mysql://db/x?ssl=1&SSL_Token=abc")
    'postgresql://ada:***@db/studies and mysql://db/x?ssl=1&SSL_Token=***'
    """
    for secret in _secrets_of(text):
        text = text.replace(secret, "***")
    for pattern, hidden in MASKS:
        text = re.sub(pattern, hidden, text, flags=re.IGNORECASE)
    return text


def _secrets_of(text: str) -> list[str]:
    """The secrets that SQLAlchemy reads from a text that is one address."""
    if not re.fullmatch(r"[\w+.-]+://((?!://).)*", text):
        return []
    from sqlalchemy.engine import make_url  # takes time to import, and few texts are addresses
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return []
    values = [(key, one) for key, value in url.query.items() for one in ([value] if isinstance(value, str) else value)]
    named = [value for key, value in values if re.search(SECRET + "$", key, re.IGNORECASE)]
    return sorted((value for value in named if value), key=len, reverse=True)


def printable(text: str) -> str:
    """A text whose signs that a terminal obeys or nobody sees are written as escapes; ends of lines are kept.

    >>> printable("a\\x1b[31mb\\u202ec\\n")
    'a\\\\x1b[31mb\\\\u202ec\\n'
    """
    return "".join(
        sign if sign == "\n" or sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def first_line(error: BaseException) -> str:
    """The first line of another library's message, at most 400 characters long."""
    return shortened(str(error).strip().partition("\n")[0], 400)


def one_line(error: BaseException) -> str:
    """Another library's message on one line, at most 400 characters long."""
    return shortened(str(error), 400)


def shortened(text: str, length: int) -> str:
    """A text on one line, at most `length` characters long; what is cut is no address that then shows its secret.

    >>> shortened("failed: mysql://ada:love lace@db", 26)
    'failed: mysql://ada:***@db'
    """
    return textwrap.shorten(masked(text), length, placeholder=" ...")

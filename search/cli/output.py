"""Output without a table: JSON for programs, and the one paragraph and exit code with which a failed command ends."""

from __future__ import annotations

import codecs
import errno
import io
import json
import logging
import os
import sys
from typing import NoReturn

import typer

from search.base import FAILED, NOTHING_FITS, WRONG_INPUT, SearchError, masked, one_line, printable

SUBSTITUTES = {"≤": "<=", "≥": ">=", "±": "+-", "·": "-", "—": "-", "…": "...", "µ": "u"}
"""The signs we write, for a terminal or a pipe that cannot show them."""


def open_closed_streams() -> None:
    """Open standard streams that were closed: nobody reads them, but the next file opened would take their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - to the end


def degrade_output() -> None:
    """Have standard output and error write signs that their encoding lacks as near ones, or else as escapes.

    Python would end the command there, with a traceback, after hours of search too.
    """
    codecs.register_error("paredown", _near_signs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="paredown")


def _near_signs(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escaped = (SUBSTITUTES.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking)
    return "".join(escaped), error.end


class _Formatter(logging.Formatter):
    """Writes a line of the log without signs that a terminal would obey, such as those of a file's name."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_handler() -> logging.Handler:
    """Make the handler of the command's own log, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    return handler


def settle_output() -> None:
    """Write out what is left for standard output, whose reader may be gone: Python would complain after the end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error.__context__, SystemExit) and error.__context__.code:
            return  # the command is ending with an error already
        if not isinstance(error, BrokenPipeError):
            fail(f"cannot write the output: {error.strerror}; expected room for it; write it elsewhere", FAILED)
        raise SystemExit(FAILED) from None


def print_json(value: object) -> None:
    """Print a result for programs, and nothing else, on standard output."""
    print(json.dumps(value, indent=2))


def fail(reason: str, code: int) -> NoReturn:
    """End the command with one paragraph on standard error, without the secrets of addresses in it."""
    typer.echo(f"paredown: {printable(masked(reason))}", err=True)
    raise SystemExit(code)


def exit_code(error: Exception) -> int | None:
    """Return the exit code for an error that a user can mend, or None for a fault of ours.

    Errors in our own words come first, since the other kinds take seconds to import.
    """
    if _is_in_our_words(error):
        return WRONG_INPUT
    if _is_lack_of_memory(error) or _is_lack_of_space(error):
        return FAILED
    from methods.base import Infeasible, MethodError
    from search.driver.compress import CompressionFailed
    from search.record.store import is_store_fault

    if isinstance(error, Infeasible):
        return NOTHING_FITS
    if isinstance(error, CompressionFailed | FloatingPointError) or is_store_fault(error):
        return FAILED
    is_file = isinstance(error, OSError) and error.filename is not None
    return WRONG_INPUT if is_file or isinstance(error, MethodError) else None


def reason_for(error: Exception) -> str:
    """Return the paragraph that tells a user of an error that has an exit code."""
    if _is_in_our_words(error):
        return str(error)
    if _is_lack_of_memory(error):
        return (
            f"memory ran out: {one_line(error) or 'no more could be had'}; expected room for it; make images, batches "
            "or data smaller, or give this machine more"
        )
    if _is_lack_of_space(error):
        return f"the output, or a file, cannot be written: {error}; expected space for it; free some, and run it again"
    if isinstance(error, OSError):
        return f"cannot use {error.filename}: {error.strerror}; expected a place this process may write; choose another"
    from search.record.store import is_store_fault, without_sql

    if is_store_fault(error):
        return (
            f"the MLflow store failed: {without_sql(str(error))}; expected one that stays as it is while a search "
            "runs; every finished trial is kept: mend the store, and the same command goes on"
        )
    return str(error)


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or torch could not have what it asked for, where a size is absurd as a rule."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _is_lack_of_space(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def place_in_user_code(error: BaseException) -> str | None:
    """Return the place in a user's own code that an error came from, if it did."""
    usercode = sys.modules.get("search.workload.usercode")  # only a command that runs such code has imported it
    return usercode.place_of(error) if usercode else None


def _is_in_our_words(error: Exception) -> bool:
    if isinstance(error, SearchError):
        return True
    from cluster import ClusterError

    return isinstance(error, ClusterError)

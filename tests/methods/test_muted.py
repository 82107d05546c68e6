"""What solvers print in C reaches nobody, and all else is printed as before."""

from __future__ import annotations

import ctypes
import os

import pytest

from methods.muted import muted


def test_only_what_c_prints_in_the_block_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with muted():
        libc.puts(b"within")
        os.write(1, b"within too\n")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_an_error_in_the_block_gives_the_output_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), muted():
        _ = 1 / 0
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"


def test_a_closed_output_does_not_matter() -> None:
    kept = os.dup(1)
    os.close(1)
    try:
        with muted():
            pass
    finally:
        os.dup2(kept, 1)
        os.close(kept)

"""The amounts of a spec as a user writes them: `50%` of the teacher, `1.2M` MACs, `12ms` or `20m` of time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import floor


@dataclass(frozen=True)
class Amount:
    """A limit as the user wrote it: a share of the teacher in (0, 1], or an absolute number of units."""

    text: str
    share: Fraction | None = None
    units: int | None = None

    def __str__(self) -> str:
        return self.text

    def of(self, teacher: int) -> int:
        """The limit in units for a teacher that costs `teacher`; a share is rounded down."""
        if self.units is not None:
            return self.units
        assert self.share is not None
        return floor(teacher * self.share)


SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
MILLISECONDS = {"": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3}
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def amount(value: object) -> Amount:
    """Read a limit on a counted cost.

    Raises:
        ValueError: it is no amount, not positive, or more than the whole.
    """
    if isinstance(value, Amount):
        return value
    text = str(value).strip()
    found = re.fullmatch(r"([0-9.]+)\s*([%kMG]?)", text)
    if isinstance(value, bool) or not found or found[1].count(".") > 1 or found[1] == ".":
        raise ValueError(f"{text!r} is not an amount; write 50% (of the teacher), 20M, 1.2G or a plain number")
    number, unit = Fraction(found[1]), found[2]
    if number <= 0:
        raise ValueError(f"{text!r} is not positive; a limit has to leave something")
    if unit != "%":
        units = int(number * SCALES[unit])
        if units == 0:
            raise ValueError(
                f"{text!r} is less than one unit; write {float(100 * number):g}% for a share of the teacher"
            )
        return Amount(_shortest(found[1]) + unit, units=units)
    if number > 100:
        raise ValueError(f"{text!r} is more than the teacher itself; write at most 100%")
    return Amount(_shortest(found[1]) + unit, share=number / 100)


@dataclass(frozen=True)
class Time:
    """A limit on latency as the user wrote it: a share of the teacher's own in (0, 1], or milliseconds."""

    text: str
    share: float | None = None
    ms: float | None = None

    def __str__(self) -> str:
        return self.text

    def of(self, teacher_ms: float) -> float:
        """The limit in milliseconds for a teacher that takes `teacher_ms`."""
        if self.ms is not None:
            return self.ms
        assert self.share is not None
        return teacher_ms * self.share


def latency(value: object) -> Time:
    """Read a limit on latency; a number without a unit is in milliseconds.

    Raises:
        ValueError: it is no latency, not positive, or more than the teacher's.
    """
    if isinstance(value, Time):
        return value
    text = str(value).strip()
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%|ms|us|s|)", text)
    if isinstance(value, bool) or not found:
        raise ValueError(f"{text!r} is not a latency; write 60% (of the teacher's), 12ms or 800us")
    number, unit = float(found[1]), found[2]
    if number <= 0:
        raise ValueError(f"{text!r} is not positive; a limit has to leave something")
    if unit != "%":
        return Time(_shortest(found[1]) + unit, ms=number * MILLISECONDS[unit])
    if number > 100:
        raise ValueError(f"{text!r} is more than the teacher itself; write at most 100%")
    return Time(_shortest(found[1]) + unit, share=number / 100)


def drop(value: object) -> float:
    """Read the top-1 that may be lost, as a fraction: `0.02` and `2%` are the same.

    Raises:
        ValueError: it is no fraction of 1.
    """
    text = str(value).strip()
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", text)
    lost = float(found[1]) / (100 if found[2] else 1) if found and not isinstance(value, bool) else 1.0
    if lost >= 1:
        raise ValueError(f"{text!r} is no share of top-1 that may be lost; write 0.02 or 2%")
    return lost


def seconds(value: object) -> float:
    """Read a duration in seconds.

    Raises:
        ValueError: it is no duration.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smh]?)", str(value).strip())
    if isinstance(value, bool) or not found or float(found[1]) <= 0:
        raise ValueError(f"{value!r} is not a duration; write 90s, 20m, 2h or a number of seconds")
    return float(found[1]) * SECONDS[found[2]]


def _shortest(number: str) -> str:
    """The shortest way to write a number: `50.0` and `50` are the same."""
    return number.rstrip("0").rstrip(".") if "." in number else number

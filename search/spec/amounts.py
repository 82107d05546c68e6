"""The amounts of a spec as a user writes them: `50%` of the teacher, `1.2M` MACs, `12ms` or `20m` of time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import floor

from search.spec.documents import quoted


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

MOST_UNITS, MOST_MS, MOST_SECONDS = 10**18, 24 * 3600 * 1000, 10 * 365 * 24 * 3600
"""What no network costs, no call takes, and nobody waits for."""

NUMBER = re.compile(r"((?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*(.*)", re.DOTALL)


def _number_and_unit(value: object) -> tuple[str, Fraction, str] | None:
    """The number that an amount begins with, as text and as its value, and its unit; None if it is no amount."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = str(value).strip()
    found = NUMBER.fullmatch(text) if len(text) <= 100 else None
    return None if found is None else (found[1].replace("_", ""), Fraction(found[1]), found[2])


def amount(value: object) -> Amount:
    """Read a limit on a counted cost: `50%`, `300k`, `3e5`, `300_000`.

    Raises:
        ValueError: it is no amount, not positive, more than the whole, or more than any network costs.
    """
    if isinstance(value, Amount):
        return value
    found = _number_and_unit(value)
    if found is None or found[2] not in (*SCALES, "%"):
        raise ValueError(
            f"{_shown(value)} is not an amount; write {_likely(value) or '50% (of the teacher), 20M, 1.2G'} or a plain "
            "number"
        )
    text, number, unit = found
    _check_positive(value, number)
    if unit == "%":
        return Amount(_shortest(text) + unit, share=_share(value, number))
    units = int(number * SCALES[unit])
    if units == 0:
        raise ValueError(
            f"{_shown(value)} is less than one unit; write {float(100 * number):g}% for a share of the teacher"
        )
    if units > MOST_UNITS:
        raise ValueError(f"{_shown(value)} is more than any network has; write at most 1e18")
    return Amount(_shortest(text) + unit, units=units)


def size(value: object) -> Amount:
    """Read a limit on bytes, which may be called so: `40kB` is `40k`. Raises as `amount` does."""
    is_named = isinstance(value, str) and re.search(r"[0-9]\s*[kMG]?B\s*$", value)
    return amount(str(value).strip().removesuffix("B") if is_named else value)


def _likely(value: object) -> str | None:
    """How what was meant is probably written, if it is an amount but for its unit, its commas or its case."""
    text = re.sub(r",(?=[0-9]{3})", "", value.strip()) if isinstance(value, str) else ""
    found = _number_and_unit(text)
    units = {unit.lower(): unit for unit in SCALES} | {"b": "G", "kb": "k", "mb": "M", "gb": "G", "percent": "%"}
    unit = None if found is None else units.get(found[2].lower())
    return None if found is None or unit is None else f"{found[0]}{unit}"


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
        ValueError: it is no latency, not positive, more than the teacher's, or longer than a day.
    """
    if isinstance(value, Time):
        return value
    found = _number_and_unit(value)
    if found is None or found[2] not in (*MILLISECONDS, "%"):
        raise ValueError(f"{_shown(value)} is not a latency; write 60% (of the teacher's), 12ms or 800us")
    text, number, unit = found
    _check_positive(value, number)
    if unit == "%":
        return Time(_shortest(text) + unit, share=float(_share(value, number)))
    if number * Fraction(MILLISECONDS[unit]) > MOST_MS:
        raise ValueError(f"{_shown(value)} is longer than any call takes; write at most a day, 86400s")
    return Time(_shortest(text) + unit, ms=float(number) * MILLISECONDS[unit])


def drop(value: object) -> float:
    """Read the top-1 that may be lost, as a fraction: `0.02` and `2%` are the same.

    Raises:
        ValueError: it is no fraction of 1.
    """
    found = _number_and_unit(value)
    lost = float(found[1]) / (100 if found[2] else 1) if found and found[2] in ("", "%") and found[1] < 100 else 1.0
    if lost >= 1:
        raise ValueError(f"{_shown(value)} is no share of top-1 that may be lost; write 0.02 or 2%")
    return lost


def seconds(value: object) -> float:
    """Read a duration in seconds.

    Raises:
        ValueError: it is no duration, or longer than ten years.
    """
    found = _number_and_unit(value)
    if found is None or found[2] not in SECONDS or found[1] <= 0:
        raise ValueError(f"{quoted(value)} is not a duration; write 90s, 20m, 2h or a number of seconds")
    if found[1] * SECONDS[found[2]] > MOST_SECONDS:
        raise ValueError(f"{quoted(value)} is longer than ten years; write at most 87600h")
    return float(found[1]) * SECONDS[found[2]]


def _check_positive(value: object, number: Fraction) -> None:
    if number <= 0:
        raise ValueError(f"{_shown(value)} is not positive; a limit has to leave something")


def _share(value: object, percent: Fraction) -> Fraction:
    if percent > 100:
        raise ValueError(f"{_shown(value)} is more than the teacher itself; write at most 100%")
    return percent / 100


def _shown(value: object) -> str:
    """A value in quotes, as it stands in a message."""
    return quoted(str(value).strip() if isinstance(value, int | float | str) else value)


def _shortest(number: str) -> str:
    """The shortest way to write a number: `50.0` and `50` are the same, as are `3e5` and `300000`.

    >>> _shortest("50.0"), _shortest("3e5"), _shortest("2e-05")
    ('50', '300000', '0.00002')
    """
    if "e" in number.lower():
        number = format(Decimal(number), "f")
    return number.rstrip("0").rstrip(".") if "." in number else number

"""Amounts as a user writes them: `50%` of the teacher, `1.2M` of something, `20m` of time."""

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

    def of(self, teacher: int) -> int:
        """The limit in units, where the teacher costs `teacher`; a share is rounded down."""
        if self.units is not None:
            return self.units
        assert self.share is not None
        return floor(teacher * self.share)


SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def amount(value: object) -> Amount:
    """The limit that `value` of a spec says.

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
        return Amount(text, units=units)
    if number > 100:
        raise ValueError(f"{text!r} is more than the teacher itself; write at most 100%")
    return Amount(text, share=number / 100)


def seconds(value: object) -> float:
    """The seconds that `value` of a spec says.

    Raises:
        ValueError: it is no duration.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smh]?)", str(value).strip())
    if isinstance(value, bool) or not found or float(found[1]) <= 0:
        raise ValueError(f"{value!r} is not a duration; write 90s, 20m, 2h or a number of seconds")
    return float(found[1]) * SECONDS[found[2]]

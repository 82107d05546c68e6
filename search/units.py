"""Numbers as a person reads them, in the report and on the terminal: shares in percent, counts and sizes with units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MINUS = "\u2212"


def percent(share: float | None) -> str:
    """A share as a person reads it.

    >>> percent(0.4976), percent(None)
    ('49.8 %', '—')
    """
    return "—" if share is None else f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, signed.

    >>> points(0.0123), points(-0.0001)
    ('+1.2 points', '±0.0 points')
    """
    value = f"{100 * abs(difference):.1f}"
    sign = "±" if float(value) == 0 else "+" if difference > 0 else MINUS
    return f"{sign}{value} points"


def lost(difference: float) -> str:
    """A loss of a share in percentage points; a gain is negative.

    >>> lost(0.0191), lost(-0.0042), lost(-0.0001)
    ('1.9 points', '\u22120.4 points', '0.0 points')
    """
    value = f"{100 * abs(difference):.1f}"
    return f"{MINUS if difference < 0 and float(value) else ''}{value} points"


@dataclass(frozen=True)
class Scale:
    """The name of the metric that decides, and its own values where a search has the shares 0 and 1.

    A search knows shares alone: larger is better, and 1 is the best there is. A person reads the metric's own values.

    >>> loss = Scale("loss", worst=2.5, best=0.0)
    >>> loss.share(0.5), loss.shown(0.8), loss.change(-0.1), loss.lost(0.1)
    (0.8, '0.5', '+0.25', '0.25')
    """

    name: str = "top-1"
    worst: float = 0.0
    best: float = 1.0

    @property
    def is_share(self) -> bool:
        """Whether the metric's own values are shares, which are shown in percent."""
        return (self.worst, self.best) == (0.0, 1.0)

    @property
    def described(self) -> dict[str, Any]:
        """The scale as JSON-ready values for programs, under the key `metric`; nothing where that is top-1."""
        return {} if self == TOP1 else {"metric": asdict(self)}

    def share(self, value: float) -> float:
        """The share that a value of the metric is."""
        return (value - self.worst) / (self.best - self.worst)

    def value(self, share: float) -> float:
        """The metric's own value at a share."""
        return self.worst + share * (self.best - self.worst)

    def shown(self, share: float | None) -> str:
        """A share as a person reads it, in percent or as the metric's own value."""
        return percent(share) if share is None or self.is_share else f"{self.value(share):.4g}"

    def with_error(self, share: float | None, error: float | None) -> str:
        """A share and its standard error as a person reads them.

        >>> TOP1.with_error(0.9972, 0.0028), TOP1.with_error(0.9972, None)
        ('99.7 % ± 0.3', '99.7 %')
        """
        if share is None or error is None:
            return self.shown(share)
        return f"{self.shown(share)} ± {100 * error:.1f}" if self.is_share else self.shown(share)

    def told(self, share: float) -> str:
        """A share in a line of progress, with the metric's name."""
        return f"{self.name} {share:.4f}" if self.is_share else f"{self.name} {self.shown(share)}"

    def change(self, difference: float) -> str:
        """A difference of two shares, signed as the metric's own value changes."""
        if self.is_share:
            return points(difference)
        value = f"{difference * (self.best - self.worst):+.3g}"
        return f"±{value[1:]}" if float(value) == 0 else value.replace("-", MINUS)

    def lost(self, difference: float) -> str:
        """A loss of a share; a gain is negative."""
        if self.is_share:
            return lost(difference)
        return f"{difference * abs(self.best - self.worst):.3g}".replace("-", MINUS)


TOP1 = Scale()
"""The scale of a search that decides by top-1."""


def count(value: float | None) -> str:
    """A number of multiply-accumulates or parameters.

    >>> [count(value) for value in (4_110_000_000, 12_345_678, 270_000, 78_042, 2300)]
    ['4.11G', '12.3M', '0.27M', '78.0k', '2,300']
    """
    if value is None:
        return "—"
    for scale, unit, least in ((1e9, "G", 1e9), (1e6, "M", 1e5), (1e3, "k", 1e4)):
        if value >= least:
            scaled = value / scale
            return f"{scaled:.2f}{unit}" if scaled < 10 else f"{scaled:.1f}{unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """A file size, in powers of ten.

    >>> size(1_130_000), size(84_200), size(512)
    ('1.1 MB', '84.2 kB', '512 B')
    """
    if value is None:
        return "—"
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    >>> duration(4.24), duration(59.97), duration(754), duration(8000)
    ('4.2 s', '1 min 0 s', '12 min 34 s', '2 h 13 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def milliseconds(value: float) -> str:
    """A latency with three significant digits.

    >>> milliseconds(0.01234), milliseconds(1.5), milliseconds(123.4)
    ('0.0123 ms', '1.50 ms', '123 ms')
    """
    return f"{value:#.3g}".rstrip(".") + " ms"


def knobs(values: Mapping[str, object]) -> str:
    """The knobs of a candidate on one line.

    >>> knobs({"rank": 3, "ratio": 0.123456789}), knobs({})
    ('rank = 3, ratio = 0.1235', 'none')
    """
    return ", ".join(f"{name} = {plain(value)}" for name, value in values.items()) or "none"


def plain(value: object) -> str:
    """Any JSON value on one line: four digits of a fraction, lists and mappings without brackets.

    >>> plain({"ratio": 0.123456789, "kept": [3, 5], "cut": []})
    'ratio: 0.1235, kept: 3, 5, cut: none'
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "none"
    return str(value)

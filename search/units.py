"""Numbers as a person reads them, in the report and on the terminal: shares in percent, counts and sizes with units."""

from __future__ import annotations

from collections.abc import Mapping

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

"""Tell whether a spec changed between two sittings of one search in more than it may."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from search.base import SpecError

YOUNGER = ("recovery.refit", "search.explore")
"""Keys that are on where a spec says nothing of them; a search that was begun before they were there has neither."""


class SpecChanged(SpecError):
    """A search of this name is on record with another spec; the message lists what differs."""


def check_unchanged(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compares all that decides what a search proposes and what comes of it, as `SearchSpec.decisive` gives it.

    Raises:
        SpecChanged: something other than additional budgets and devices differs.
    """
    if not (differing := changes(old, new)):
        return
    lines = "\n".join(f"  - {line}" for line in differing)
    raise SpecChanged(
        f"search {name!r} is on record with another spec:\n{lines}\n"
        "expected the spec it began with, where only trials, timeout, winner, cluster, tracking and what was added to "
        "budgets and devices may differ; restore it, or keep both with --fork NEW-NAME"
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Return the differences between two specs, as lines `key: old, now new`; added budgets and devices do not count.

    Nor does a key that `old` lacks if it is off or among the `YOUNGER`, since it is younger than that search.

    >>> changes({"seed": 0, "budgets": {"a": 1}}, {"seed": 1, "budgets": {"a": 1, "b": 2}})
    ['seed: 0, now 1']
    """
    found = []
    for key in dict.fromkeys([*old, *new]):
        place = f"{where}{key}"
        if key not in old:
            is_off = new[key] is None or new[key] is False or place in YOUNGER
            found += [] if is_off or where in ("budgets.", "devices.") else [f"{place}: new, {json.dumps(new[key])}"]
        elif key not in new:
            found.append(f"{place}: {json.dumps(old[key])}, now gone")
        elif isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            found += changes(old[key], new[key], f"{place}.")
        elif old[key] != new[key]:
            found.append(f"{place}: {json.dumps(old[key])}, now {json.dumps(new[key])}")
    return found

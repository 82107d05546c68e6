"""The start of the console script `paredown`: our packages have common names, so it checks them before any runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent


def main() -> None:
    """Run the command line, or exit with 2 and a reason if one of our packages is somebody else's."""
    for name in ("cluster", "methods", "search"):
        found = importlib.util.find_spec(name)
        places = [] if found is None else [found.origin, *(found.submodule_search_locations or ())]
        place = next((Path(place).resolve() for place in places if place), None)
        if place != HOME / name / "__init__.py":
            print(
                f"paredown: the module {name!r} is {place}, not Paredown's own in {HOME}; expected ours; "
                "rename that file, or take its folder off PYTHONPATH",
                file=sys.stderr,
            )
            raise SystemExit(2)
    from search.cli.main import main as run

    run()

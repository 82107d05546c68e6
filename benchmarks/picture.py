"""The picture on the README's first screen: every student of a finished search by its MACs, and the budgets' winners.

    python benchmarks/picture.py fashion-mnist

Reads the search from its MLflow store, and writes `benchmarks/results/frontier.json` and `docs/frontier.svg` of it.
Without a name, it draws what is committed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from search.base import DEFAULT_STORE
from search.frontier import frontier
from search.record.searches import find_search
from search.results import SearchResult

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "frontier.json"
PICTURE = ROOT / "docs" / "frontier.svg"


def main() -> None:
    """Write the points of a search, if one is named, and draw them."""
    parser = argparse.ArgumentParser(description="Draw the frontier of a finished search.")
    parser.add_argument("name", nargs="?", help="the search; the committed points are drawn without one")
    parser.add_argument("--uri", default=DEFAULT_STORE, help="its MLflow store")
    given = parser.parse_args()
    if given.name:
        KEPT.write_text(json.dumps(points(find_search(given.uri, given.name).read.result()), indent=1) + "\n")
    draw(json.loads(KEPT.read_text()), PICTURE)


def points(result: SearchResult) -> dict[str, Any]:
    """The students that were measured, the winners, and the teacher: MACs as shares of its own, and top-1."""
    macs = result.teacher.macs
    winners = {one.winner.run_id: one.name for one in result.budgets if one.winner is not None}
    return {
        "search": result.name,
        "started": result.started[:10],
        "students": [
            {
                "method": one.method,
                "macs": (one.macs or 0) / macs,
                "top1": one.top1_validation,
                "is_trained": one.state == "complete",
                "wins": winners.get(one.run_id),
            }
            for one in result.models()
        ],
        "frontier": [
            [point["macs"] / macs, point["top1_validation"]]
            for point in frontier(result.teacher, result.candidates, "macs")
        ],
        "budgets": {one.name: one.limits["macs"] / macs for one in result.budgets if "macs" in one.limits},
        "teacher": result.teacher.top1_validation,
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw every method in a colour of its own, untrained students hollow, winners in a ring, budgets as lines."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": path.stem, "font.size": 11}  # the same file from the same points
    from matplotlib import pyplot as plt

    figure, plane = plt.subplots(figsize=(9, 4.6), layout="constrained")
    methods = sorted({one["method"] for one in found["students"]})
    for name, share in found["budgets"].items():
        plane.axvline(100 * share, color="0.6", linestyle=":", linewidth=1.2)
        plane.annotate(
            name, (100 * share, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right", color="0.4"
        )
    plane.plot(*zip(*[(100 * x, 100 * y) for x, y in found["frontier"]], strict=True), color="0.75", zorder=1)
    for color, method in enumerate(methods):
        for is_trained in (False, True):
            some = [one for one in found["students"] if (one["method"], one["is_trained"]) == (method, is_trained)]
            face = f"C{color}" if is_trained else "none"
            plane.scatter(
                [100 * one["macs"] for one in some], [100 * one["top1"] for one in some], s=36, zorder=2,
                facecolors=face, edgecolors=f"C{color}", label=method if is_trained else None,
            )  # fmt: skip
    for one in found["students"]:
        if one["wins"]:
            plane.scatter(100 * one["macs"], 100 * one["top1"], s=170, facecolors="none", edgecolors="black", zorder=3)
    plane.axhline(100 * found["teacher"], color="black", linewidth=1)
    plane.annotate(
        "teacher", (0.995, 100 * found["teacher"]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    plane.set(xlabel="MACs, % of the teacher's", ylabel="validation top-1, %")
    plane.grid(alpha=0.25)
    figure.legend(loc="outside right upper", title="hollow: not trained\nring: wins a budget", alignment="left")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

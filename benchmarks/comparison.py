"""Every method and some chains on one network, one budget: `paredown compress`, one row of a Markdown table each.

    python benchmarks/comparison.py examples/fashion_mnist.yaml --budget half

Each row is one `paredown compress` with one thread; two run at a time. Earlier figures are read from `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROWS = ("uniform", "itpruner", "practise", "alds", "alds measure=group_max", "manidp", "practise+alds", "itpruner+alds")
"""A method or chain each, with the knobs that are not to have their defaults."""

HEAD = "method | after surgery | untrained | after recovery | test | MACs | expected MACs | params | size | seconds"


def main() -> None:
    """Run the missing rows and print the table."""
    parser = argparse.ArgumentParser(description="Every method on one network and one budget, as a Markdown table.")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--budget", required=True, help="the name of one of the spec's budgets")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="METHOD or 'METHOD KNOB=VALUE ...'")
    parser.add_argument("--jobs", type=int, default=2, help="how many to run at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("paredown.comparison"), help="where models and figures are kept"
    )
    given = parser.parse_args()
    folders = {row: given.out / given.spec.stem / given.budget / row.replace(" ", ",") for row in given.rows}

    def run(row: str) -> dict[str, Any]:
        return figures(given.spec, given.budget, row, folders[row])

    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(folders, pool.map(run, folders), strict=True))
    print(table(found))


def figures(spec: Path, budget: str, row: str, folder: Path) -> dict[str, Any]:
    """The figures of `paredown compress` for a row, now or at an earlier call; the reason if it gave no model."""
    kept = folder / "figures.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    method, *knobs = row.split()
    options = [part for knob in knobs for part in ("--knob", knob)]
    paredown = Path(sys.executable).with_name("paredown")
    command = [str(paredown), "compress", str(spec), "--method", method, "--budget", budget]
    ended = subprocess.run(
        [*command, *options, "--out", str(folder), "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    if ended.returncode:
        return {"reason": ended.stderr.strip().splitlines()[-1]}
    return dict(json.loads(ended.stdout))


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a Markdown table; costs as shares of the teacher's."""
    columns = HEAD.count("|")
    lines = [f"| {HEAD} |", "|---|" + "---:|" * columns]
    teacher = next((row["teacher"] for row in found.values() if "teacher" in row), None)
    if teacher is not None:
        top1 = f"{teacher['top1_validation']:.2%} | {teacher['top1_test']:.2%}"
        lines.append(f"| teacher | | | {top1} | {teacher['macs']:,} | | {teacher['params']:,} | | |")
    return "\n".join(lines + [_line(name, row) for name, row in found.items()])


def _line(name: str, row: Mapping[str, Any]) -> str:
    if "reason" in row:
        return f"| {name} | {row['reason']} |" + " |" * (HEAD.count("|") - 1)
    teacher = row["teacher"]
    expected = "" if row["macs_expected"] is None else f"{row['macs_expected'] / teacher['macs']:.1%}"
    top1 = [f"{row[key]:.2%}" for key in ("top1_surgery", "top1_bn", "top1_validation", "top1_test")]
    costs = [f"{row['macs'] / teacher['macs']:.1%}", expected, f"{row['params'] / teacher['params']:.1%}"]
    cells = [*top1, *costs, f"{row['size_bytes'] / 1e6:.2f} MB", f"{row['seconds']:.0f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()

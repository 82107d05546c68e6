"""The latency of every method's students beside Torch-Pruning's: share of the MACs beside share of the milliseconds.

    python benchmarks/latency.py
    python benchmarks/latency.py --full

onnxruntime, one thread, batch 1 and batch 32. Every student takes turns with the teacher in one process, as in a
search, several times over. Students that `quality.py` kept are timed as they are; the others are made first, with what
training would not change. Run it while nothing else runs: a reading that was disturbed says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import PEERS, within
from quality import CHANNELS, ROWS, SHARES, budget_of, load
from records import RESULTS, SCRATCH, TEACHER, file_of, keep, macs_of, made, write

from cluster.devices.meter import measure
from cluster.devices.runtimes import Runtime
from methods import named
from methods.base import Infeasible
from methods.protocol import defaults

BATCHES = (1, 32)
REPEATS = 5
"""Readings of each student; a reading has 30 calls at least."""

IMAGE = (1, 28, 28)
HEAD = "| row | budget | MACs |" + "".join(f" batch {batch} | spread | ms | teacher's ms |" for batch in BATCHES)


def main() -> None:
    """Time the students, and print a table."""
    parser = argparse.ArgumentParser(description="Share of the MACs beside share of the latency, in onnxruntime.")
    parser.add_argument("--full", action="store_true", help="all budgets, not the first alone")
    parser.add_argument("--out", type=Path, help="the results; with --full the committed ones, which it replaces")
    parser.add_argument("--students", type=Path, default=SCRATCH / "students", help="where ONNX files are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out or (RESULTS if given.full else SCRATCH) / "latency.json"
    shares = SHARES if given.full else SHARES[:1]
    programs = made_programs(given.students, shares)
    teacher = programs.pop((TEACHER, 100))
    settings = {"runtime": "onnxruntime", "threads": 1, "batches": BATCHES, "repeats": REPEATS, "channels": CHANNELS}
    results: dict[str, Any] = {"made": made("onnxruntime"), "settings": settings, "runs": []}
    print(f"{HEAD}\n|---|" + "---:|" * (HEAD.count("|") - 2))
    for (row, share), program in programs.items():
        run = {"row": row, "share": share, "macs": macs_of(program), "batches": times(program, teacher)}
        results["runs"].append(run)
        write(out, results)
        print(line(run, macs_of(teacher)), flush=True)


def made_programs(students: Path, shares: Sequence[int]) -> dict[tuple[str, int], bytes]:
    """The ONNX files of the teacher and of all students that there are, by row and budget; missing ones are made."""
    wanted = [(TEACHER, 100), *((row, share) for share in shares for row in ROWS)]
    missing = [one for one in wanted if not file_of(students, *one).is_file()]
    if missing:
        make(students, missing)
    return {one: path.read_bytes() for one in wanted if (path := file_of(students, *one)).is_file()}


def make(students: Path, missing: Sequence[tuple[str, int]]) -> None:
    """Cut the students that are missing, and keep them untrained."""
    subject = load()
    teacher, train = subject.workload.teacher, subject.workload.splits.train
    for row, share in missing:
        budget = budget_of(subject, share)
        try:
            if row == TEACHER:
                student = teacher
            elif row in PEERS:
                student, _ = within(teacher, row, budget.macs or 0, train)
            else:
                method = named(row)
                student = method.apply(teacher, subject.planner.plan(row, budget, defaults(method)))
        except Infeasible:
            continue
        keep(file_of(students, row, share), student, subject.calibration)


def times(program: bytes, teacher: bytes) -> dict[str, Any]:
    """By batch, the readings of a student: its share of the teacher's median, both medians, and the noise."""
    images = np.random.default_rng(0).standard_normal((max(BATCHES), *IMAGE), np.float32)
    found: dict[str, Any] = {}
    for batch in BATCHES:
        runtime = Runtime("onnxruntime", batch=batch)
        readings = [measure({"teacher": teacher, "student": program}, runtime, images) for _ in range(REPEATS)]
        medians = [(one.latency["student"].p50, one.latency["teacher"].p50) for one in readings]
        found[str(batch)] = {
            "shares": [round(student / beside, 4) for student, beside in medians],
            "ms": [round(student, 4) for student, _ in medians],
            "teacher_ms": [round(beside, 4) for _, beside in medians],
            "noise": [round(one.noise, 3) for one in readings],
        }
    return found


def line(run: Mapping[str, Any], macs: int) -> str:
    """The times of one student as a row of a Markdown table."""
    cells = [f"`{run['row']}`", f"{run['share']} %", f"{run['macs'] / macs:.1%}"]
    for taken in run["batches"].values():
        middle, beside = float(np.median(taken["ms"])), float(np.median(taken["teacher_ms"]))
        spread = f"{min(taken['shares']):.2f} to {max(taken['shares']):.2f}"
        cells += [f"{np.median(taken['shares']):.2f}", spread, f"{middle:.2f}", f"{beside:.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

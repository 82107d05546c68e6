"""Every method on networks of many kinds, at 60 % of their MACs: met as counted on the student, or refused with why.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --networks resnet18 swin_t
    python benchmarks/zoo.py --page

The networks come from torchvision and timm, with random weights. Each runs in a process of its own; its row is on disk
as soon as it is known, and a run goes on where an earlier one ended. `--page` makes docs/zoo.md of the results.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from zoo_networks import CLASSES, ENTRIES, Entry, network

from methods import METHODS
from methods.base import Budget, Infeasible, MethodError, Scores, SharedShard
from methods.network import Profile, count_macs, count_params, profile
from methods.protocol import Method, PerInput, defaults

RESULT = Path(__file__).parent / "results" / "zoo.json"
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
COLUMNS = ("uniform", "itpruner", "channels", "practise", "alds", "manidp")
SHARE, IMAGES, CHANNELS = 60, 16, 1
"""Percent of the MACs, calibration images, and the multiple of all widths."""

SECONDS, PROFILE_SECONDS = 150, 60
"""The longest that a network may take of a core, and its profile; a method may take its part of what is left."""

FAULT, LATE = "fault", "over the time"
STATES = ("met", "infeasible", "unsupported", LATE, FAULT)


def main() -> None:
    """Run the networks whose rows are missing, one after the other, or write the page."""
    parser = argparse.ArgumentParser(description=f"Every method on every network at {SHARE} % of the MACs.")
    parser.add_argument("--networks", nargs="+", choices=ENTRIES, help="these alone, made anew")
    parser.add_argument("--page", action="store_true", help="write docs/zoo.md")
    parser.add_argument("--one", choices=ENTRIES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        for part in tried(ENTRIES[given.one]):
            print(json.dumps(part), flush=True)
        return
    from records import begun, write  # slow to import, so not by the processes of networks

    settings = {"share": SHARE, "images": IMAGES, "classes": CLASSES, "channels": CHANNELS, "seconds": SECONDS}
    kept = begun(RESULT, settings, "torch", "torchvision", "timm", "torch-pruning")
    if given.page:
        PAGE.write_text(page(kept))
        return
    rows = {row["network"]: row for row in kept["runs"]}
    for name in given.networks or [name for name in ENTRIES if name not in rows]:
        rows[name] = row_of(ENTRIES[name])
        write(RESULT, kept | {"runs": [rows[one] for one in ENTRIES if one in rows]})
        cells = [f"{method} {shown(cell)}" for method, cell in rows[name]["cells"].items()]
        print(f"{name}: {rows[name]['seconds']:.0f} s, {rows[name]['peak_mib']} MiB; {', '.join(cells)}", flush=True)


def row_of(entry: Entry) -> dict[str, Any]:
    """Run one network in a process of its own; cells that it did not come to are over the time, or a crash's fault."""
    started = time.perf_counter()
    command = [sys.executable, "-W", "ignore", __file__, "--one", entry.name]
    try:
        done = subprocess.run(command, capture_output=True, timeout=4 * SECONDS, check=False)
        told, state = done.stdout, FAULT if done.returncode else LATE
        last = (done.stderr.decode().strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        told, state, last = error.stdout or b"", LATE, f"{4 * SECONDS} s of the clock in all"
    found: dict[str, Any] = dict.fromkeys(("macs", "params", "profile_s", "peak_mib"))
    cells: dict[str, Any] = {}
    for part in map(json.loads, told.splitlines()):
        cells |= part.pop("cells", {})
        found |= part
    cells = {name: cells.get(name, {"state": state, "reason": last}) for name in COLUMNS}
    head = {"network": entry.name, "source": entry.source, "pixels": entry.pixels}
    return {**head, **found, "seconds": round(time.perf_counter() - started, 1), "cells": cells}


class OverTime(BaseException):
    """A step took too long; no `except` of the code that is tried may catch it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OverTime` in the block once it took so long of a core: other work beside it does not count."""

    def late(*_: object) -> None:
        raise OverTime(f"{seconds:.0f} s")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def tried(entry: Entry) -> Iterator[dict[str, Any]]:
    """Yield the parts of a network's row as they are known: its costs, then a cell for each method."""
    ends = time.process_time() + SECONDS
    images = torch.rand(IMAGES, 3, entry.pixels, entry.pixels, generator=torch.Generator().manual_seed(1))
    teacher = network(entry, images)
    started = time.process_time()
    try:
        with at_most(PROFILE_SECONDS):
            found = profile(teacher, images)
    except (OverTime, MethodError) as error:
        told = {"state": LATE if isinstance(error, OverTime) else "unsupported", "reason": f"its profile: {error}"}
        yield {"macs": count_macs(teacher, images), "cells": dict.fromkeys(COLUMNS, told)}
        return
    yield {"macs": found.macs, "params": found.params, "profile_s": round(time.process_time() - started, 2)}
    shared: dict[SharedShard, Scores] = {}
    for left, name in zip(range(len(COLUMNS), 0, -1), COLUMNS, strict=True):
        subject = Subject(teacher, images, found, shared, {})
        try:
            parts = 2 if name == COLUMNS[0] else left  # the first that cuts channels scores for all three
            with at_most(max((ends - time.process_time()) / parts, 1)):
                cell = met(METHODS[name], subject)
        except OverTime as error:
            cell = {"state": LATE, "reason": f"its part of the time, {error}"}
        except Infeasible as error:
            cell = {"state": "infeasible", "reason": str(error)}
        except MethodError as error:
            cell = {"state": "unsupported", "reason": str(error)}
        except Exception as error:  # noqa: BLE001 - faults are what this looks for
            cell = {"state": FAULT, "reason": f"{type(error).__name__}: {error}".split("\n")[0]}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        yield {"cells": {name: cell | {"seconds": subject.seconds}}, "peak_mib": peak}


class Subject(NamedTuple):
    """A network that methods are tried on, the scores that they share, and the seconds of each step so far."""

    teacher: nn.Module
    images: Tensor
    found: Profile
    shared: dict[SharedShard, Scores]
    seconds: dict[str, float]

    def timed(self, step: str, work: Callable[[], Any]) -> Any:
        """Do a step's work and note its seconds."""
        started = time.process_time()
        try:
            return work()
        finally:
            self.seconds[step] = round(time.process_time() - started, 2)


def met(method: Method, subject: Subject) -> dict[str, Any]:
    """Return the cell of a budget that the student meets as counted, or the method's refusal.

    Raises:
        MethodError: no plan fits, or the network cannot be scored.
        AssertionError: the student is not what its plan says.
    """
    teacher, images, found, *_ = subject
    if refusal := method.accepts(found):
        return {"state": "unsupported", "reason": refusal}
    budget = Budget(f"{SHARE} %", macs=SHARE * found.macs // 100, channels=CHANNELS)
    scores = subject.timed("score", lambda: scored(method, subject))
    plan = subject.timed("plan", lambda: method.allocate(scores, found, budget, defaults(method)))
    student = subject.timed("build", lambda: method.apply(teacher, plan, images))
    method.settle(student, plan, images)
    planned, counted = (plan.macs, plan.params), (count_macs(student, images), count_params(student))
    assert planned == counted, f"planned (MACs, params) {planned}, counted {counted}"
    spent = float(student.instance_macs(images).double().mean()) if isinstance(student, PerInput) else counted[0]
    assert spent <= (budget.macs or 0), f"the student needs {spent} MACs of {budget.macs}"
    assert student(images).isfinite().all(), "the student's outputs are not finite"
    return {"state": "met", "share": spent / found.macs, "params": counted[1] / found.params}


def scored(method: Method, subject: Subject) -> Scores:
    """Score all shards; those that methods share were scored by the first of them."""
    partials = []
    for shard in method.shards(subject.found, subject.images):
        if not isinstance(shard, SharedShard):
            partials.append(method.score(shard, subject.teacher, subject.images, 0))
            continue
        if shard not in subject.shared:
            subject.shared[shard] = method.score(shard, subject.teacher, subject.images, 0)
        partials.append(subject.shared[shard])
    return method.merge(partials, subject.found)


def shown(cell: Mapping[str, Any]) -> str:
    """Show a cell in a word."""
    return f"{cell['share']:.1%}" if cell["state"] == "met" else str(cell["state"])


def page(kept: Mapping[str, Any]) -> str:
    """Write docs/zoo.md of the results, in the words of `zoo.md` beside this file."""
    rows, made = kept["runs"], kept["made"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    states = Counter(cell["state"] for row in rows for cell in row["cells"].values())
    table = [
        f"| `{row['network']}` | {row['source']} | {row['pixels']} | {row['macs'] / 1e6:,.1f}M | "
        f"{'-' if row['profile_s'] is None else format(row['profile_s'], '.1f')} | "
        f"{' | '.join(map(shown, row['cells'].values()))} |"
        for row in rows
    ]
    return (Path(__file__).with_suffix(".md").read_text()).format(
        networks=len(rows),
        sources=" and ".join(f"{n} of {source}" for source, n in Counter(row["source"] for row in rows).items()),
        counts=", ".join(f"{states[state]} {state}" for state in STATES),
        made=f"{made['date']}, one core of a virtual {made['processor']} beside other work; {versions}",
        methods=" | ".join(f"`{name}`" for name in COLUMNS),
        lines="---|---|---:|---:|---:|" + "---:|" * len(COLUMNS),
        table="\n".join(table),
        reasons="\n".join(line for row in rows for line in reasons(row)),
        **kept["settings"],
    )


def reasons(row: Mapping[str, Any]) -> list[str]:
    """List why a network's cells are not met; methods that say the same but their names share a line."""
    told: dict[str, list[str]] = {}
    for method, cell in row["cells"].items():
        if cell["state"] != "met":
            reason = cell["reason"].replace(f"budget '{SHARE} %' ", "").replace(f"{method} ", "it ", 1)
            told.setdefault(f"{cell['state']}. {reason}", []).append(f"`{method}`")
    lines = [f"  - {', '.join(methods)}: {reason}" for reason, methods in told.items()]
    return [f"- **`{row['network']}`**", *lines] if lines else []


if __name__ == "__main__":
    main()

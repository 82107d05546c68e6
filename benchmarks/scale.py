"""The number of workers that one driver keeps busy: the real search loop, stores and planning, simulated trials.

    python benchmarks/scale.py --workers 8 64 256 1024 --plot docs/scale.svg
    python benchmarks/scale.py --workers 256 --trials 10000

Scoring, plans, Optuna's journal and MLflow's SQLite store are real; only trials are not run. A virtual worker takes as
long as a recorded trial did, scaled so that a whole one takes `--seconds` on average, and reports five rungs and a
made-up top-1. The virtual clock runs by the driver's own seconds while the driver works, and jumps to the next
report while it waits. `--clock cpu` counts the driver's CPU seconds, which depend little on the machine's other work
but miss waits for the disk; `--clock wall` counts those too and wants a quiet machine.

Utilisation is the share of all workers' time in which they train: overall from the first trial's begin to the last
one's end, steady from when every worker has had a trial to when the last one is handed out. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import heapq
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from itertools import count, pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import yaml

from cluster import Done, Event, InlineCluster, Step, Stopped
from cluster.base import Item, always
from methods.base import Plan
from methods.pipeline import Outcome, Progress, trial
from methods.training import Recipe
from search.devices.stopwatch import Stopwatch
from search.driver import loop, runner
from search.driver.study import BudgetStudy
from search.record.record import Record
from search.record.searches import find_search
from search.report.html import html
from search.spec import reading, schema
from search.workload import Workload

mpl.use("svg")
from matplotlib import pyplot as plt

RECORDED_S = (
    *(3.4, 3.9, 4.1, 6.4, 7.1, 9.7, 9.9, 10.3, 11.3, 12.8, 14.1, 15.0, 17.3, 23.5, 27.3, 30.7, 33.2, 34.0, 35.8),
    *(37.1, 40.8, 49.0),
)
"""Seconds of a worker per trial of `search_quality.py fashion-mnist`, random search, 2026-11-22; none stopped early."""

ROUNDS, LEAST, BLOCK = 6, 200, 1000
"""Trials per worker and at least, without `--trials`; and between two readings of the driver's seconds."""

SPEC: dict[str, Any] = {
    "name": "scale",
    "model": {"source": "zoo", "name": "resnet14", "weights": "train"},
    "data": {"source": "digits", "validation": 0.3, "calibration": 256},
    "methods": ["itpruner", "manidp", "practise", "alds"],
    "devices": {"rock": {"runtime": "profile", "file": "rock.yaml"}},
    "budgets": [{"name": f"macs-{share}", "macs_expected": f"{share}%"} for share in (10, 20, 40, 60)],
    "recovery": {"steps": 400},
}

ACCOUNTS: dict[str, list[tuple[Any, str]]] = {
    "ask": [(BudgetStudy, "ask")],
    "report": [(BudgetStudy, "goes_on")],
    "tell": [(BudgetStudy, "tell"), (BudgetStudy, "tell_stopped")],
    "MLflow": [(Record, name) for name in vars(Record) if not name.startswith("_")],
    "plan": [(runner, "fit")],
    "latency": [(Stopwatch, "time")],
}
"""The calls by which the driver's seconds are told apart; the rest is the loop's own."""


def main() -> None:
    """Run every setting and print its tables."""
    parser = argparse.ArgumentParser(description="Utilisation and driver seconds per trial by the number of workers.")
    parser.add_argument("--workers", type=int, nargs="+", default=[256])
    parser.add_argument("--trials", type=int, help=f"in all; {ROUNDS} per worker, at least {LEAST}, if not given")
    parser.add_argument("--seconds", type=float, default=60, help="of a whole trial, on average")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--plot", type=Path, help="an .svg file")
    given = parser.parse_args()
    if given.trials is not None and given.trials < 2 * max(given.workers):
        parser.error(f"--trials is {given.trials}; expected at least two per worker; give more, or fewer workers")
    torch.set_num_threads(1)
    books, clock, found = Books(), CLOCKS.index(given.clock), list[Ledger]()
    for workers in given.workers:
        found.append(run(workers, given.trials or max(ROUNDS * workers, LEAST), books, clock, given.seconds))
        print(growth(found[-1]), flush=True)
    print(table(found))
    if given.plot is not None:
        draw(found, given.plot, f"{given.seconds:g} s a trial, {given.clock} clock")


CLOCKS = ("cpu", "wall")


def now() -> np.ndarray:
    """This process's CPU seconds and the wall clock's, `(2,)` as `CLOCKS`."""
    return np.array([process_time(), perf_counter()])


class Books:
    """Seconds `(2,)` by account: those of its calls, less those of calls of other accounts inside them."""

    def __init__(self) -> None:
        self.spent: dict[str, np.ndarray] = {name: np.zeros(2) for name in ACCOUNTS}
        self._inside: list[np.ndarray] = [np.zeros(2)]
        for account, calls in ACCOUNTS.items():
            for owner, name in calls:
                setattr(owner, name, self._counted(getattr(owner, name), account))

    def clear(self) -> None:
        """Begin anew."""
        self.spent = {name: np.zeros(2) for name in ACCOUNTS}

    def _counted(self, call: Callable[..., Any], account: str) -> Callable[..., Any]:
        @wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            began = now()
            self._inside.append(np.zeros(2))
            try:
                return call(*args, **kwargs)
            finally:
                whole = now() - began
                self.spent[account] = self.spent[account] + whole - self._inside.pop()
                self._inside[-1] += whole

        return counted


@dataclass
class Ledger:
    """The times of a simulated search: virtual seconds, and the driver's own, `(2,)` as `CLOCKS`.

    `busy` are the spans in which a worker trained, `begun` and `ended` the moments of trials, `readings` the accounts
    after each `BLOCK` of them. Afterwards the record was read back in `read_s` and drawn in `report_s`.
    """

    workers: int
    busy: list[tuple[float, float]] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    driver_s: np.ndarray = field(default_factory=lambda: np.zeros(2))
    read_s: np.ndarray = field(default_factory=lambda: np.zeros(2))
    report_s: np.ndarray = field(default_factory=lambda: np.zeros(2))
    readings: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def overall(self) -> float:
        """Utilisation from the first trial's begin to the last one's end."""
        return self._busy_share(self.begun[0], self.ended[-1])

    @property
    def steady(self) -> float:
        """Utilisation from the moment when every worker has had a trial to the one when the last is handed out."""
        return self._busy_share(self.begun[self.workers - 1], self.begun[-1])

    def _busy_share(self, start: float, end: float) -> float:
        spans = np.clip(np.array(self.busy), start, end)
        return float((spans[:, 1] - spans[:, 0]).sum() / (self.workers * (end - start)))


@dataclass
class Job:
    """A trial on a virtual worker: its item, its rungs, the seconds between two, and the number it has passed."""

    index: int
    plan: Plan
    recipe: Recipe
    chance: np.random.Generator
    rungs: int
    rung_s: float
    passed: int = 0


class Ended(Exception):
    """The end of the loop: the next step, registering the winners, would need students that were trained."""


class VirtualCluster:
    """Workers that take virtual seconds for trials; everything else is computed here and now.

    As with Ray's, an idle worker gets its next trial when the driver next hands out, and one that reports waits until
    the driver has answered.
    """

    def __init__(self, workload: Workload, ledger: Ledger, books: Books, *, clock: int, mean_s: float) -> None:
        self._inline = InlineCluster(workload.worker_inputs())
        self._ledger = ledger
        self._books = books
        self._clock = clock
        self._pace = mean_s / float(np.mean(RECORDED_S))
        self._skipped = 0.0
        self._coming: list[tuple[float, int, Job, Event]] = []
        self._order = count()

    def run(
        self, function: Callable[..., Any], items: Iterable[Item], go_on: Callable[[int, Any], bool] = always
    ) -> Iterator[Event]:
        """See `Cluster.run`."""
        if function is trial:
            return self._trials(iter(items), go_on)
        return self._inline.run(function, items, go_on)

    def alone(self, function: Callable[..., Any], items: Iterable[Item], *args: Any) -> Iterator[Event]:
        """See `Cluster.alone`."""
        return self._inline.alone(function, items, *args)

    def close(self) -> None:
        """End the benchmark."""
        raise Ended

    def _trials(self, items: Iterator[Item], go_on: Callable[[int, Any], bool]) -> Iterator[Event]:
        idle = self._ledger.workers
        while True:
            while idle and (item := self._charged(next, items, None)) is not None:
                idle -= 1
                self._begin(item)
            if not self._coming:
                return
            when, _, job, event = heapq.heappop(self._coming)
            self._skipped += max(0.0, when - self._time())
            began = now()
            yield event
            self._ledger.driver_s += now() - began
            if isinstance(event, Step):
                self._go_on(job, self._charged(go_on, event.index, event.value))
            else:
                idle += 1
                self._end()

    def _charged(self, call: Callable[..., Any], *args: Any) -> Any:
        """Return a call's result to the driver; virtual time runs meanwhile."""
        began = now()
        found = call(*args)
        self._ledger.driver_s += now() - began
        return found

    def _time(self) -> float:
        """Virtual seconds since the first trial was asked for."""
        return float(self._ledger.driver_s[self._clock]) + self._skipped

    def _begin(self, item: Item) -> None:
        _, plan, recipe, seed = item
        chance = np.random.default_rng(seed)
        rungs = -(-recipe.steps // recipe.report_every)
        seconds = self._pace * float(chance.choice(RECORDED_S))
        self._train(Job(len(self._ledger.begun), plan, recipe, chance, rungs, seconds / rungs))
        self._ledger.begun.append(self._time())

    def _train(self, job: Job) -> None:
        """Let a worker train up to its next rung."""
        start = self._time()
        job.passed += 1
        step = min(job.passed * job.recipe.report_every, job.recipe.steps)
        value = Progress(step, job.recipe.steps, top1(job.plan, job.recipe, step, job.chance))
        self._ledger.busy.append((start, start + job.rung_s))
        self._announce(start + job.rung_s, job, Step(job.index, value))

    def _go_on(self, job: Job, is_wanted: bool) -> None:
        seconds = job.passed * job.rung_s
        if not is_wanted:
            self._announce(self._time(), job, Stopped(job.index, seconds))
        elif job.passed == job.rungs:
            self._announce(self._time(), job, Done(job.index, outcome(job, seconds), seconds))
        else:
            self._train(job)

    def _announce(self, when: float, job: Job, event: Event) -> None:
        heapq.heappush(self._coming, (when, next(self._order), job, event))

    def _end(self) -> None:
        self._ledger.ended.append(self._time())
        if len(self._ledger.ended) % BLOCK == 0:
            self._ledger.readings.append(accounts(self._books, self._ledger))


def top1(plan: Plan, recipe: Recipe, step: int, chance: np.random.Generator) -> float:
    """A made-up top-1 after so many steps: less for deeper cuts and for learning rates far from 0.06, with some noise.

    `plan.loss` is on each method's own scale, so the cut is told by params.
    """
    depth = 1 / (1 + plan.params / 20_000)
    best = 0.98 - 0.1 * depth - 0.01 * np.log(recipe.learning_rate / 0.06) ** 2
    return float(np.clip(best - 0.2 * np.exp(-3 * step / recipe.steps) + chance.normal(0, 0.005), 0, 1))


def outcome(job: Job, seconds: float) -> Outcome:
    """The outcome of such a trial; its state has as many numbers as the student would have."""
    plan, reached = job.plan, top1(job.plan, job.recipe, job.recipe.steps, job.chance)
    return Outcome(
        top1_surgery=reached / 4, top1_bn=reached / 2, top1_validation=reached, macs=plan.macs, params=plan.params,
        size_bytes=4 * plan.params, seconds=seconds, state={"weights": np.zeros(plan.params, np.float32)},
        macs_expected=plan.macs_expected,
    )  # fmt: skip


def run(workers: int, trials: int, books: Books, clock: int, mean_s: float) -> Ledger:
    """One search of so many trials in all, in a folder of its own."""
    ledger, before = Ledger(workers), Path.cwd()

    def cluster(workload: Workload) -> VirtualCluster:
        books.clear()
        return VirtualCluster(workload, ledger, books, clock=clock, mean_s=mean_s)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rock.yaml").write_text("{macs_per_s: 1.0e+9, bytes_per_s: 1.0e+9, overhead_us: 10}\n")
        settings = {"trials": -(-trials // len(SPEC["budgets"])), "timeout": "24h", "asynchronous": True}
        spec = reading.parse(yaml.safe_dump(SPEC | {"search": settings}), folder=Path(folder))
        os.chdir(folder)
        try:
            loop.search(spec, cluster, lambda *_: None)
        except Ended:
            ledger.readings.append(accounts(books, ledger))
            look_back(spec, ledger)
        finally:
            os.chdir(before)
    return ledger


def look_back(spec: schema.SearchSpec, ledger: Ledger) -> None:
    """Read the whole record, as the end of a search does, and its resumption first of all."""
    began = now()
    found = find_search(spec.tracking.uri, spec.name).read.result()
    ledger.read_s = now() - began
    html(found)
    ledger.report_s = now() - began - ledger.read_s


def accounts(books: Books, ledger: Ledger) -> dict[str, np.ndarray]:
    """Driver seconds and trials so far: each account, `rest` and `driver`, the sum of all; `trials` twice."""
    whole, trials = ledger.driver_s.copy(), np.full(2, len(ledger.ended))
    return books.spent | {"rest": whole - sum(books.spent.values()), "driver": whole, "trials": trials}


COLUMNS = (*ACCOUNTS, "rest", "driver")


def table(found: Iterable[Ledger]) -> str:
    """One row per number of workers: utilisation, and driver milliseconds per trial by account, CPU (wall).

    `read` and `report` are the seconds, once, to read the whole record back and to draw it.
    """
    lines = [
        f"| workers | trials | a second | steady | overall | {' | '.join(COLUMNS)} | read, s | report, s |",
        f"|{'---:|' * (7 + len(COLUMNS))}",
    ]
    for one in found:
        rate = len(one.ended) / (one.ended[-1] - one.begun[0])
        head = f"{one.workers:,} | {len(one.ended):,} | {rate:.2f} | {one.steady:.1%} | {one.overall:.1%}"
        tail = " | ".join(f"{cpu:.1f} ({wall:.1f})" for cpu, wall in (one.read_s, one.report_s))
        lines.append(f"| {head} | {_spent(one.readings[-1], None)} | {tail} |")
    return "\n".join(lines)


def growth(one: Ledger) -> str:
    """One row per `BLOCK` of trials: driver milliseconds per trial in it, CPU (wall)."""
    lines = [f"| {one.workers:,} workers, trials | {' | '.join(COLUMNS)} |", f"|---:|{'---:|' * len(COLUMNS)}"]
    for before, after in pairwise([None, *one.readings]):
        assert after is not None
        if before is None or after["trials"][0] > before["trials"][0]:
            lines.append(f"| {after['trials'][0]:,.0f} | {_spent(after, before)} |")
    return "\n".join(lines)


def _spent(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray] | None) -> str:
    def difference(name: str) -> np.ndarray:
        return after[name] if before is None else after[name] - before[name]

    cells = [1000 * difference(name) / difference("trials") for name in COLUMNS]
    return " | ".join(f"{cpu:.1f} ({wall:.1f})" for cpu, wall in cells)


def draw(found: list[Ledger], path: Path, title: str) -> None:
    """Utilisation by the number of workers."""
    figure, plane = plt.subplots(figsize=(7, 3.8), layout="constrained")
    workers = [one.workers for one in found]
    plane.plot(workers, [100 * one.steady for one in found], marker="o", label="steady")
    plane.plot(workers, [100 * one.overall for one in found], marker="o", label="overall")
    plane.axhline(95, color="grey", linewidth=0.8, linestyle="--")
    plane.set(xscale="log", xlabel="virtual workers", ylabel="utilisation, %", ylim=(0, 102), title=title)
    plane.set_xticks(workers, [f"{one:,}" for one in workers])
    plane.minorticks_off()
    plane.grid(alpha=0.3)
    plane.legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

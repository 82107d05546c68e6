"""The quality of every method's students beside Torch-Pruning's and FastNAS's: top-1 by share of the MACs.

    python benchmarks/quality.py
    python benchmarks/quality.py --full

ResNet-20 on Fashion-MNIST, one thread. Ours are planned and tried as a search does, with default knobs. The peers
are cut by their tools; then they get what ours get: norms re-estimated on the same images, and the same recovery from
the same teacher with the same seed. FastNAS runs where it is installed (`fastnas.py` says how). Each result is on disk
as soon as it is known, and a run goes on where an earlier one ended. `tables.py` makes docs/benchmarks.md of the
results.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fastnas
import torch
from peers import PEERS, within
from records import RESULTS, SCRATCH, begun, file_of, keep, write
from torch import Tensor, nn

from cluster.inline import InlineCluster
from methods import named
from methods.base import Budget, Infeasible
from methods.network import count_macs, count_params, profile
from methods.pipeline import Outcome, rebuild, trial
from methods.protocol import defaults
from methods.training import Recipe, evaluate, recalibrate, recover
from search.driver.planning.planner import Planner
from search.driver.study import RECOVERY
from search.spec import reading
from search.workload import Workload, loading

SPEC = Path(__file__).parents[1] / "examples" / "fashion_mnist.yaml"
THEIRS = (*PEERS, *([fastnas.ROW] if fastnas.IS_INSTALLED else []))
ROWS = ("channels+alds", "channels", "itpruner", "practise", "alds", "uniform", *THEIRS)
FEW_ROWS = ("channels+alds", "channels", *PEERS)
"""Those that are trained for longer as well."""

QUICK_ROWS = ("channels", "uniform", *PEERS)
"""Those that run without `--full`: minutes."""

SHARES = (50, 35, 25)
"""The budgets: percent of the teacher's MACs."""

CHANNELS = 8
"""The multiple that our widths stay at."""

STEPS, MORE_STEPS = 430, 1290
"""One and three epochs of the 55,000 training images."""

RECIPE = Recipe(steps=STEPS, batch_size=128, learning_rate=float(RECOVERY["learning_rate"].default), precision="bf16")
"""As a search trains its first trials. At twice the rate a refit student loses more than it learns: `channels` at 25 %
of the MACs went from 90.6 % to 85.3 % with one seed, and to 93.2 % at 0.03."""

HEAD = "| row | budget | seed | steps | MACs | params | as cut | untrained | validation | test | seconds |"


class Job(NamedTuple):
    """One student: a row of the table, a budget in percent of the MACs, and its training."""

    row: str
    share: int
    seed: int
    steps: int


class Subject(NamedTuple):
    """The network that is cut with the data that judge it, our planner for both, and the calibration images."""

    workload: Workload
    planner: Planner
    calibration: Tensor


def main() -> None:
    """Run the jobs whose results are missing, and print each."""
    parser = argparse.ArgumentParser(description="Top-1 by share of the MACs: our methods beside other tools.")
    parser.add_argument("--full", action="store_true", help="every row, budget, seed and length")
    parser.add_argument("--rows", nargs="*", choices=ROWS, help="these alone")
    parser.add_argument("--steps", type=int, default=STEPS, help="of recovery, without --full")
    parser.add_argument("--out", type=Path, help="where results are kept; with --full the committed ones")
    parser.add_argument("--students", type=Path, default=SCRATCH / "students", help="where ONNX files are kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    jobs = full() if given.full else (Job(row, SHARES[0], 0, given.steps) for row in given.rows or QUICK_ROWS)
    out = given.out or (RESULTS if given.full else SCRATCH) / "quality.json"
    subject = load()
    kept = begun(out, settings(subject), "torch", "torch-pruning", *fastnas.PACKAGES)
    kept.setdefault("teacher", judged(subject, subject.workload.teacher))
    print(f"results are in {out}\n\n{HEAD}\n|---|" + "---:|" * (HEAD.count("|") - 2))
    for job in jobs:
        if given.rows and job.row not in given.rows:
            continue
        found = next((run for run in kept["runs"] if job._asdict().items() <= run.items()), None)
        if found is None:
            found = job._asdict() | result(subject, job, given.students)
            kept["runs"].append(found)
            write(out, kept)
        print(line(found, kept["teacher"]["macs"]), flush=True)


def full() -> Iterator[Job]:
    """The jobs of the whole table, those first that make a table by themselves."""
    for seed, share, row in itertools.product((0, 1, 2), SHARES, ROWS):
        yield Job(row, share, seed, STEPS)
    for share, row in itertools.product((50, 25), FEW_ROWS):
        yield Job(row, share, 0, MORE_STEPS)


def load() -> Subject:
    """Load the committed teacher and its data."""
    workload = loading.load(reading.load(SPEC), lambda *_: None)
    found = profile(workload.teacher, workload.example)
    planner = Planner(workload, found, InlineCluster(workload.worker_inputs()), lambda *_: None)
    return Subject(workload, planner, torch.from_numpy(workload.splits.calibration.copy()))


def settings(subject: Subject) -> dict[str, Any]:
    """The settings that all results of a file share."""
    splits = subject.workload.splits
    assert splits.test is not None
    return {
        "spec": f"examples/{SPEC.name}",
        "images": {
            "calibration": len(splits.calibration),
            "validation": len(splits.validation),
            "test": len(splits.test),
        },
        "channels": CHANNELS,
        "recipe": {k: v for k, v in RECIPE.identity().items() if k not in ("steps", "report_every")},
    }


def result(subject: Subject, job: Job, students: Path) -> dict[str, Any]:
    """The figures of one student; the reason if no student of this row fits the budget."""
    started = time.perf_counter()
    recipe = dataclasses.replace(RECIPE, steps=job.steps, report_every=job.steps)
    try:
        student, before = (peer if job.row in THEIRS else ours)(subject, job, recipe)
    except Infeasible as error:
        return {"reason": str(error)}
    keep(file_of(students, job.row, job.share), student, subject.calibration)
    return before | judged(subject, student) | {"seconds": round(time.perf_counter() - started, 1)}


def ours(subject: Subject, job: Job, recipe: Recipe) -> tuple[nn.Module, dict[str, float]]:
    """Plan and try one of our methods or chains as a search does; also return top-1 before training.

    Raises:
        Infeasible: no plan fits the budget.
    """
    method = named(job.row)
    plan = subject.planner.plan(job.row, budget_of(subject, job.share), defaults(method))
    running = trial(subject.workload.worker_inputs(), method, plan, recipe, job.seed)
    try:
        while True:
            next(running)
    except StopIteration as end:
        outcome: Outcome = end.value
    student = rebuild(subject.workload.teacher, method, plan, outcome.state)
    return student, {"top1_surgery": outcome.top1_surgery, "top1_bn": outcome.top1_bn}


def peer(subject: Subject, job: Job, recipe: Recipe) -> tuple[nn.Module, dict[str, float]]:
    """Cut with another tool, then settle and train as `methods.pipeline.trial` does; also return its ratio and top-1.

    Raises:
        Infeasible: the tool does not reach the budget.
    """
    teacher, splits, metric = subject.workload.teacher, subject.workload.splits, subject.workload.metric
    limit = budget_of(subject, job.share).macs or 0
    if job.row == fastnas.ROW:
        student, found = fastnas.within(teacher, limit, splits.train, subject.calibration), {}
    else:
        student, ratio = within(teacher, job.row, limit, splits.train)
        found = {"pruning_ratio": ratio}
    surgery = evaluate(student, splits.validation, metric)
    recalibrate(student, subject.calibration)
    settled = evaluate(student, splits.validation, metric)
    for _ in recover(student, teacher, splits.train, recipe, job.seed):
        pass
    return student, found | {"top1_surgery": surgery, "top1_bn": settled}


def budget_of(subject: Subject, share: int) -> Budget:
    """The budget of `share` percent of the teacher's MACs."""
    return Budget(f"{share} %", macs=share * subject.planner.macs // 100, channels=CHANNELS)


def judged(subject: Subject, network: nn.Module) -> dict[str, float]:
    """The costs of a network, and its top-1 on the validation and the test images."""
    splits, metric = subject.workload.splits, subject.workload.metric
    assert splits.test is not None
    return {
        "macs": count_macs(network, subject.calibration[:1]),
        "params": count_params(network),
        "top1_validation": evaluate(network, splits.validation, metric),
        "top1_test": evaluate(network, splits.test, metric),
    }


def line(run: Mapping[str, Any], macs: int) -> str:
    """One result as a row of a Markdown table."""
    begin = f"| `{run['row']}` | {run['share']} % | {run['seed']} | {run['steps']} |"
    if "reason" in run:
        return f"{begin} - |" + " |" * 6
    top1 = " | ".join(f"{run[key]:.4f}" for key in ("top1_surgery", "top1_bn", "top1_validation", "top1_test"))
    return f"{begin} {run['macs'] / macs:.1%} | {run['params']:,} | {top1} | {run['seconds']:.0f} |"


if __name__ == "__main__":
    main()

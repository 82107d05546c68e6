"""What every method keeps of a network without any training: validation top-1 by share of the MACs.

    python benchmarks/untrained.py examples/fashion_mnist.yaml

Plans as a search makes them with default knobs, students as its trials build them, refit, no step of recovery. Prints a
Markdown table, and the seconds that a student took to build, refit and judge.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from cluster.inline import InlineCluster
from methods import named
from methods.base import Budget, Infeasible
from methods.network import profile
from methods.pipeline import look
from methods.protocol import defaults
from search.driver.planning.planner import Planner
from search.spec import reading
from search.workload import Workload, loading

METHODS = ("uniform", "itpruner", "channels", "practise", "alds", "practise+alds", "channels+alds")
SHARES = (50, 35, 25, 15, 10)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Validation top-1 of every method's student without any training.")
    parser.add_argument("spec", type=Path, help="a search whose teacher and data are taken")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--shares", nargs="*", type=int, default=list(SHARES), help="percent of the teacher's MACs")
    parser.add_argument("--channels", type=int, default=8, help="the device's preferred multiple")
    parser.add_argument("--as-cut", action="store_true", help="leave the weights as they were, not refit")
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = reading.load(given.spec)
    workload = loading.load(
        spec.model_copy(update={"recovery": spec.recovery.model_copy(update={"refit": not given.as_cut})}),
        lambda *_: None,
    )
    found = profile(workload.teacher, workload.example)
    planner = Planner(workload, found, InlineCluster(workload.worker_inputs()), lambda *_: None)
    print(f"| method | {' | '.join(f'{share} %' for share in given.shares)} | seconds |")
    print("|---|" + "---:|" * (len(given.shares) + 1))
    for name in given.methods:
        cells, seconds = [], 0.0
        for share in given.shares:
            started = time.perf_counter()
            budget = Budget(f"{share} %", macs=share * found.macs // 100, channels=given.channels)
            cells.append(cell(workload, planner, name, budget))
            seconds = time.perf_counter() - started
        print(f"| `{name}` | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


def cell(workload: Workload, planner: Planner, name: str, budget: Budget) -> str:
    """The top-1 of a method's student within a budget, and the share of the MACs that it uses where that is less."""
    method = named(name)
    try:
        plan = planner.plan(name, budget, defaults(method))
    except Infeasible:
        return "-"
    found = look(workload.worker_inputs(), method, plan).top1_bn
    used = plan.macs / planner.macs
    return f"{found:.3f}" + (f" ({used:.1%})" if used < 0.95 * (budget.macs or 0) / planner.macs else "")


if __name__ == "__main__":
    main()

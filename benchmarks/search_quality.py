"""The worth of a search's seconds: full search, random search and each method alone, hypervolume by device-seconds.

    python benchmarks/search_quality.py digits --seconds 110 --seeds 0 1 2
    python benchmarks/search_quality.py fashion-mnist --seconds 300 --seeds 0 1

Every arm searches the same budgets of expected MACs with the same workers, its own cache and its own store, until its
trials have spent that many seconds; the curves are read at the same device-seconds, scoring included. An arm that is on
disk already is read from there. Prints a Markdown table and draws the curves. Recovery is kept short, so that there is
something to search for: with more steps every arm ends within a few validation images of the others.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml

from cluster import RayCluster
from search.driver import loop
from search.driver.study import FULL, RANDOM, Strategy
from search.frontier import volume
from search.record import searches
from search.results import SearchResult
from search.spec import reading
from search.workload import loading
from search.workload.teacher import save_weights

mpl.use("svg")
from matplotlib import pyplot as plt

METHODS: list[Any] = ["itpruner", "manidp", "practise", "alds", ["practise", "alds"]]
ARMS: dict[str, tuple[list[Any], Strategy]] = {
    "full search": (METHODS, FULL),
    "random search": (METHODS, RANDOM),
    **{f"{name} alone": ([name], FULL) for name in METHODS if isinstance(name, str)},
}
SHARES = (5, 10, 20, 40)
"""The budgets: percent of the teacher's MACs, expected ones, so that gated models compete."""

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": {"source": "zoo", "name": "resnet14", "weights": "train"},
        "data": {"source": "digits", "validation": 0.3, "calibration": 256},
        "recovery": {"steps": 20},
    },
    "fashion-mnist": {
        "model": {"source": "zoo", "name": "resnet20", "weights": str(EXAMPLES / "fashion_mnist_resnet20.safetensors")},
        "data": {"source": "fashion-mnist", "validation": 0.0083333, "calibration": 128},
        "recovery": {"steps": 30, "batch_size": 32},
    },
}
AXIS = "macs_expected"


def main() -> None:
    """Run the missing arms, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description="Hypervolume against device-seconds: full, random, each method alone.")
    parser.add_argument("data", choices=SETTINGS)
    parser.add_argument("--seconds", type=float, default=300, help="device-seconds of each arm")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("paredown.quality"), help="where searches are kept")
    parser.add_argument("--plot", type=Path, help="an .svg file")
    given = parser.parse_args()
    folder = (given.out / given.data).resolve()
    teacher(given.data, folder)
    found: dict[str, list[SearchResult]] = {
        arm: [run(given.data, arm, seed, folder, given.seconds, given.workers) for seed in given.seeds] for arm in ARMS
    }
    shortest = min(given.seconds, *(curve(one)[-1][0] for results in found.values() for one in results))
    print(table(found, shortest))
    if given.plot is not None:
        draw(found, shortest, given.plot, given.data)


def wanted(name: str, arm: str, seed: int, seconds: float) -> dict[str, Any]:
    """The spec of one arm. Latency is not compared here, so its device is a roofline and costs nothing."""
    methods, _ = ARMS[arm]
    return SETTINGS[name] | {
        "name": "quality",
        "model": SETTINGS[name]["model"] | {"weights": "../teacher.safetensors"},
        "methods": methods,
        "devices": {"none": {"runtime": "profile", "file": "../roofline.yaml", "channels": 1}},
        "budgets": [{"name": f"macs-{share}", "macs_expected": f"{share}%"} for share in SHARES],
        "search": {"trials": 1000, "timeout": f"{seconds}s", "seed": seed},
    }


def teacher(name: str, folder: Path) -> None:
    """Train or fetch the teacher, once for all arms."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "roofline.yaml").write_text("{macs_per_s: 1.0e+9, bytes_per_s: 1.0e+9, overhead_us: 10}\n")
    path = folder / "teacher.safetensors"
    if path.is_file():
        return
    document = wanted(name, "full search", 0, 1) | {"model": SETTINGS[name]["model"]}
    made = loading.load(reading.parse(yaml.safe_dump(document), folder=folder / "arm"), lambda *_: None)
    save_weights(made.teacher, path)


def run(name: str, arm: str, seed: int, folder: Path, seconds: float, workers: int) -> SearchResult:
    """One arm's search, in as many sittings as it takes to spend its device-seconds; earlier ones count.

    Rounds are whole, so the timeout is set to end the last one a little after the seconds are spent.
    """
    place = folder / f"{arm.replace(' ', '-')}-{seed}"
    place.mkdir(exist_ok=True)
    uri = f"sqlite:///{place / 'paredown.db'}"
    result = searches.find_search(uri, "quality").read.result() if (place / "paredown.db").is_file() else None
    before = Path.cwd()
    while (spent := curve(result)[-1][0] if result else 0.0) < seconds:
        os.chdir(place)
        os.environ |= {"PAREDOWN_CACHE": str(place / "cache"), "RAY_worker_niceness": "0"}
        made = reading.parse(yaml.safe_dump(wanted(name, arm, seed, 1.2 * (seconds - spent) / workers)), folder=place)
        try:
            result = loop.search(made, _pool(workers), lambda *_: None, strategy=ARMS[arm][1])
        finally:
            os.chdir(before)
    assert result is not None
    return result


def _pool(workers: int) -> Callable[[loading.Workload], RayCluster]:
    return lambda made: RayCluster(made.worker_inputs(), max_parallel=workers)


def curve(result: SearchResult) -> list[tuple[float, float]]:
    """Device-seconds spent and hypervolume reached when each trial ended; scoring comes first."""
    order = sorted(result.candidates, key=lambda one: (one.ended, one.trial))
    spent = result.cost.device_s - sum(one.device_s for one in order)
    found = []
    for index, one in enumerate(order):
        spent += one.device_s
        found.append((spent, volume(result.teacher, order[: index + 1], AXIS)))
    return found


def reached(result: SearchResult, seconds: float) -> float:
    """The hypervolume after so many device-seconds."""
    return max((value for spent, value in curve(result) if spent <= seconds), default=0.0)


def table(found: Mapping[str, list[SearchResult]], seconds: float) -> str:
    """One row per arm: the hypervolume of each seed and their mean at half the seconds and at all of them."""
    lines = [
        f"| arm | after {seconds / 2:.0f} device-seconds | after {seconds:.0f} | each seed | trials | stopped |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for arm, results in found.items():
        half = np.mean([reached(one, seconds / 2) for one in results])
        whole = [reached(one, seconds) for one in results]
        seeds = ", ".join(f"{value:.4f}" for value in whole)
        trials = np.mean([one.cost.trials for one in results])
        stopped = np.mean([one.cost.stopped for one in results])
        lines.append(f"| {arm} | {half:.4f} | {np.mean(whole):.4f} | {seeds} | {trials:.0f} | {stopped:.0f} |")
    return "\n".join(lines)


def draw(found: Mapping[str, list[SearchResult]], seconds: float, path: Path, name: str) -> None:
    """The mean curve of each arm, the full search on top of the others."""
    axis = np.linspace(0, seconds, 400)
    figure, plane = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for arm, results in found.items():
        values = np.mean([[reached(one, at) for at in axis] for one in results], axis=0)
        is_full = arm == "full search"
        plane.plot(axis, values, label=arm, linewidth=2.5 if is_full else 1.2, zorder=3 if is_full else 2)
    ends = [reached(one, seconds) for results in found.values() for one in results]
    plane.set(
        xlabel="device-seconds", ylabel="hypervolume (expected MACs)", ylim=(min(ends) - 0.03, max(ends) + 0.01),
        xlim=(0, seconds), title=f"{SETTINGS[name]['model']['name']} on {name}",
    )  # fmt: skip
    plane.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""The specs of `examples/imagenet/` end to end on generated pictures: seconds and peak memory of each step.

    python benchmarks/imagenet.py

The pictures are 224 x 224 when they are read. The teachers have random weights, so nothing is downloaded; one trial of
two steps each, on CPUs. A step is `check`, then `search`, which exports and registers the winner, then loading the
winner by its alias and running it on one image. Memory is the sum of what the processes of a step, Ray's included, have
for themselves. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "imagenet"
CLASSES, TRAINING, HELD_OUT = 10, 20, 4
"""Folders of pictures, and the pictures in each, to train on and to test on."""

SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"root": "pictures", "validation": 0.2, "calibration": 16},
    "search": {"trials": 1},
    "recovery": {"steps": 2, "batch_size": 8},
    "cluster": {"gpus_per_trial": 0},
}
"""What differs from the example, besides the weights: all that says how much there is."""

PAREDOWN = (sys.executable, "-m", "search.cli")
LOAD = """
import mlflow, torch
mlflow.set_tracking_uri("sqlite:///paredown.db")
model = mlflow.pytorch.load_model("models:/{}")
assert model(torch.rand(1, 3, 224, 224)).shape == (1, 1000)
"""
EVERY = 0.2
"""Seconds between two looks at the memory."""


def main() -> None:
    """Run every step of every spec, and print the table."""
    parser = argparse.ArgumentParser(description="examples/imagenet end to end on generated pictures.")
    parser.add_argument("specs", nargs="*", default=sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
    given = parser.parse_args()
    print("| spec | step | seconds | peak memory |\n|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder, "pictures"))
        for name in given.specs:
            for step, command in steps(name, Path(folder)).items():
                seconds, memory = measured(command, Path(folder))
                print(f"| `{name}` | {step} | {seconds:.0f} | {memory / 2**30:.1f} GiB |", flush=True)


def draw(root: Path) -> None:
    """Write coloured noise of another size for every picture, as pictures of a data set differ."""
    made = np.random.default_rng(0)
    for part, each in (("train", TRAINING), ("val", HELD_OUT)):
        for label in range(CLASSES):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(each):
                height, width = made.integers(240, 400, 2)
                pixels = made.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((int(width), int(height))).save(folder / f"{index}.jpg")


def steps(name: str, folder: Path) -> dict[str, tuple[str, ...]]:
    """The commands for one spec, whose changed copy is written into the folder."""
    spec = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    for part, settings in SETTINGS.items():
        spec[part] = {**spec[part], **settings}
    del spec["model"]["weights"]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    alias = f"{name}@{spec['budgets'][0]['name']}"
    return {
        "check": (*PAREDOWN, "check", f"{name}.yaml"),
        "search": (*PAREDOWN, "search", f"{name}.yaml"),
        "load and run": (sys.executable, "-c", LOAD.format(alias)),
    }


def measured(command: tuple[str, ...], folder: Path) -> tuple[float, int]:
    """Run a command; return its seconds, and the most memory of its processes in bytes.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    started, most = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as told, subprocess.Popen(command, cwd=folder, stdout=told, stderr=told) as run:
        process = psutil.Process(run.pid)
        while run.poll() is None:
            most = max(most, sum(own(one) for one in (process, *children(process))))
            time.sleep(EVERY)
        if run.returncode:
            told.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {run.returncode}:\n{told.read()}")
    return time.perf_counter() - started, most


def children(process: psutil.Process) -> list[psutil.Process]:
    """All processes below one, none if it has just ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def own(process: psutil.Process) -> int:
    """The memory of a process that is not mapped from files or shared, in bytes."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss - memory.shared)


if __name__ == "__main__":
    main()

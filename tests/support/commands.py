"""Run the command line in this process, on a spec whose network and images are a user's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

THINGS = """
import numpy as np
import torch
from torch import nn

BATCH = []


def images(count=200, bad=0):
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, count)
    pixels = random.normal(0, 0.3, (count, 1, 8, 8)).astype(np.float32)
    pixels[np.arange(count), 0, 2 * labels] += 1
    pixels[:bad, 0, 3, 3] = np.nan
    return {"images": pixels, "labels": labels}


def lazy(**args):
    made = images(**args)
    return [(torch.from_numpy(image), int(label)) for image, label in zip(made["images"], made["labels"])]


class Net(nn.Sequential):
    def __init__(self, channels=1, width=16):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 24, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
        )


class Stubborn(Net):
    def forward(self, x):
        if self.training and len(x) > 2:
            raise RuntimeError("it will not learn")
        return super().forward(x)


def broken():
    raise ValueError("out of luck")


def watched(logits, labels):
    with open("threads", "w") as file:
        print(torch.get_num_threads(), file=file)
    return float((logits.argmax(1) == labels).float().mean())
"""

GOOD: dict[str, Any] = {
    "name": "tiny",
    "model": {"source": "factory", "name": "./things.py:Net"},
    "data": {"source": "factory", "name": "./things.py:images"},
    "methods": ["itpruner", "alds"],
    "budgets": [{"name": "half", "macs": "50%"}, {"name": "small", "macs": "70%", "params": "60%"}],
    "recovery": {"steps": 8, "batch_size": 32},
}


@dataclass(frozen=True)
class Ended:
    """The exit code of a command, and all that it printed."""

    code: object
    out: str
    err: str

    def reason(self, code: int) -> str:
        """The one paragraph on standard error that the command ended with, on one line."""
        assert self.code == code, self.err
        assert "Traceback" not in self.out + self.err
        _, found, paragraph = self.err.partition("paredown: ")
        assert found, self.err
        assert "paredown: " not in paragraph
        assert "\n\n" not in paragraph.strip()
        return " ".join(paragraph.split())


Run = Callable[..., Ended]


def write(folder: Path, **changes: Any) -> Path:
    """Write a spec file with the user's code beside it."""
    (folder / "things.py").write_text(THINGS)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def compress(spec: Path, method: str = "uniform", budget: str = "half", out: str | Path = "out") -> list[object]:
    return ["compress", spec, "--method", method, "--budget", budget, "--out", out]


def source(name: str, **args: Any) -> dict[str, Any]:
    return {"source": "factory", "name": f"./things.py:{name}", "args": args}

"""Workloads of a user's own code: a network of one convolution, and a few images to go with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from search.base import WorkloadError
from search.spec import SearchSpec, reading
from search.workload import Workload, loading

THINGS = """
import sys
import threading

import numpy as np
import torch
from torch import nn


def images(count=60, channels=1, side=8):
    random = np.random.default_rng(0)
    return {
        "images": random.random((count, channels, side, side), dtype=np.float32),
        "labels": np.arange(count) % 3,
    }


def network(width=4, classes=3, channels=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


def broken():
    raise ValueError("out of luck,\\nand out of lines")


def leaving():
    sys.exit(0)


def number():
    return 3


def agreement(logits, labels):
    return torch.tensor(0.25)


def nothing(logits, labels):
    return float("nan")


class Odd(BaseException):
    pass


def ending(logits, labels):
    sys.exit(0)


def odd(logits, labels):
    raise Odd("at all")


class Leaving(nn.Flatten):
    def forward(self, x):
        sys.exit(3)


class Holding(nn.Flatten):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Maps(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), -1, 1)


class Auxiliary(nn.Flatten):
    def forward(self, x):
        return (super().forward(x),) * 2 if self.training else super().forward(x)


class Summed(nn.Flatten):
    def forward(self, x):
        return super().forward(x).sum(0, keepdim=True)


class Untrainable(nn.Flatten):
    def forward(self, x):
        if self.training:
            raise RuntimeError("no training")
        return super().forward(x)


class Branching(nn.Flatten):
    def forward(self, x):
        return super().forward(x) * (1 if x.sum() > 0 else 2)


def lazily():
    from late import network

    return network()
"""


class StageReport:
    """A report that remembers the stages it was called with."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        self.stages.append(stage)


@contextmanager
def users_code(folder: Path) -> Iterator[None]:
    """Put `THINGS` into a folder, and forget all imports from it in the end."""
    before = set(sys.modules)
    (folder / "things.py").write_text(THINGS)
    yield
    assert str(folder) not in sys.path
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def spec(folder: Path, model: dict[str, Any], **changes: Any) -> SearchSpec:
    document = {
        "name": "tiny",
        "model": model,
        "data": {"source": "factory", "name": "./things.py:images"},
        "methods": ["itpruner"],
        "budgets": [{"name": "half", "macs": "50%"}],
    }
    return reading.parse(repr(document | changes), folder=folder)


def load(folder: Path, model: dict[str, Any], **changes: Any) -> Workload:
    return loading.load(spec(folder, model, **changes), StageReport())


def refused(folder: Path, model: dict[str, Any], **changes: Any) -> str:
    """Load a workload that is refused, and return the message, which has three parts on one line."""
    with pytest.raises(WorkloadError) as caught:
        load(folder, model, **changes)
    message = str(caught.value)
    assert "expected" in message
    assert message.count(";") >= 2
    assert "\n" not in message
    return message


def factory(name: str = "./things.py:network", **more: Any) -> dict[str, Any]:
    return {"source": "factory", "name": name} | more

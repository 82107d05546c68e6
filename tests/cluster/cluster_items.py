"""Functions that tests run on clusters, and the context beside which they run."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import ray

from cluster import (
    Done,
    Event,
)

CONTEXT = np.arange(4.0)
CPUS = 3
WORKERS = 2


def total(context: np.ndarray, factor: float) -> float:
    return float(context.sum() * factor)


def counted(context: np.ndarray, steps: int) -> Generator[int, None, str]:
    yield from range(steps)
    return f"{steps} steps beside {len(context)} numbers"


def hanging(context: np.ndarray, number: int, folder: str) -> Generator[int, None, int]:
    """Yield once; hang there at the first call."""
    yield number
    if not Path(folder, f"{number}").exists():
        Path(folder, f"{number}").touch()
        threading.Event().wait()
    return number


def refusing(context: np.ndarray, number: int) -> int:
    if number == 1:
        raise ValueError(f"no {number}")
    if number == 3:
        raise SystemExit(3)
    return number


def dying(context: np.ndarray, number: int, folder: str, deaths: int) -> int:
    """Kill its process the first `deaths` times it is called; the files count across processes."""
    died = len(list(Path(folder).glob(f"{number}-*")))
    if died < deaths:
        Path(folder, f"{number}-{died}").touch()
        os._exit(1)
    return number


def careful(context: np.ndarray, folder: str) -> Generator[str, None, None]:
    """Leave a file after each step it got beyond, and one at the end, also if it is stopped."""
    try:
        for step in "abc":
            yield step
            Path(folder, step).touch()
    finally:
        Path(folder, "end").touch()


def telling_its_process(context: np.ndarray, steps: int) -> Iterator[int]:
    for _ in range(steps):
        yield os.getpid()


def held() -> tuple[int, dict[str, float], str | None]:
    """The process of a Ray worker, its share of Ray's resources, and the GPUs it sees."""
    resources = ray.get_runtime_context().get_assigned_resources()
    return os.getpid(), resources, os.environ.get("CUDA_VISIBLE_DEVICES")


def lock(context: np.ndarray) -> object:
    return threading.Lock()


def results(events: Iterable[Event]) -> dict[int, object]:
    """The values of the items that were done."""
    return {event.index: event.value for event in events if isinstance(event, Done)}


def agreeing(index: int, value: object) -> bool:  # unlike `always`, each step waits for it
    return True

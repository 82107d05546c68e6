"""Latency of several callables under the same conditions: interleaved, in one process, after warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Wall time of one call, in milliseconds: the least, the median and the 95th percentile."""

    min: float
    p50: float
    p95: float


def interleaved(calls: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 5) -> dict[str, Latency]:
    """The latency of each call, taken in turn (A B A B ...), so that what disturbs one disturbs all.

    Args:
        calls: what to time, by name; each must be done when it returns.
        rounds: timed calls of each, at least 1.
        warmup: untimed calls of each before that.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter_ns()
            call()
            times[name].append((time.perf_counter_ns() - started) / 1e6)
    return {
        name: Latency(min(taken), float(np.percentile(taken, 50)), float(np.percentile(taken, 95)))
        for name, taken in times.items()
    }

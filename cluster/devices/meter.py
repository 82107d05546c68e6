"""Measure several networks under the same conditions: interleaved, in one process, after warm-up, and alone."""

from __future__ import annotations

import fcntl
import gc
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.devices.runtimes import Program, Runtime, loaded

logger = logging.getLogger(__name__)

NOISE = 0.1
"""Medians that lie farther above the fastest call than this share of it are too noisy: 0.02 to 0.09 where no other
work runs, 0.4 to 0.9 beside other work."""

ATTEMPTS = 4
"""The most sessions that are held while all are noisy; the quietest is kept."""


@dataclass(frozen=True)
class Latency:
    """Wall time of one call, in milliseconds: the least, the median and the 95th percentile."""

    min: float
    p50: float
    p95: float


@dataclass(frozen=True)
class Reading:
    """The latency of each program in the quietest session, and the noise of that session.

    `noise` is the largest share over its programs by which the median lies above the fastest call of any session;
    `is_noisy` says that it was more than `NOISE` after all attempts.
    """

    latency: Mapping[str, Latency]
    noise: float
    is_noisy: bool


def measure(programs: Mapping[str, Program], runtime: Runtime, images: NDArray[np.float32]) -> Reading:
    """Measure every program on this machine, in turn, while no other meter of this user runs here.

    Args:
        programs: the networks by name, of the type that `runtime` takes.
        images: `(n, c, h, w)`; the first `runtime.batch` of them are used, repeated where they are too few.

    Raises:
        TypeError: the runtime does not run such programs.
        ValueError: a program was exported for another batch.
        RuntimeError: the runtime is `torch-compiled`, and there is no C++ compiler.
    """
    with exclusive(), ExitStack() as stack:
        return quietest({name: stack.enter_context(loaded(one, runtime, images)) for name, one in programs.items()})


def quietest(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.25,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Reading:
    """Hold up to `ATTEMPTS` sessions, which end with the first that is not noisy; return the quietest.

    A session is compared with the fastest call of all of them, since some processors run slower for seconds.
    A session has at least 30 rounds, and lasts at least `seconds` for each call on average.

    Args:
        clock: nanoseconds since some moment.
    """
    warm = interleaved(calls, rounds=5, clock=clock)
    round_ms = sum(latency.p50 for latency in warm.values())
    rounds = max(30, math.ceil(len(calls) * seconds * 1e3 / round_ms))
    sessions: list[dict[str, Latency]] = []
    while True:
        sessions.append(interleaved(calls, rounds=rounds, clock=clock))
        fastest = {name: min(session[name].min for session in sessions) for name in calls}
        noises = [max(session[name].p50 / fastest[name] - 1 for name in calls) for session in sessions]
        noise = min(noises)
        if noise <= NOISE or len(sessions) == ATTEMPTS:
            return Reading(sessions[noises.index(noise)], noise, is_noisy=noise > NOISE)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 5,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Latency]:
    """Time each call, in turn (A B A B ...), so that a disturbance of one disturbs all.

    Args:
        calls: the functions to time, by name; each must be done when it returns.
        rounds: timed calls of each, at least 1.
        warmup: untimed calls of each before that.
        clock: nanoseconds since some moment.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    with _no_collection():
        for _ in range(rounds):
            for name, call in calls.items():
                started = clock()
                call()
                times[name].append((clock() - started) / 1e6)
    return {
        name: Latency(min(taken), float(np.percentile(taken, 50)), float(np.percentile(taken, 95)))
        for name, taken in times.items()
    }


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running inside a timed call."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def exclusive() -> Iterator[None]:
    """Wait until no other process of this user measures on this machine, and keep others waiting meanwhile.

    The system frees the lock when its process ends, however that ends. Do not enter it twice in one process.
    """
    path = Path(tempfile.gettempdir()) / f"paredown-meter-{os.getuid()}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another search measures on this machine; waiting for its end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def identity(runtime: Runtime) -> dict[str, str]:
    """The facts that figures depend on beside network, threads and batch: `host`, `processor`, `runtime`, `version`."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "runtime": runtime.kind,
        "version": runtime.version,
    }


def _processor() -> str:
    """The processor's model as Linux names it, or the board's if Linux names that instead."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return entries.get("Model") or entries.get("model name") or platform.machine()

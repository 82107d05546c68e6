"""Pieces of scoring work put together to shards that are worth sending, and that do not outgrow a worker's memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from methods.base import Shard

WORK_PER_SECOND = 2e10
"""One core's rate in multiply-adds."""

BUNDLE_SECONDS, BUNDLE_BYTES = 0.2, 1 << 29
"""Tasks are bundled up to this predicted time, far above the cost of sending one, or up to this much memory."""

FORWARDS = 3
"""A bundle that passes the calibration images through the network has work for this many passes, memory permitting."""


def bundles(
    kind: str, tasks: Iterable[tuple[tuple[Any, ...], float, int]], *, macs: int = 0
) -> list[tuple[float, Shard]]:
    """Bundle tasks of (task, seconds, bytes) as shards `(kind, task, ...)`, each with its seconds, the longest first.

    Args:
        macs: multiply-accumulates of what every bundle does once, such as a pass of the calibration images.
    """
    enough = max(BUNDLE_SECONDS, FORWARDS * macs / WORK_PER_SECOND)
    found: list[tuple[float, Shard]] = []
    bundle: Shard = (kind,)
    spent, held = 0.0, 0
    for task, seconds, size in sorted(tasks, key=lambda item: -item[1]):
        if len(bundle) > 1 and (spent >= enough or held + size > BUNDLE_BYTES):
            found.append((spent, bundle))
            bundle, spent, held = (kind,), 0.0, 0
        bundle, spent, held = (*bundle, task), spent + seconds, held + size
    return [*found, (spent, bundle)] if len(bundle) > 1 else found

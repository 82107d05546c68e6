"""Recovery on several workers: what a spec may not ask for together with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unshareable(raw: Mapping[str, Any]) -> list[str]:
    """Why the workers that the document `raw` asks for cannot share a recovery; works before types are checked.

    >>> unshareable({"recovery": {"workers": 4, "batch_size": 2}})
    ['recovery.workers: 4 are too many for batches of 2 images; give each worker one at least']
    """
    recovery, cluster = (found if isinstance(found := raw.get(key), dict) else {} for key in ("recovery", "cluster"))
    workers = _number(recovery, "workers", 1)
    if workers is None or workers < 2:
        return []
    reasons = []
    sizes = [size for key in ("batch_size", "images") if (size := _number(recovery, key, 128)) is not None]
    if (size := min(sizes, default=workers)) < workers:
        reasons.append(f"{workers:g} are too many for batches of {size:g} images; give each worker one at least")
    most = _number(cluster, "max_parallel", workers)
    if most is not None and most < workers:
        reasons.append(f"{workers:g} are more than cluster.max_parallel, {most:g}; raise that, or lower this")
    gpus = _number(cluster, "gpus_per_trial", 0)
    if gpus is not None and 0 < gpus < 1:
        reasons.append(
            f"{workers:g} workers cannot share a GPU, and cluster.gpus_per_trial is {gpus:g} for each; give each a "
            "whole one, or none"
        )
    return [f"recovery.workers: {reason}" for reason in reasons]


def _number(section: Mapping[str, Any], key: str, default: float) -> float | None:
    """The number at `key`, or None where there is something else."""
    value = section.get(key, default)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None

"""Scores of every method, once per workload: cached by content, computed on the cluster in shards, merged exactly."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import Cluster, Done, Failed
from methods.base import Method, ScoreError, Scores
from methods.pipeline import score
from methods.profile import Profile
from search import cache
from search.base import Report
from search.workload import Workload

VERSION = 1
"""Raised whenever a method's scores change meaning, so that cached ones are made anew."""


def scores(
    methods: Sequence[Method], workload: Workload, profile: Profile, cluster: Cluster, report: Report
) -> dict[str, Scores]:
    """The scores of each method, by name. Those in the cache cost nothing.

    Raises:
        ScoreError: a shard raised; the message is its own.
    """
    paths = {method.name: _path(method, workload) for method in methods}
    found = {name: kept for name, path in paths.items() if (kept := _read(path)) is not None}
    missing = [method for method in methods if method.name not in found]
    calibration = torch.from_numpy(workload.splits.calibration.copy())
    items = [(method, shard, 0) for method in missing for shard in method.shards(profile, calibration)]
    partials: dict[str, list[Scores]] = {method.name: [] for method in missing}
    report("scoring", 0, len(items), "")
    done = 0
    for event in cluster.run(score, items):
        if isinstance(event, Failed):
            raise ScoreError(f"scoring for {items[event.index][0].name} failed: {event.error}")
        if isinstance(event, Done):
            done += 1
            partials[items[event.index][0].name].append(event.value)
            report("scoring", done, len(items), items[event.index][0].name)
    for method in missing:
        found[method.name] = method.merge(partials[method.name], profile)
        _write(paths[method.name], found[method.name])
    return found


def _path(method: Method, workload: Workload) -> Path:
    key = hashlib.blake2b(f"{VERSION} {method!r} {workload.fingerprint}".encode(), digest_size=16).hexdigest()
    return cache.folder() / "scores" / f"{key}.npz"


def _read(path: Path) -> Scores | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, EOFError):
        return None


def _write(path: Path, values: Mapping[str, np.ndarray]) -> None:
    if values:
        cache.keep(path, lambda place: np.savez(place, **dict[str, Any](values)))

"""Scores, cached by content and computed on the cluster in shards that merge exactly, and the plans made of them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from cluster import Cluster, Done, Failed
from methods import METHODS, named
from methods.base import Budget, KnobValue, Plan, ScoreError, Scores
from methods.chain import plan_of, student_of
from methods.network import Profile, profile
from methods.pipeline import Before, score
from methods.protocol import Method
from search import cache
from search.base import Report
from search.workload import Workload

VERSION = 2
"""Raised whenever a method's scores change meaning, so that cached ones are made anew."""


class Planner:
    """Makes plans in the driver. Scores of the teacher are made once; a chain's links ask for those of each student."""

    def __init__(self, workload: Workload, found: Profile, cluster: Cluster, report: Report) -> None:
        self._workload = workload
        self._cluster = cluster
        self._report = report
        self._profiles: dict[Before, Profile] = {(): found}
        self._scores: dict[tuple[str, Before], Scores] = {}
        self._spent = {"scoring_shards": 0.0, "scoring_s": 0.0}

    @property
    def macs(self) -> int:
        """The teacher's multiply-accumulates."""
        return self._profiles[()].macs

    def spent(self) -> dict[str, float]:
        """Return the shards that ran, and their seconds of workers, since this was last asked."""
        taken, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return taken

    def score(self, methods: Sequence[Method], plans: Sequence[Plan] = ()) -> None:
        """Scores the student that `plans` lead to with every one of `methods`, all their shards at once.

        Raises:
            ScoreError: a shard raised; the message is its own.
        """
        before = _before(plans)
        missing = [method for method in methods if (method.name, before) not in self._scores]
        found = self._found(missing, self._profile(plans, before), before)
        self._scores |= {(name, before): values for name, values in found.items()}

    def plan(self, name: str, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """The plan of a method or a chain for a budget.

        Raises:
            Infeasible: no plan fits.
            ScoreError: a link of a chain could not be scored.
        """
        try:
            return plan_of(named(name), self._scored, budget, knobs)
        except LinAlgError as error:  # of a link's surgery, which runs here
            raise ScoreError(f"{name} could not be planned: {error}; expected finite weights; try it alone") from error

    def _scored(self, method: Method, plans: Sequence[Plan]) -> tuple[Scores, Profile]:
        self.score([method], plans)
        before = _before(plans)
        return self._scores[method.name, before], self._profiles[before]

    def _profile(self, plans: Sequence[Plan], before: Before) -> Profile:
        if before not in self._profiles:
            calibration = torch.from_numpy(self._workload.splits.calibration.copy())
            steps = [(METHODS[plan.method], plan) for plan in plans]
            student = student_of(self._workload.teacher.cpu(), steps, calibration)
            self._profiles[before] = profile(student, self._workload.example)
        return self._profiles[before]

    def _found(self, methods: Sequence[Method], profile: Profile, before: Before) -> dict[str, Scores]:
        """The scores of each method, by name. Those in the cache cost nothing."""
        paths = {method.name: _path(method, self._workload, before) for method in methods}
        found = {name: kept for name, path in paths.items() if (kept := _read(path)) is not None}
        missing = [method for method in methods if method.name not in found]
        calibration = torch.from_numpy(self._workload.splits.calibration.copy())
        items = [(method, shard, 0, before) for method in missing for shard in method.shards(profile, calibration)]
        partials: dict[str, list[Scores]] = {method.name: [] for method in missing}
        for event in self._cluster.run(score, items):
            if isinstance(event, Failed):
                raise ScoreError(f"scoring for {items[event.index][0].name} failed: {event.error}")
            if isinstance(event, Done):
                self._spent["scoring_shards"] += 1
                self._spent["scoring_s"] += event.seconds
                partials[items[event.index][0].name].append(event.value)
                self._report("scoring", sum(map(len, partials.values())), len(items), items[event.index][0].name)
        for method in missing:
            found[method.name] = method.merge(partials[method.name], profile)
            _write(paths[method.name], found[method.name])
        return found


def _before(plans: Sequence[Plan]) -> Before:
    return tuple((METHODS[plan.method], json.dumps(plan.to_json(), sort_keys=True)) for plan in plans)


def _path(method: Method, workload: Workload, before: Before) -> Path:
    content = f"{VERSION} {method!r} {workload.fingerprint} {before!r}"
    return cache.folder() / "scores" / f"{cache.digest(content)}.npz"


def _read(path: Path) -> Scores | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, EOFError):
        return None


def _write(path: Path, values: Mapping[str, np.ndarray]) -> None:
    if values:
        cache.keep(path, lambda place: np.savez(place, **dict[str, Any](values)))

"""Scores, cached by content and computed on the cluster in shards that merge exactly, and the plans made of them."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cluster import Cluster, ClusterError, Done, Failed, Item
from methods import METHODS, named
from methods.base import Budget, Infeasible, KnobValue, MethodError, Plan, ScoreError, Scores, SharedShard
from methods.chain import AUTO, AnyMethod, Chain, plan_of, share_knob, student_of
from methods.network import Profile, profile
from methods.network.keeping import KEPT
from methods.pipeline import Before, score, steps_of
from methods.protocol import Method
from search import cache
from search.base import Report, SearchError, one_line
from search.driver.planning.shares import TriedShares
from search.workload import Workload

_log = logging.getLogger(__name__)

VERSION = 6
"""Raised whenever a method's scores change meaning, so that cached ones are made anew."""


class Planner:
    """Makes plans in the driver. Scores of the teacher are made once; a chain's links ask for those of each student."""

    def __init__(self, workload: Workload, found: Profile, cluster: Cluster, report: Report) -> None:
        self._workload = workload
        self._cluster = cluster
        self._report = report
        self._profiles: dict[Before, Profile] = {(): found}
        self._scores: dict[tuple[str, Before], Scores | MethodError] = {}
        self._spent = {"scoring_shards": 0.0, "scoring_s": 0.0}
        self._shares = TriedShares(workload, cluster, self._plan, report)

    @property
    def macs(self) -> int:
        """The teacher's multiply-accumulates."""
        return self._profiles[()].macs

    def spent(self) -> dict[str, float]:
        """Return the shards that ran, and their seconds of workers, since this was last asked."""
        taken, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        taken["scoring_s"] += self._shares.seconds
        self._shares.seconds = 0.0
        return taken

    def score(self, methods: Sequence[Method], plans: Sequence[Plan] = ()) -> dict[str, str]:
        """Score the student that `plans` lead to with every one of `methods`, all their shards at once.

        Returns:
            By name, why a method cannot score it: a verb of it raised. The others are scored all the same.
        """
        before = _before(plans)
        missing = [method for method in methods if (method.name, before) not in self._scores]
        if missing:
            found = self._found(missing, self._profile(plans, before), before)
            self._scores |= {(name, before): values for name, values in found.items()}
        kept = {method.name: self._scores[method.name, before] for method in methods}
        return {name: str(error) for name, error in kept.items() if isinstance(error, MethodError)}

    def plan(self, name: str, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """The plan of a method or a chain for a budget.

        Raises:
            Infeasible: no plan fits.
            MethodError: the method, or a link of a chain, cannot be scored or planned.
        """
        method = named(name)
        with refusing(name, "planning"):
            if isinstance(method, Chain) and AUTO in (knobs[share_knob(link)] for link in method.links[:-1]):
                return self._plan_trying(method, budget, knobs)
            return self._plan(method, budget, knobs)

    def _plan(self, method: AnyMethod, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        return plan_of(method, self._scored, budget, knobs)

    def _plan_trying(self, chain: Chain, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """Plan a chain with the best of the tried shares that has a plan; shares that are given stay."""
        whole, refusals = self._profiles[()], list[Infeasible]()
        given = {name: value for name, value in knobs.items() if value != AUTO}
        for shares in self._shares.ranked(chain, budget, {"macs": whole.macs, "params": whole.params}):
            try:
                return self._plan(chain, budget, {**shares, **given})
            except Infeasible as error:
                refusals.append(error)
        raise refusals[0]

    def untouched(self, method: Method) -> Mapping[str, str]:
        """Return, by layer of the teacher, why a method leaves it as it is.

        Raises:
            MethodError: the method cannot be scored.
        """
        with refusing(method.name, "explaining"):
            found = method.untouched(*self._scored(method, ()))
        kept = {layer.name for layer in self._profiles[()].layers if layer.whole == KEPT}
        return {name: KEPT if name in kept else reason for name, reason in found.items()}

    def _scored(self, method: Method, plans: Sequence[Plan]) -> tuple[Scores, Profile]:
        self.score([method], plans)
        before = _before(plans)
        found = self._scores[method.name, before]
        if isinstance(found, MethodError):
            raise found
        return found, self._profiles[before]

    def _profile(self, plans: Sequence[Plan], before: Before) -> Profile:
        if before not in self._profiles:
            steps = [(METHODS[plan.method], plan) for plan in plans]
            student = student_of(self._workload.teacher.cpu(), steps, None)  # its form is all that a profile needs
            self._profiles[before] = profile(student, self._workload.example, partial(self._report, "profile"))
        return self._profiles[before]

    def _found(self, methods: Sequence[Method], profile: Profile, before: Before) -> dict[str, Scores | MethodError]:
        """Find the scores of each method, or its refusal, by name. Those in the cache cost nothing."""
        paths = {method.name: _path(method, self._workload, before) for method in methods}
        found: dict[str, Scores | MethodError] = {
            name: kept for name, path in paths.items() if (kept := _read(path)) is not None
        }
        calibration = torch.from_numpy(self._workload.splits.calibration.copy())
        work: dict[object, _Work] = {}
        for method in methods:
            if method.name not in found:
                with _noting(found, method.name, "scoring"):
                    for shard in method.shards(profile, calibration):
                        key = shard if isinstance(shard, SharedShard) else (method.name, shard)
                        work.setdefault(key, _Work((method, shard, 0, before), [])).names.append(method.name)
        missing = [method for method in methods if method.name not in found]
        partials = self._run(list(work.values()), found)
        for method in missing:
            if method.name not in found:
                with _noting(found, method.name, "merging its scores"):
                    merged = method.merge(partials.get(method.name, []), profile)
                    found[method.name] = merged
                    _write(paths[method.name], merged)
        return found

    def _run(self, work: Sequence[_Work], refusals: dict[str, Scores | MethodError]) -> dict[str, list[Scores]]:
        """Score everything, except for methods that failed meanwhile: those are added to `refusals`."""
        taken: list[_Work] = []
        partials: dict[str, list[Scores]] = {}

        def wanted() -> Iterator[Item]:
            for one in work:
                if any(name not in refusals for name in one.names):
                    taken.append(one)
                    yield one.item

        done = 0
        if work:
            self._report("scoring", 0, len(work), "")
        for event in self._cluster.run(score, wanted()):
            names = taken[event.index].names
            if isinstance(event, Failed):
                _log.debug("scoring for %s failed: %s", ", ".join(names), event.trace)
                for name in names:
                    refusals.setdefault(name, _refusal(name, "scoring", event.error))
            if isinstance(event, Done):
                done += 1
                self._spent["scoring_shards"] += 1
                self._spent["scoring_s"] += event.seconds
                for name in names:
                    partials.setdefault(name, []).append(event.value)
                self._report("scoring", done, len(work), ", ".join(names))
        return partials


class _Work(NamedTuple):
    """A piece of scoring, and the names of the methods that ask for it."""

    item: Item
    names: list[str]


@contextmanager
def refusing(method: str, doing: str) -> Iterator[None]:
    """Turn any error of a method's own code into that method's refusal, since the others can still be searched.

    Raises:
        MethodError: the block raised; the message says what.
    """
    try:
        yield
    except (MethodError, ClusterError, SearchError, OSError):
        raise
    except Exception as error:
        _log.debug("%s failed in %s", method, doing, exc_info=True)
        raise _refusal(method, doing, f"{type(error).__name__}: {one_line(error)}") from error


@contextmanager
def _noting(refusals: dict[str, Scores | MethodError], method: str, doing: str) -> Iterator[None]:
    """Add a method to `refusals` where the block raises an error of its code."""
    try:
        with refusing(method, doing):
            yield
    except MethodError as error:
        refusals[method] = error


def _refusal(method: str, doing: str, error: str) -> ScoreError:
    """Build the refusal of a method whose code raised: its own message where it raised on purpose."""
    for kind in ("ScoreError", "Unsupported"):
        if error.startswith(f"{kind}: "):
            return ScoreError(f"{method}: {error.removeprefix(f'{kind}: ')}")
    return ScoreError(
        f"{method} cannot handle this network: {doing} failed: {error}; expected it to end; try another method"
    )


def _before(plans: Sequence[Plan]) -> Before:
    return steps_of([METHODS[plan.method] for plan in plans], plans)


def _path(method: Method, workload: Workload, before: Before) -> Path:
    student = (before, workload.refit) if before else ()
    content = f"{VERSION} {method!r} {workload.fingerprint} {student!r}"
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

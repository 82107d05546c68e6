"""Trials as they are proposed: planned, timed, trained on the cluster, and each on record when it has ended."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from cluster import Cluster, Done, Event, Step, Stopped
from methods import named
from methods.base import Infeasible
from methods.pipeline import Outcome, Progress, trial
from methods.training import Recipe
from search.base import Report, SearchError
from search.driver.fitting import Wish, fit
from search.driver.prepare import Prepared, recipe
from search.frontier import beats
from search.record.tracker import Tracker
from search.trials import Candidate, Fitted, Proposal, State

GoesOn = Callable[[Proposal, Progress], bool]
"""Whether a running trial is worth going on with, from what it just reached."""


@dataclass(frozen=True)
class Planned:
    """A trial on record that is ready to be trained; `work` is the same for the same plan and recipe."""

    proposal: Proposal
    run_id: str
    fitted: Fitted
    how: Recipe

    @property
    def work(self) -> str:
        """A name for what would be trained, and how: trials that share it are trained once."""
        plan = {
            key: value for key, value in self.fitted.plan.to_json().items() if key not in ("loss", "bound", "notes")
        }
        text = json.dumps([plan, asdict(self.how)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


ACCOUNT_S = 10
"""Seconds between two writes of what the search has taken so far, while trials end; a kill forgets as much at most."""


class Clock:
    """Wall seconds, told once each."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def passed(self) -> float:
        """The seconds that are still to be told."""
        return time.monotonic() - self._last

    def lap(self) -> float:
        """The seconds since this was last asked."""
        passed = self.passed()
        self._last += passed
        return passed


class Runner:
    """Runs proposals and is the only one that writes what comes of them.

    Args:
        report: told how many of `trials` in all have ended.
        goes_on: asked at every step of recovery but the last.
        clock: whose laps are recorded whenever a trial has ended.
    """

    def __init__(
        self,
        prepared: Prepared,
        tracker: Tracker,
        cluster: Cluster,
        report: Report,
        *,
        trials: int,
        goes_on: GoesOn,
        clock: Clock,
    ) -> None:
        self._prepared = prepared
        self._tracker = tracker
        self._cluster = cluster
        self._report = report
        self._trials = trials
        self._goes_on = goes_on
        self.results: dict[tuple[str, int], Candidate] = {(one.budget, one.trial): one for one in tracker.trials()}
        self._unbeaten: list[Candidate] = []
        for one in self.results.values():
            self._compare(one)
        self._sources = tracker.works()
        self._training: list[Planned] = []
        self._ended: list[Candidate] = []
        self._twins: list[Planned] = []
        self._last: dict[int, Progress] = {}
        self._clock = clock
        self._is_owing = False

    def knows(self, proposal: Proposal) -> bool:
        """Whether what came of a proposal is on record.

        Raises:
            SearchError: the record is of another proposal of that number, so the studies are not the record's.
        """
        found = self.results.get(proposal.key)
        if found is None:
            return False
        asked = proposal.method, dict(proposal.knobs) | {f"recovery.{key}": v for key, v in proposal.recovery.items()}
        if (found.method, dict(found.knobs)) != asked:
            raise SearchError(
                f"trial {proposal.number} of budget {proposal.budget!r} is on record as {found.method}, but Optuna "
                f"proposes {proposal.method} or other knobs for it; expected the studies this search began with; give "
                "their place as tracking.studies, or run the search under another name with --fork"
            )
        return True

    def run(self, batches: Iterable[Sequence[Proposal]]) -> Iterator[Candidate]:
        """Runs proposals in batches, each taken when a worker is free for it; yields every trial as it ends.

        A trial whose plan and recipe were trained before takes that outcome; one whose twin is being trained waits.
        """
        waiting: Iterable[Planned] = (ready for batch in batches for ready in self._planned(batch))
        while True:
            self._training, self._twins, self._last = [], [], {}
            for event in self._cluster.run(trial, self._items(waiting), self._decide):
                self._hear(event)
                yield from self._drained()
            yield from self._drained()
            if not self._twins:
                self._account()
                return
            waiting = self._twins

    def _drained(self) -> Iterator[Candidate]:
        """What ended since this was last asked."""
        ended, self._ended = self._ended, []
        self._is_owing |= len(ended) > 0
        if self._clock.passed() > ACCOUNT_S:
            self._account()
        yield from ended

    def _account(self) -> None:
        """Adds to the record what was taken since this was last done, if any trial has ended since."""
        if self._is_owing:
            spent = self._prepared.planner.spent() | self._prepared.stopwatch.spent()
            self._tracker.add(wall_s=self._clock.lap(), **spent)
            self._is_owing = False

    def _planned(self, proposals: Sequence[Proposal]) -> Iterator[Planned]:
        """Puts proposals on record, plans them and times their students together; those without a plan end here."""
        prepared = self._prepared
        runs = [self._tracker.start_trial(proposal) for proposal in proposals]
        wishes = [Wish(one.method, prepared.target(one.budget), one.knobs) for one in proposals]
        found = fit(wishes, prepared.planner, prepared.stopwatch, prepared.workload)
        for proposal, run_id, fitted in zip(proposals, runs, found, strict=True):
            if isinstance(fitted, Fitted):
                yield Planned(proposal, run_id, fitted, recipe(prepared.spec.recovery, proposal.recovery))
            else:
                state: State = "infeasible" if isinstance(fitted, Infeasible) else "failed"
                self._end(self._tracker.fail(run_id, state, str(fitted), device_s=0.0))
                self._tell(proposal, state)

    def _items(self, waiting: Iterable[Planned]) -> Iterator[tuple[object, ...]]:
        """The arguments of `trial` beside the inputs of its worker, for what has to be trained."""
        begun: set[str] = set()
        for one in waiting:
            self._tracker.planned(one.run_id, one.fitted, one.work)
            if (source := self._sources.get(one.work)) is not None:
                self._end(self._tracker.reuse(one.run_id, source))
                self._tell(one.proposal, "trained before")
            elif one.work in begun:
                self._twins.append(one)
            else:
                begun.add(one.work)
                self._training.append(one)
                seed = one.proposal.seed(self._prepared.spec.search.seed)
                yield named(one.proposal.method), one.fitted.plan, one.how, seed

    def _decide(self, index: int, progress: Progress) -> bool:
        """Whether a trial goes on; its last step is its end anyway."""
        is_last = progress.step >= progress.steps
        return is_last or self._goes_on(self._training[index].proposal, progress)

    def _hear(self, event: Event) -> None:
        """Puts on record what a worker says."""
        one = self._training[event.index]
        if isinstance(event, Step):
            last = self._last.get(event.index)
            if last is None or event.value.step > last.step:  # one that lost its worker says it all again
                self._last[event.index] = event.value
                self._tracker.progress(one.run_id, event.value.step, event.value.top1)
            self._tell(one.proposal, f"step {event.value.step}/{event.value.steps}, top-1 {event.value.top1:.4f}")
            return
        if isinstance(event, Done):
            ended = self._complete(one, event.value, event.seconds)
            note = f"top-1 {event.value.top1_validation:.4f}"
        elif isinstance(event, Stopped):
            last = self._last[event.index]
            ended = self._tracker.stop(one.run_id, last.step, last.top1, event.seconds)
            note = f"given up at step {last.step}, top-1 {last.top1:.4f}"
        else:
            ended = self._tracker.fail(one.run_id, "failed", f"{event.error}\n{event.trace}", event.seconds)
            note = f"failed: {event.error}"
        self._end(ended)
        self._tell(one.proposal, note)

    def _complete(self, one: Planned, outcome: Outcome, seconds: float) -> Candidate:
        drop = self._prepared.teacher.top1_validation - outcome.top1_validation
        costs = Candidate(
            one.run_id, one.proposal.number, one.proposal.budget, one.proposal.method, {}, "complete",
            macs=outcome.macs, macs_expected=outcome.macs_expected, params=outcome.params,
            size_bytes=outcome.size_bytes, top1_validation=outcome.top1_validation, top1_drop=drop,
            latency_ms={device: timing.latency_ms for device, timing in one.fitted.timings.items()},
        )  # fmt: skip
        is_beaten = any(beats(found, costs) for found in self._unbeaten)
        self._sources[one.work] = one.run_id
        return self._tracker.complete(one.run_id, outcome, seconds, top1_drop=drop, keep_weights=not is_beaten)

    def _end(self, found: Candidate) -> None:
        self.results[found.budget, found.trial] = found
        self._compare(found)
        self._ended.append(found)

    def _compare(self, found: Candidate) -> None:
        """Keeps those that nothing beats: who is beaten by any other is beaten by one of these."""
        if found.state == "complete" and not any(beats(one, found) for one in self._unbeaten):
            self._unbeaten = [*(one for one in self._unbeaten if not beats(found, one)), found]

    def _tell(self, one: Proposal, note: str) -> None:
        label = f"{one.budget} {one.number} {one.method}"
        self._report("trials", len(self.results), self._trials, f"{label}: {note}")

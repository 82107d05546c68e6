"""Run trials as they are proposed: planned, judged, timed, trained on the cluster, and each on record when it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cluster import Cluster, Done, Event, Failed, Step, Stopped
from methods import named
from methods.base import Infeasible
from methods.pipeline import Outcome, Progress, look, trial
from methods.training import Recipe
from search.cache import digest
from search.driver.account import Account
from search.driver.ledger import Ledger
from search.driver.planning.sizing import Request
from search.driver.prepare import Prepared, recipe
from search.record.trial_runs import TrialRuns
from search.trials import Candidate, Fitted, Proposal, State, Top1

ShouldContinue = Callable[[Proposal, Progress], bool]
"""Whether a running trial is worth its next steps, by its latest figure."""


@dataclass(frozen=True)
class Planned:
    """A trial on record that is ready to be trained; `work` is the same for the same plan and recipe.

    `judged_s` are the seconds of a worker that it took to judge it before any training.
    """

    proposal: Proposal
    run_id: str
    fitted: Fitted
    how: Recipe
    judged_s: float = 0.0

    @property
    def work(self) -> str:
        """A name for the training it asks for: trials that share it are trained once."""
        return digest([self.fitted.plan.identity(), self.how.identity()])

    @property
    def student(self) -> str:
        """A name for the student before training: trials that share it are judged once."""
        return digest(self.fitted.plan.identity())


@dataclass(frozen=True)
class Judged:
    """A trial's figures after refit and before any training, its student's state left out."""

    planned: Planned
    outcome: Outcome


class Runner:
    """Runs proposals and alone writes how they end: it hears the cluster's events and fills the record and the ledger.

    Args:
        report: told a word on a trial whenever something happens to it.
        should_continue: asked at every step of recovery but the last.
    """

    def __init__(
        self,
        prepared: Prepared,
        cluster: Cluster,
        runs: TrialRuns,
        ledger: Ledger,
        account: Account,
        *,
        report: Callable[[Proposal, str], None],
        should_continue: ShouldContinue,
    ) -> None:
        self._prepared = prepared
        self._cluster = cluster
        self._runs = runs
        self._ledger = ledger
        self._account = account
        self._report = report
        self._should_continue = should_continue
        self._ended: list[Candidate] = []
        self._looks: dict[str, Outcome | Failed] = {}

    def run(self, batches: Iterable[Sequence[Proposal]]) -> Iterator[Candidate]:
        """Run proposals in batches, each taken when a worker is free for it; yield every trial as it ends."""
        return self.train(ready for batch in batches for ready in self.timed(self.plan(batch)))

    def plan(self, proposals: Sequence[Proposal]) -> list[Planned]:
        """Put proposals on record and plan them together; those without a plan end here."""
        prepared = self._prepared
        runs = [self._runs.start(proposal) for proposal in proposals]
        requests = [Request(one.method, prepared.target(one.budget), one.knobs) for one in proposals]
        planned = []
        for proposal, run_id, fitted in zip(proposals, runs, prepared.fitter.fit(requests), strict=True):
            if isinstance(fitted, Fitted):
                how = recipe(prepared.spec.recovery, proposal.recovery)
                planned.append(Planned(proposal, run_id, fitted, how))
            else:
                state: State = "infeasible" if isinstance(fitted, Infeasible) else "failed"
                self._end(proposal, self._runs.fail(run_id, state, str(fitted), device_s=0.0), state)
        return planned

    def timed(self, planned: Sequence[Planned]) -> list[Planned]:
        """Return planned trials with their students timed together, if every student is to be timed."""
        found = self._prepared.fitter.timed([one.fitted for one in planned])
        return [replace(one, fitted=fitted) for one, fitted in zip(planned, found, strict=True)]

    def judge(self, waiting: Sequence[Planned]) -> list[Judged]:
        """Build, refit and judge students before any training, each once; those that cannot be built end here."""
        new = {one.student: one for one in reversed(waiting) if one.student not in self._looks}
        names, items = list(new), [self._work(one) for one in new.values()]
        seconds: dict[str, float] = {}
        for event in self._cluster.run(look, items):
            if isinstance(event, Done | Failed):
                name = names[event.index]
                self._looks[name] = event.value if isinstance(event, Done) else event
                seconds[name] = event.seconds
                self._report(new[name].proposal, self._told(self._looks[name]))
        judged = []
        for one in waiting:
            found, spent = self._looks[one.student], seconds.pop(one.student, 0.0)
            if isinstance(found, Failed):
                self._fail(one, found, spent)
            else:
                judged.append(Judged(replace(one, judged_s=spent), found))
        return judged

    def pass_over(self, judged: Sequence[Judged]) -> None:
        """End trials at step 0, with what they were judged at."""
        for one in judged:
            known, outcome = one.planned, one.outcome
            self._runs.planned(known.run_id, known.fitted, known.work)
            found = self._runs.pass_over(known.run_id, outcome, known.judged_s, top1_drop=self._drop(outcome))
            self._end(known.proposal, found, f"passed over at step 0, {self._told(outcome)}")

    def train(self, waiting: Iterable[Planned]) -> Iterator[Candidate]:
        """Train what is planned, each taken when a worker is free for it; yield every trial as it ends.

        A trial whose plan and recipe were trained before takes that outcome; one whose twin is being trained waits.
        """
        while True:
            training, twins, latest = list[Planned](), list[Planned](), dict[int, Progress]()

            def should_continue(index: int, progress: Progress, training: Sequence[Planned] = training) -> bool:
                is_last = progress.step >= progress.steps
                return is_last or self._should_continue(training[index].proposal, progress)

            for event in self._cluster.run(trial, self._items(waiting, training, twins), should_continue):
                self._hear(training[event.index], event, latest)
                yield from self._drained()
            yield from self._drained()
            if not twins:
                self._account.write(self._prepared.fitter)
                return
            waiting = twins

    @property
    def _seed(self) -> int:
        return self._prepared.spec.search.seed

    @staticmethod
    def _work(one: Planned) -> tuple[object, ...]:
        return named(one.proposal.method), one.fitted.plan

    def _drained(self) -> Iterator[Candidate]:
        """Yield the trials that ended since this was last asked."""
        ended, self._ended = self._ended, []
        if ended:
            self._account.owe()
        if self._account.is_due:
            self._account.write(self._prepared.fitter)
        yield from ended

    def _items(
        self, waiting: Iterable[Planned], training: list[Planned], twins: list[Planned]
    ) -> Iterator[tuple[object, ...]]:
        """Yield the arguments of `trial` beside the worker's inputs; fill `training` in their order, and `twins`."""
        begun: set[str] = set()
        for one in waiting:
            self._runs.planned(one.run_id, one.fitted, one.work)
            if (source := self._ledger.works.get(one.work)) is not None:
                self._end(one.proposal, self._runs.reuse(one.run_id, source), "trained before")
            elif one.work in begun:
                twins.append(one)
            else:
                begun.add(one.work)
                training.append(one)
                yield (*self._work(one), one.how, one.proposal.seed(self._seed))

    def _hear(self, one: Planned, event: Event, latest: dict[int, Progress]) -> None:
        """Put a worker's event on record; `latest` holds the last figure of each trial."""
        told = self._prepared.spec.metric.scale.told
        if isinstance(event, Step):
            known = latest.get(event.index)
            if known is None or event.value.step > known.step:  # one that lost its worker says it all again
                latest[event.index] = event.value
                self._runs.progress(one.run_id, event.value.step, event.value.top1)
            self._report(one.proposal, f"step {event.value.step}/{event.value.steps}, {told(event.value.top1)}")
        elif isinstance(event, Done):
            found = self._complete(one, event.value, one.judged_s + event.seconds)
            self._end(one.proposal, found, self._told(event.value))
        elif isinstance(event, Stopped):
            last = latest[event.index]
            found = self._runs.stop(one.run_id, last.step, last.top1, one.judged_s + event.seconds)
            self._end(one.proposal, found, f"given up at step {last.step}, {told(last.top1)}")
        else:
            self._fail(one, event, one.judged_s + event.seconds)

    def _told(self, found: Outcome | Failed) -> str:
        """Say what came of a student."""
        if isinstance(found, Failed):
            return f"failed: {found.error}"
        return self._prepared.spec.metric.scale.told(found.top1_validation)

    def _drop(self, outcome: Outcome) -> float:
        return self._prepared.teacher.top1_validation - outcome.top1_validation

    def _complete(self, one: Planned, outcome: Outcome, seconds: float) -> Candidate:
        """End a trial that was trained to its last step; its weights are kept only where they may be needed."""
        drop = self._drop(outcome)
        reached = Candidate(
            one.run_id, one.proposal.number, one.proposal.budget, one.proposal.method, {}, "complete",
            macs=outcome.macs, macs_expected=outcome.macs_expected, params=outcome.params,
            size_bytes=outcome.size_bytes, timings=one.fitted.timings, top1=Top1(outcome.top1_validation, drop=drop),
        )  # fmt: skip
        keep = not self._ledger.is_beaten(reached)
        self._ledger.works[one.work] = one.run_id
        return self._runs.complete(one.run_id, outcome, seconds, top1_drop=drop, keep_weights=keep)

    def _fail(self, one: Planned, event: Failed, seconds: float) -> None:
        failed = self._runs.fail(one.run_id, "failed", f"{event.error}\n{event.trace}", seconds)
        self._end(one.proposal, failed, self._told(event))

    def _end(self, proposal: Proposal, found: Candidate, note: str) -> None:
        self._ledger.add(found)
        self._ended.append(found)
        self._report(proposal, note)

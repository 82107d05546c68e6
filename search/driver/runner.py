"""Run trials as they are proposed: planned, timed, trained on the cluster, and each on record when it has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from cluster import Cluster, Done, Event, Step, Stopped
from methods import named
from methods.base import Infeasible
from methods.pipeline import Outcome, Progress, trial
from methods.training import Recipe
from search.cache import digest
from search.driver.account import Account
from search.driver.ledger import Ledger
from search.driver.prepare import Prepared, recipe
from search.driver.sizing import Request
from search.record.trial_runs import TrialRuns
from search.trials import Candidate, Fitted, Proposal, State, Top1

ShouldContinue = Callable[[Proposal, Progress], bool]
"""Whether a running trial is worth its next steps, by its latest figure."""


@dataclass(frozen=True)
class Planned:
    """A trial on record that is ready to be trained; `work` is the same for the same plan and recipe."""

    proposal: Proposal
    run_id: str
    fitted: Fitted
    how: Recipe

    @property
    def work(self) -> str:
        """A name for the training it asks for: trials that share it are trained once."""
        return digest([self.fitted.plan.identity(), asdict(self.how)])


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

    def run(self, batches: Iterable[Sequence[Proposal]]) -> Iterator[Candidate]:
        """Run proposals in batches, each taken when a worker is free for it; yield every trial as it ends.

        A trial whose plan and recipe were trained before takes that outcome; one whose twin is being trained waits.
        """
        waiting: Iterable[Planned] = (ready for batch in batches for ready in self._planned(batch))
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

    def _drained(self) -> Iterator[Candidate]:
        """Yield the trials that ended since this was last asked."""
        ended, self._ended = self._ended, []
        if ended:
            self._account.owe()
        if self._account.is_due:
            self._account.write(self._prepared.fitter)
        yield from ended

    def _planned(self, proposals: Sequence[Proposal]) -> Iterator[Planned]:
        """Put proposals on record, plan them and time their students together; those without a plan end here."""
        prepared = self._prepared
        runs = [self._runs.start(proposal) for proposal in proposals]
        requests = [Request(one.method, prepared.target(one.budget), one.knobs) for one in proposals]
        for proposal, run_id, fitted in zip(proposals, runs, prepared.fitter.fit(requests), strict=True):
            if isinstance(fitted, Fitted):
                yield Planned(proposal, run_id, fitted, recipe(prepared.spec.recovery, proposal.recovery))
            else:
                state: State = "infeasible" if isinstance(fitted, Infeasible) else "failed"
                self._end(proposal, self._runs.fail(run_id, state, str(fitted), device_s=0.0), state)

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
                seed = one.proposal.seed(self._prepared.spec.search.seed)
                yield named(one.proposal.method), one.fitted.plan, one.how, seed

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
            found = self._complete(one, event.value, event.seconds)
            self._end(one.proposal, found, told(event.value.top1_validation))
        elif isinstance(event, Stopped):
            last = latest[event.index]
            found = self._runs.stop(one.run_id, last.step, last.top1, event.seconds)
            self._end(one.proposal, found, f"given up at step {last.step}, {told(last.top1)}")
        else:
            found = self._runs.fail(one.run_id, "failed", f"{event.error}\n{event.trace}", event.seconds)
            self._end(one.proposal, found, f"failed: {event.error}")

    def _complete(self, one: Planned, outcome: Outcome, seconds: float) -> Candidate:
        """End a trial that was trained to its last step; its weights are kept only where they may be needed."""
        drop = self._prepared.teacher.top1_validation - outcome.top1_validation
        reached = Candidate(
            one.run_id, one.proposal.number, one.proposal.budget, one.proposal.method, {}, "complete",
            macs=outcome.macs, macs_expected=outcome.macs_expected, params=outcome.params,
            size_bytes=outcome.size_bytes, timings=one.fitted.timings, top1=Top1(outcome.top1_validation, drop=drop),
        )  # fmt: skip
        keep = not self._ledger.is_beaten(reached)
        self._ledger.works[one.work] = one.run_id
        return self._runs.complete(one.run_id, outcome, seconds, top1_drop=drop, keep_weights=keep)

    def _end(self, proposal: Proposal, found: Candidate, note: str) -> None:
        self._ledger.add(found)
        self._ended.append(found)
        self._report(proposal, note)

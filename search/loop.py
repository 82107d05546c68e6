"""The search: rounds of proposals over every budget, run on the cluster, recorded, and told to Optuna in order.

The driver is the only writer. A trial that ends is recorded in MLflow at once; when its round is over, the round is
told to Optuna in the order it was asked. A killed search therefore loses at most the trials that were running, and the
same command goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from cluster import Cluster, Failed, Step
from methods import named
from methods.base import Infeasible, MethodError, Plan
from methods.pipeline import size_bytes
from methods.training import evaluate
from search import cache, trial
from search.base import Report
from search.frontier import Candidate, SearchResult, Teacher, beats
from search.prepare import Prepared, prepare, recipe
from search.register import register
from search.report import html
from search.spec import SearchSpec
from search.study import BudgetStudy, Proposal, Storage, storage
from search.tracking import Tracker, check_store, open_search
from search.workload import Workload, load

Results: TypeAlias = dict[tuple[str, int], Candidate]
"""What came of each trial, by budget and number."""


def search(spec: SearchSpec, make_cluster: Callable[[Workload], Cluster], report: Report) -> SearchResult:
    """Runs a search to its end, or goes on with one that was stopped; returns what is on record.

    Args:
        make_cluster: gives the workers, which hold the workload's `bench()`.
        report: told of progress.
    """
    check_store(spec.tracking.uri)
    studies_at = storage(spec.tracking.studies)
    path = report_path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    with cache.alone(f"{Path.cwd()} {spec.tracking.uri} {spec.name}"):
        clock = _Clock(time.monotonic())
        workload = load(spec, report)
        cluster = make_cluster(workload)
        try:
            prepared = prepare(spec, workload, cluster, report)
            tracker = _tracker(prepared)
            studies = _studies(prepared, tracker, studies_at)
            rounds = 0
            for _ in _rounds(prepared, tracker, studies, cluster, report):
                rounds += 1
                tracker.add_seconds(clock.lap())
        finally:
            cluster.close()
        try:
            register(workload, tracker, report)
        finally:
            tracker.add_seconds(clock.lap() if rounds else 0.0)
            result = tracker.result()
            path.write_text(html(result))
        tracker.finish(path)
        return result


@dataclass
class _Clock:
    """Wall seconds since it was last looked at."""

    last: float

    def lap(self) -> float:
        """The seconds since the last lap."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        return passed


def report_path(spec: SearchSpec) -> Path:
    """Where the search's HTML report is written, in the current folder."""
    return Path("paredown.reports", f"{spec.name}.html")


def _tracker(prepared: Prepared) -> Tracker:
    """The record of this search, with its teacher's figures."""
    spec, workload = prepared.spec, prepared.workload
    teacher = Teacher(
        top1_validation=evaluate(workload.teacher, workload.splits.validation, workload.metric),
        top1_test=None,
        macs=prepared.profile.macs,
        params=prepared.profile.params,
        size_bytes=size_bytes(workload.teacher),
    )
    tracker = open_search(
        spec.tracking.uri,
        spec.name,
        digest=f"{spec.digest()}-{workload.fingerprint[:16]}",
        spec=spec.text,
        model=spec.registered_model,
        limits=prepared.budgets,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    tracker.write_teacher(teacher)
    return tracker


def _studies(prepared: Prepared, tracker: Tracker, studies_at: Storage) -> list[BudgetStudy]:
    """One study per budget that some method can meet."""
    spec = prepared.spec
    return [
        BudgetStudy(
            studies_at, f"{tracker.run_id}/{name}", name, methods, spec.search.seed, labels=spec.recovery.labels
        )
        for name in prepared.reach
        if (methods := prepared.able(name))
    ]


def _rounds(
    prepared: Prepared, tracker: Tracker, studies: Sequence[BudgetStudy], cluster: Cluster, report: Report
) -> Iterator[None]:
    """Asks, runs and tells whole rounds, yielding after each, until every budget has its trials or time is up."""
    trials = prepared.spec.search.trials
    deadline = time.monotonic() + prepared.spec.search.timeout
    for run_id in tracker.unfinished():
        tracker.discard(run_id)
    while time.monotonic() < deadline:
        rounds = [_round(study, trials) for study in studies]
        proposals = [proposal for one in rounds for proposal in one]
        if not proposals:
            return
        recorded: Results = {(one.budget, one.trial): one for one in tracker.trials()}
        missing = [proposal for proposal in proposals if proposal.key not in recorded]
        report("trials", len(recorded), trials * len(studies), "")
        results = recorded | _run(
            prepared, tracker, missing, cluster, _shifted(report, len(recorded), trials * len(studies))
        )
        for study, one in zip(studies, rounds, strict=True):
            for proposal in one:
                _tell(study, prepared, proposal.number, results[proposal.key])
        yield


def _tell(study: BudgetStudy, prepared: Prepared, number: int, found: Candidate) -> None:
    """Tells Optuna what came of a trial; one over a limit, as a gated model may be, counts as infeasible."""
    if found.state == "complete":
        study.tell(number, found.top1_validation, found.excess(prepared.budget(study.budget).declared()))
    else:
        study.tell(number, None)


def _shifted(report: Report, done: int, total: int) -> Report:
    """`report`, with a round's trials counted on top of those before it."""
    return lambda stage, count, _, note: report(stage, done + count, total, note)


def _round(study: BudgetStudy, trials: int) -> list[Proposal]:
    """What a killed driver left of this budget's round, and enough new proposals to make the round whole."""
    left = study.unfinished()
    asked = study.told + len(left)
    end = -(-max(asked, study.told + 1) // study.round) * study.round
    return left + [study.ask() for _ in range(min(end, trials) - asked)]


def _run(
    prepared: Prepared, tracker: Tracker, proposals: Sequence[Proposal], cluster: Cluster, report: Report
) -> Results:
    """Runs proposals and records each as it ends."""
    results: Results = {}
    runs: list[tuple[Proposal, str, Plan]] = []
    for proposal in proposals:
        run_id = tracker.start_trial(proposal)
        try:
            runs.append((proposal, run_id, _planned(prepared, proposal)))
        except Infeasible as error:
            tracker.fail(run_id, "infeasible", str(error), device_s=0.0)
            results[proposal.key] = tracker.candidate(run_id)
        except MethodError as error:
            tracker.fail(run_id, "failed", str(error), device_s=0.0)
            results[proposal.key] = tracker.candidate(run_id)
    so_far = [one for one in tracker.trials() if one.state == "complete"]
    for event in cluster.run(trial.run, [_item(prepared.spec, proposal, plan) for proposal, _, plan in runs]):
        proposal, run_id, plan = runs[event.index]
        label = f"{proposal.budget} {proposal.number} {proposal.method}"
        if isinstance(event, Step):
            progress = event.value
            note = f"{label}: step {progress.step}/{progress.steps}, top-1 {progress.top1:.4f}"
        elif isinstance(event, Failed):
            tracker.fail(run_id, "failed", f"{event.error}\n{event.trace}", event.seconds)
            note = f"{label} failed: {event.error}"
        else:
            outcome = event.value.outcome
            keep = not any(beats(one, outcome) for one in so_far)
            tracker.complete(run_id, plan, event.value, event.seconds, keep_weights=keep)
            so_far.append(tracker.candidate(run_id))
            note = f"{label}: top-1 {outcome.top1_validation:.4f}"
        if not isinstance(event, Step):
            results[proposal.key] = tracker.candidate(run_id)
        report("trials", len(results), len(proposals), note)
    return results


def _planned(prepared: Prepared, proposal: Proposal) -> Plan:
    return prepared.planner.plan(proposal.method, prepared.budget(proposal.budget), proposal.knobs)


def _item(spec: SearchSpec, proposal: Proposal, plan: Plan) -> tuple[object, ...]:
    """The arguments of `trial.run` beside the bench."""
    how = recipe(spec.recovery, proposal.recovery)
    return named(proposal.method), plan, how, proposal.seed(spec.search.seed), spec.devices

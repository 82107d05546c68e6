"""The search: rounds of proposals over every budget, run on the cluster, recorded, and told to Optuna in order.

The driver is the only writer. A trial that ends is recorded in MLflow at once; when its round is over, the round is
told to Optuna in the order it was asked. A killed search therefore loses at most the trials that were running, and the
same command goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cluster import Cluster, Failed, Step
from methods import METHODS
from methods.base import Budget, Infeasible, KnobValue, Method, Plan, Scores, defaults
from methods.pipeline import size_bytes
from methods.profile import Profile, profile
from methods.training import Recipe, evaluate
from search import trial
from search.base import Report
from search.frontier import SearchResult, Teacher, beats
from search.register import register
from search.report import html
from search.scoring import scores
from search.spec import RecoverySpec, SearchSpec
from search.study import BudgetStudy, Proposal, storage
from search.tracking import Tracker, open_search
from search.workload import Workload, load


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first trial: `reach` says per budget which methods can meet it, or why not."""

    spec: SearchSpec
    workload: Workload
    profile: Profile
    budgets: tuple[Budget, ...]
    scores: Mapping[str, Scores]
    refused: Mapping[str, str]
    reach: Mapping[str, Mapping[str, Plan | str]]

    def able(self, budget: str) -> list[Method]:
        """The methods that can meet a budget, the baseline last."""
        return [METHODS[name] for name, found in self.reach[budget].items() if isinstance(found, Plan)]


def prepare(
    spec: SearchSpec, workload: Workload, cluster: Cluster, report: Report, only: Sequence[str] | None = None
) -> Prepared:
    """Profile, scores and, per budget and method, whether a plan exists: all before any training."""
    found = profile(workload.teacher, workload.example)
    names = spec.candidates if only is None else only
    refused = {name: why for name in names if (why := METHODS[name].accepts(found)) is not None}
    methods = [METHODS[name] for name in names if name not in refused]
    scored = scores(methods, workload, found, cluster, report)
    budgets = spec.limits(found)
    reach = {
        budget.name: {method.name: _reach(method, scored[method.name], found, budget) for method in methods}
        for budget in budgets
    }
    return Prepared(spec, workload, found, budgets, scored, refused, reach)


def _reach(method: Method, scored: Scores, found: Profile, budget: Budget) -> Plan | str:
    try:
        return method.allocate(scored, found, budget, defaults(method))
    except Infeasible as error:
        return str(error)


def search(spec: SearchSpec, make_cluster: Callable[[Workload], Cluster], report: Report) -> SearchResult:
    """Runs a search to its end, or goes on with one that was stopped; returns what is on record.

    Args:
        make_cluster: gives the workers, which hold the workload's `bench()`.
        report: told of progress.
    """
    started = time.monotonic()
    studies_at = storage(spec.tracking.studies)
    workload = load(spec, report)
    cluster = make_cluster(workload)
    try:
        prepared = prepare(spec, workload, cluster, report)
        tracker = _tracker(prepared)
        studies = [
            BudgetStudy(
                studies_at, f"{tracker.key}/{name}", name, methods, spec.search.seed, labels=spec.recovery.labels
            )
            for name in prepared.reach
            if (methods := prepared.able(name))
        ]
        _rounds(prepared, tracker, studies, cluster, report, deadline=started + spec.search.timeout)
    finally:
        cluster.close()
    register(workload, tracker, report)
    tracker.add_seconds(time.monotonic() - started)
    result = tracker.result()
    path = report_path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(result))
    tracker.finish(path)
    return result


def _tracker(prepared: Prepared) -> Tracker:
    """The record of this search, with its teacher's figures."""
    spec, workload = prepared.spec, prepared.workload
    tracker = open_search(
        spec.tracking.uri,
        spec.name,
        digest=f"{spec.digest()}-{workload.fingerprint[:16]}",
        spec=spec.text,
        model=spec.registered_model,
        limits=prepared.budgets,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    tracker.write_teacher(
        Teacher(
            top1_validation=evaluate(workload.teacher, workload.splits.validation, workload.metric),
            top1_test=None,
            macs=prepared.profile.macs,
            params=prepared.profile.params,
            size_bytes=size_bytes(workload.teacher),
        )
    )
    return tracker


def report_path(spec: SearchSpec) -> Path:
    """Where the search's HTML report is written, in the current folder."""
    return Path("paredown.reports", f"{spec.name}.html")


def _rounds(
    prepared: Prepared,
    tracker: Tracker,
    studies: Sequence[BudgetStudy],
    cluster: Cluster,
    report: Report,
    deadline: float,
) -> None:
    """Asks, runs and tells whole rounds until every budget has its trials or the time is up."""
    trials = prepared.spec.search.trials
    for run_id in tracker.unfinished():
        tracker.discard(run_id)
    while time.monotonic() < deadline:
        rounds = [_round(study, trials) for study in studies]
        proposals = [proposal for one in rounds for proposal in one]
        if not proposals:
            return
        recorded = {(one.budget, one.trial): one.top1_validation for one in tracker.result().candidates}
        missing = [proposal for proposal in proposals if proposal.key not in recorded]
        report("trials", len(recorded), trials * len(studies), "")
        results = recorded | _run(
            prepared, tracker, missing, cluster, _shifted(report, len(recorded), trials * len(studies))
        )
        for study, one in zip(studies, rounds, strict=True):
            for proposal in one:
                study.tell(proposal.number, results[proposal.key])


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
) -> dict[tuple[str, int], float | None]:
    """Runs proposals and records each as it ends; their top-1, or None for those that gave none."""
    results: dict[tuple[str, int], float | None] = {}
    runs: list[tuple[Proposal, str, Plan]] = []
    for proposal in proposals:
        run_id = tracker.start_trial(proposal)
        try:
            runs.append((proposal, run_id, _planned(prepared, proposal)))
        except Infeasible as error:
            tracker.fail(run_id, "infeasible", str(error))
            results[proposal.key] = None
    so_far = tracker.result().complete()
    for event in cluster.run(trial.run, [_item(prepared.spec, proposal, plan) for proposal, _, plan in runs]):
        proposal, run_id, plan = runs[event.index]
        label = f"{proposal.budget} {proposal.number} {proposal.method}"
        if isinstance(event, Step):
            progress = event.value
            note = f"{label}: step {progress.step}/{progress.steps}, top-1 {progress.top1:.4f}"
        elif isinstance(event, Failed):
            tracker.fail(run_id, "failed", f"{event.error}\n{event.trace}")
            results[proposal.key] = None
            note = f"{label} failed: {event.error}"
        else:
            outcome = event.value.outcome
            tracker.complete(run_id, plan, event.value, keep_weights=not any(beats(one, outcome) for one in so_far))
            so_far.append(tracker.candidate(run_id))
            results[proposal.key] = outcome.top1_validation
            note = f"{label}: top-1 {outcome.top1_validation:.4f}"
        report("trials", len(results), len(proposals), note)
    return results


def _planned(prepared: Prepared, proposal: Proposal) -> Plan:
    budget = next(budget for budget in prepared.budgets if budget.name == proposal.budget)
    method = METHODS[proposal.method]
    return method.allocate(prepared.scores[method.name], prepared.profile, budget, proposal.knobs)


def _item(spec: SearchSpec, proposal: Proposal, plan: Plan) -> tuple[object, ...]:
    """The arguments of `trial.run` beside the bench."""
    how = recipe(spec.recovery, proposal.recovery)
    return METHODS[proposal.method], plan, how, proposal.seed(spec.search.seed), spec.devices


def recipe(settings: RecoverySpec, knobs: Mapping[str, KnobValue]) -> Recipe:
    """The recovery recipe: what the spec fixes, and the knobs' values."""
    return Recipe(
        steps=settings.steps,
        batch_size=settings.batch_size,
        labels=settings.labels,
        precision=settings.precision,
        report_every=max(1, settings.steps // 5),
        **{name: float(value) for name, value in knobs.items()},
    )

"""The search: rounds of proposals over every budget, run on the cluster, recorded, and told to Optuna in order.

The driver is the only writer. A trial that ends is recorded in MLflow at once; when its round is over, the round is
told to Optuna in the order it was asked. A killed search therefore loses at most the trials that were running, and the
same command goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cluster import Cluster
from methods import named
from methods.pipeline import Progress
from search.base import Report, masked
from search.devices.predicted import rooflines
from search.driver.prepare import Prepared, prepare, rung
from search.driver.runner import Clock, Runner
from search.driver.study import FULL, BudgetStudy, Start, Storage, Strategy, storage
from search.driver.winners import check_model, register
from search.record.lease import locked
from search.record.searches import open_search
from search.record.store import check_store
from search.record.tracker import Tracker
from search.report.html import html
from search.results import SearchResult
from search.spec import SearchSpec
from search.trials import Candidate, Proposal
from search.workload import Workload, load

log = logging.getLogger(__name__)


def search(
    spec: SearchSpec,
    make_cluster: Callable[[Workload], Cluster],
    report: Report,
    *,
    strategy: Strategy = FULL,
) -> SearchResult:
    """Runs a search to its end, or goes on with one that was stopped; returns what is on record.

    Args:
        make_cluster: gives the workers, which hold the workload's `worker_inputs()`.
        report: told of progress.
        strategy: what it does beyond drawing at random.

    Raises:
        SpecChanged: a search of this name is on record with another spec.
        SpecError: its registered model is another's.
    """
    check_store(spec.tracking.uri)
    check_model(spec)
    studies_at = storage(spec.tracking.studies)
    path = report_path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(spec.tracking.uri, spec.name):
        clock = Clock()
        workload = load(spec, report)
        tracker = _tracker(spec, workload)
        try:
            cluster = make_cluster(workload)
            try:
                has_run = _run(
                    spec, workload, cluster, tracker, report, studies_at=studies_at, strategy=strategy, clock=clock
                )
            finally:
                cluster.close()
            tracker.enter("registering")
            register(spec, workload, tracker, report)
            if has_run:
                tracker.add(wall_s=clock.lap())
            result = tracker.result()
            path.write_text(html(result))
            tracker.finish(path)
        except BaseException as error:
            tracker.halt("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise
        return result


def report_path(spec: SearchSpec) -> Path:
    """Where the search's HTML report is written, in the current folder."""
    return Path("paredown.reports", f"{spec.name}.html")


def _tracker(spec: SearchSpec, workload: Workload) -> Tracker:
    """The record of this search, cleared of what a killed driver left unfinished."""
    tracker = open_search(
        spec.tracking.uri,
        spec.name,
        decisive=spec.decisive() | {"rooflines": rooflines(spec), "teacher and data": workload.fingerprint},
        spec=masked(spec.text),
        model=spec.registered_model,
    )
    tracker.resume()
    return tracker


def _run(
    spec: SearchSpec,
    workload: Workload,
    cluster: Cluster,
    tracker: Tracker,
    report: Report,
    *,
    studies_at: Storage,
    strategy: Strategy,
    clock: Clock,
) -> bool:
    """Everything that needs workers; whether any trial was run."""
    tracker.enter("scoring")
    prepared = prepare(spec, workload, cluster, report, known=tracker.teacher())
    tracker.write_limits({target.name: target.declared() for target in prepared.targets})
    tracker.write_devices(prepared.stopwatch.described())
    tracker.write_teacher(prepared.teacher)
    beyond = {
        budget: {**prepared.refused, **{method: why for method, why in found.items() if isinstance(why, str)}}
        for budget, found in prepared.reach.items()
    }
    tracker.write_beyond(beyond)
    for why in dict.fromkeys(why for found in beyond.values() for why in found.values()):
        log.warning(why)
    studies = _studies(prepared, tracker, studies_at, strategy)
    by_budget = {study.budget: study for study in studies}

    def goes_on(proposal: Proposal, progress: Progress) -> bool:
        return by_budget[proposal.budget].goes_on(proposal.number, progress.step, progress.top1)

    trials = spec.search.trials * len(studies)
    runner = Runner(prepared, tracker, cluster, report, trials=trials, goes_on=goes_on, clock=clock)
    before = len(runner.results)
    tracker.expect(trials)
    tracker.enter("trials")
    propose = _freely if spec.search.asynchronous else _rounds
    propose(prepared, studies, runner, strategy)
    importance = {study.budget: study.importance() for study in studies}
    tracker.write_importance({name: importance[name] for name in prepared.reach if name in importance})
    if (ended := len(runner.results)) < trials:
        log.warning(
            "time is up after %d of %d trials (search.timeout); the same command goes on from there", ended, trials
        )
    return ended > before


def _studies(prepared: Prepared, tracker: Tracker, studies_at: Storage, strategy: Strategy) -> list[BudgetStudy]:
    """One study per budget that some method can meet, the tightest first: neighbours lie side by side.

    What was able when a budget came in stays so: predictions of latency differ from day to day, and a study cannot.
    """
    spec = prepared.spec
    able = {
        name: {"methods": [one.name for one in methods], "macs": _size(prepared, name)}
        for name in prepared.reach
        if (methods := prepared.able(name))
    } | tracker.able()
    tracker.write_able(able)
    found = [
        BudgetStudy(
            studies_at,
            f"{tracker.run_id}/{name}",
            name,
            [named(method) for method in able[name]["methods"]],
            spec.search.seed,
            labels=spec.recovery.labels,
            warmup=2 * rung(spec.recovery.steps),
            strategy=strategy,
        )
        for name in able
    ]
    return sorted(found, key=lambda study: (able[study.budget]["macs"], study.budget))


def _size(prepared: Prepared, budget: str) -> int:
    """The most MACs that any method's first plan for a budget leaves."""
    return max(plan.macs for plan in prepared.reach[budget].values() if not isinstance(plan, str))


def _rounds(prepared: Prepared, studies: Sequence[BudgetStudy], runner: Runner, strategy: Strategy) -> None:
    """Asks, runs and tells whole rounds until every budget has its trials or time is up.

    All budgets go through their rounds side by side, so that what one learns from its neighbours does not depend on
    when a driver was killed.
    """
    trials = prepared.spec.search.trials
    deadline = time.monotonic() + prepared.spec.search.timeout
    while time.monotonic() < deadline:
        open_ones = [study for study in studies if study.told < trials]
        if not open_ones:
            return
        turn = min(study.told // study.round for study in open_ones)
        now = [study for study in open_ones if study.told // study.round == turn]
        starts = {study.budget: _start(study, studies) if turn and strategy.shares else None for study in now}
        rounds = {study.budget: list(_round(study, turn, trials, starts[study.budget])) for study in now}
        asked = [proposal for one in rounds.values() for proposal in one]
        missing = [proposal for proposal in asked if not runner.knows(proposal)]
        for _ in runner.run([missing]):
            pass
        for study in now:
            for proposal in rounds[study.budget]:
                _tell(study, prepared, runner.results[proposal.key])


def _round(study: BudgetStudy, turn: int, trials: int, start: Start | None) -> Iterator[Proposal]:
    """What a killed driver left of this budget's round, and enough new proposals to make it whole.

    The first of a round is a neighbour's best, where that is new here.
    """
    yield from study.unfinished()
    first, end = turn * study.round, min((turn + 1) * study.round, trials)
    while study.asked < end:
        yield study.ask(start if study.asked == first else None)


def _start(study: BudgetStudy, studies: Sequence[BudgetStudy]) -> Start | None:
    """The best proposal of the looser neighbour, or of the tighter one where there is none."""
    place = studies.index(study)
    for neighbour in (*studies[place + 1 : place + 2], *studies[max(0, place - 1) : place]):
        if (best := neighbour.best()) is not None:
            return best
    return None


def _freely(prepared: Prepared, studies: Sequence[BudgetStudy], runner: Runner, strategy: Strategy) -> None:
    """Asks whenever a worker is free, the budget with the fewest trials first, and tells as trials end."""
    trials = prepared.spec.search.trials
    deadline = time.monotonic() + prepared.spec.search.timeout
    by_budget = {study.budget: study for study in studies}

    def proposals() -> Iterator[list[Proposal]]:
        for study in studies:
            yield from ([one] for one in study.unfinished() if not runner.knows(one))
        while time.monotonic() < deadline:
            if not (left := [study for study in studies if study.asked < trials]):
                return
            study = min(left, key=lambda study: study.asked)
            is_turn = strategy.shares and study.asked >= study.round and study.asked % study.round == 0
            yield [study.ask(_start(study, studies) if is_turn else None)]

    for study in studies:
        for one in study.unfinished():
            if runner.knows(one):
                _tell(study, prepared, runner.results[one.key])
    for candidate in runner.run(proposals()):
        _tell(by_budget[candidate.budget], prepared, candidate)


def _tell(study: BudgetStudy, prepared: Prepared, found: Candidate) -> None:
    """Tells Optuna what came of a trial; one over a limit, as a gated model may be, counts as infeasible."""
    if found.state == "complete":
        excess = found.excess(prepared.target(study.budget).declared())
        study.tell(found.trial, found.top1_validation, excess)
    elif found.state == "stopped":
        study.tell_stopped(found.trial)
    else:
        study.tell(found.trial, None)

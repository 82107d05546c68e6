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
from search.driver.account import Account
from search.driver.exploring import worth_training
from search.driver.ledger import Ledger
from search.driver.prepare import Prepared, prepare, rung
from search.driver.runner import Runner
from search.driver.study import FULL, BudgetStudy, Start, Storage, Strategy, storage
from search.driver.winners import check_model, keep_untrained, register, time_registered
from search.record.lease import locked
from search.record.record import Record
from search.record.searches import open_search
from search.record.store import check_store
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
    """Run a search to its end, or resume one that was stopped; return its record.

    Args:
        make_cluster: gives the workers, which hold the workload's `worker_inputs()`.
        report: hears of progress.
        strategy: its means beyond drawing at random.

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
        started = time.monotonic()
        workload = load(spec, report)
        record = _record(spec, workload)
        account = Account(record.search, started)
        try:
            cluster = make_cluster(workload)
            try:
                has_run = _run(
                    spec, workload, cluster, record, report, studies_at=studies_at, strategy=strategy, account=account
                )
            finally:
                cluster.close()
            record.search.enter("registering")
            register(spec, workload, record, report)
            if has_run:
                record.search.add(wall_s=account.lap())
            result = record.read.result()
            path.write_text(html(result), encoding="utf-8")
            record.search.finish(path)
        except BaseException as error:
            record.halt("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        return result


def report_path(spec: SearchSpec) -> Path:
    """Return the place of the search's HTML report, in the current folder."""
    return Path("paredown.reports", f"{spec.name}.html")


def _record(spec: SearchSpec, workload: Workload) -> Record:
    """Return the record of this search, cleared of what a killed driver left unfinished."""
    record = open_search(
        spec.tracking.uri,
        spec.name,
        decisive=spec.decisive() | {"rooflines": rooflines(spec), "teacher and data": workload.fingerprint},
        spec=masked(spec.text),
        model=spec.registered_model,
    )
    record.resume()
    return record


def _run(
    spec: SearchSpec,
    workload: Workload,
    cluster: Cluster,
    record: Record,
    report: Report,
    *,
    studies_at: Storage,
    strategy: Strategy,
    account: Account,
) -> bool:
    """Do everything that needs workers; return whether any trial was run."""
    record.search.enter("scoring")
    prepared = prepare(spec, workload, cluster, report, known=record.search.teacher(), timed=spec.times_all())
    _write(prepared, record)
    ledger = Ledger(record.read.trials(), record.read.works())
    explore = record.search.settle_explore(_explore(spec, strategy), is_new=not ledger.results)
    studies = _studies(prepared, record, studies_at, strategy, explore)
    by_budget = {study.budget: study for study in studies}
    before, trials = len(ledger.results), spec.search.trials * explore * len(studies)

    def tell(one: Proposal, note: str) -> None:
        report("trials", len(ledger.results), trials, f"{one.budget} {one.number} {one.method}: {note}")

    def should_continue(proposal: Proposal, progress: Progress) -> bool:
        return by_budget[proposal.budget].should_continue(proposal.number, progress.step, progress.top1)

    runner = Runner(prepared, cluster, record.trials, ledger, account, report=tell, should_continue=should_continue)
    record.search.expect(trials)
    record.search.enter("trials")
    if spec.search.asynchronous:
        _asynchronously(prepared, studies, runner, ledger, strategy)
    else:
        _in_rounds(prepared, studies, runner, ledger, strategy, explore)
    importance = {study.budget: study.importance() for study in studies}
    record.search.write_importance({name: importance[name] for name in prepared.first_plans if name in importance})
    keep_untrained(record, cluster)
    if time_registered(record, prepared.fitter.stopwatch):
        account.owe()
        account.write(prepared.fitter)
    if (ended := len(ledger.results)) < trials:
        log.warning(
            "time is up after %d of %d trials (search.timeout); the same command goes on from there", ended, trials
        )
    return ended > before


def _write(prepared: Prepared, record: Record) -> None:
    """Record what is known before any trial, and warn of every method that cannot meet a budget."""
    record.search.write_limits({target.name: target.limits for target in prepared.targets})
    if prepared.spec.times_all():  # else the device is looked at when something is timed on it
        record.search.write_devices(prepared.fitter.stopwatch.described())
    record.search.write_rule(prepared.spec.search.winner)
    record.search.write_metric(prepared.spec.metric.scale)
    record.search.write_teacher(prepared.teacher)
    unreachable = {
        budget: {**prepared.refused, **{method: why for method, why in found.items() if isinstance(why, str)}}
        for budget, found in prepared.first_plans.items()
    }
    record.search.write_unreachable(unreachable)
    for why in dict.fromkeys(why for found in unreachable.values() for why in found.values()):
        log.warning(why)


def _studies(
    prepared: Prepared, record: Record, studies_at: Storage, strategy: Strategy, explore: int
) -> list[BudgetStudy]:
    """Return a study per budget that some method can meet, the tightest first: neighbours lie side by side.

    The methods a budget's study began with stay its methods: predictions of latency differ from day to day, and a study
    cannot.
    """
    spec = prepared.spec
    capable = {
        name: {"methods": [one.name for one in methods], "macs": _size(prepared, name)}
        for name in prepared.first_plans
        if (methods := prepared.capable(name))
    } | record.search.capable()
    record.search.write_capable(capable)
    found = [
        BudgetStudy(
            studies_at,
            f"{record.search.run_id}/{name}",
            name,
            [named(method) for method in capable[name]["methods"]],
            spec.search.seed,
            labels=spec.recovery.labels,
            steps=spec.recovery.steps,
            warmup=2 * rung(spec.recovery.steps),
            explore=explore,
            strategy=strategy,
        )
        for name in capable
    ]
    return sorted(found, key=lambda study: (capable[study.budget]["macs"], study.budget))


def _size(prepared: Prepared, budget: str) -> int:
    """Return the most MACs that any method's first plan for a budget leaves."""
    return max(plan.macs for plan in prepared.first_plans[budget].values() if not isinstance(plan, str))


def _explore(spec: SearchSpec, strategy: Strategy) -> int:
    """Return how many candidates are judged for each that is trained: one, where none is or there are no rounds."""
    return spec.search.explore if strategy.explores and spec.recovery.steps and not spec.search.asynchronous else 1


def _in_rounds(
    prepared: Prepared,
    studies: Sequence[BudgetStudy],
    runner: Runner,
    ledger: Ledger,
    strategy: Strategy,
    explore: int,
) -> None:
    """Ask, judge, train and tell whole rounds until every budget has its trials or time is up.

    All budgets go through their rounds side by side, so that what one learns from its neighbours does not depend on
    when a driver was killed.
    """
    trials = prepared.spec.search.trials * explore
    deadline = time.monotonic() + prepared.spec.search.timeout
    while time.monotonic() < deadline:
        open_ones = [study for study in studies if study.told < trials]
        if not open_ones:
            return
        turn = min(study.told // study.round for study in open_ones)
        now = [study for study in open_ones if study.told // study.round == turn]
        starts = {study.budget: _start(study, studies) if turn and strategy.shares else None for study in now}
        rounds = {study: list(_round(study, turn, trials, starts[study.budget])) for study in now}
        if explore > 1:
            ended = runner.train(worth_training(prepared, rounds, turn, runner, ledger, explore))
        else:
            asked = [proposal for one in rounds.values() for proposal in one]
            ended = runner.run([[proposal for proposal in asked if not ledger.knows(proposal)]])
        for _ in ended:
            pass
        for study, proposals in rounds.items():
            for proposal in proposals:
                _tell(study, prepared, ledger.results[proposal.key])


def _round(study: BudgetStudy, turn: int, trials: int, start: Start | None) -> Iterator[Proposal]:
    """Yield the proposals of this budget's round that a killed driver left, and enough new ones to make it whole.

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


def _asynchronously(
    prepared: Prepared, studies: Sequence[BudgetStudy], runner: Runner, ledger: Ledger, strategy: Strategy
) -> None:
    """Ask whenever a worker is free, the budget with the fewest trials first, and tell as trials end."""
    trials = prepared.spec.search.trials
    deadline = time.monotonic() + prepared.spec.search.timeout
    by_budget = {study.budget: study for study in studies}

    def proposals() -> Iterator[list[Proposal]]:
        for study in studies:
            yield from ([one] for one in study.unfinished() if not ledger.knows(one))
        while time.monotonic() < deadline:
            if not (left := [study for study in studies if study.asked < trials]):
                return
            study = min(left, key=lambda study: study.asked)
            is_turn = strategy.shares and study.asked >= study.round and study.asked % study.round == 0
            yield [study.ask(_start(study, studies) if is_turn else None)]

    for study in studies:
        for one in study.unfinished():
            if ledger.knows(one):
                _tell(study, prepared, ledger.results[one.key])
    for candidate in runner.run(proposals()):
        _tell(by_budget[candidate.budget], prepared, candidate)


def _tell(study: BudgetStudy, prepared: Prepared, found: Candidate) -> None:
    """Tells Optuna what came of a trial; one over a limit, as a gated model may be, counts as infeasible."""
    if found.state == "complete":
        excess = prepared.target(study.budget).limits.excess(found.costs)
        study.tell(found.trial, found.top1_validation, excess)
    elif found.stop is not None:
        study.tell_stopped(found.trial, found.stop.step, found.stop.top1)
    else:
        study.tell(found.trial, None)

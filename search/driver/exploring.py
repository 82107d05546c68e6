"""Rung 0: a round proposes more candidates than it trains; all are judged after refit, and the best go on.

A first figure costs seconds where training costs minutes. This is the lowest rung of successive halving (Jamieson and
Talwalkar 2016): what is stopped there is a model of its own, with all its figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from search.driver.ledger import Ledger
from search.driver.prepare import Prepared
from search.driver.runner import Judged, Planned, Runner
from search.driver.study import BudgetStudy
from search.limits import TOP1_DROP, Limits
from search.trials import Proposal, costs_of


def worth_training(
    prepared: Prepared,
    rounds: Mapping[BudgetStudy, Sequence[Proposal]],
    turn: int,
    runner: Runner,
    ledger: Ledger,
    explore: int,
) -> list[Planned]:
    """Judge what is new in round `turn` of each budget and end there all but one in `explore`; return those that go on.

    Which go on is written to the study before any is ended, so a search that is killed goes on with the same.
    """
    missing = [proposal for one in rounds.values() for proposal in one if not ledger.knows(proposal)]
    judged = runner.judge(runner.plan(missing))
    going, passed = list[Planned](), list[Judged]()
    for study, proposals in rounds.items():
        own = [one for one in judged if one.planned.proposal.budget == study.budget]
        if (chosen := study.chosen(turn)) is None:
            before = sum(_was_trained(ledger, proposal) for proposal in proposals)
            room = -(-len(proposals) // explore) - before
            chosen = [
                one.planned.proposal.number for one in promising(own, prepared.target(study.budget).limits)[:room]
            ]
            study.choose(turn, chosen)
        for one in own:
            if one.planned.proposal.number in chosen:
                going.append(one.planned)
            else:
                passed.append(one)
    runner.pass_over(passed)
    return runner.timed(going)


def promising(judged: Sequence[Judged], limits: Limits) -> list[Judged]:
    """Return trials of one budget, the most promising first.

    One that is over a limit comes last, then a twin: what differs from a better one in the recipe alone. The rest go by
    top-1 after refit, and ties by number. What is lost of top-1 is not looked at, since training brings it back.
    """
    seen: dict[str, int] = {}

    def rank(one: Judged) -> tuple[bool, int, float, int]:
        over = [cost for cost in limits.exceeded(_costs(one)) if cost != TOP1_DROP]
        number = one.planned.proposal.number
        return bool(over), twin_of[number], -one.outcome.top1_validation, number

    twin_of: dict[int, int] = {}
    for one in judged:
        twin_of[one.planned.proposal.number] = seen.get(one.planned.student, 0)
        seen[one.planned.student] = twin_of[one.planned.proposal.number] + 1
    return sorted(judged, key=rank)


def _costs(one: Judged) -> dict[str, float]:
    latency = {device: timing.latency_ms for device, timing in one.planned.fitted.timings.items()}
    return dict(costs_of(one.outcome, latency, top1_drop=None))


def _was_trained(ledger: Ledger, proposal: Proposal) -> bool:
    """Whether a trial is on record as one that went on from step 0."""
    found = ledger.results.get(proposal.key)
    return found is not None and (found.state == "complete" or (found.stop is not None and found.stop.step > 0))

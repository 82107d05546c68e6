"""Tell how far a search is, from its record alone: anybody who can reach the store may ask, and the driver is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from search.base import TrackingError
from search.frontier import winner
from search.record.entries import scale_of
from search.record.reading import rule_of
from search.record.record import Record
from search.record.search_run import Phase
from search.record.searches import find_begun
from search.record.store import FAULTS, unwritable
from search.results import BudgetResult
from search.trials import Candidate
from search.units import TOP1, Scale


@dataclass(frozen=True)
class Progress:
    """A search as it stands: `trials` have ended of `expected` (0 while that is not known), `stopped` of them early.

    `phase` is the driver's own word, so that of a killed one stays what it was. `best` holds per budget the best model
    within its limits so far, if there is one; nothing in it is registered before the search is done. `wall_s` are
    seconds over all sittings. Every top-1 in it is a share on the scale of `metric`.
    """

    name: str
    phase: Phase
    trials: int
    expected: int
    stopped: int
    wall_s: float
    best: Mapping[str, BudgetResult | None]
    metric: Scale = TOP1

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; each of `best` is None or has the keys of a winner in `paredown frontier --json`.

        Beside its top-1 stands the metric's own `value`.
        """
        best = {name: None if found is None else self._winner_json(found) for name, found in self.best.items()}
        return vars(self) | {"best": best, "metric": asdict(self.metric)}

    def _winner_json(self, found: BudgetResult) -> dict[str, Any]:
        winner: dict[str, Any] = found.to_json()["winner"]
        return winner | {"value": self.metric.value(winner["top1_validation"])}


def progress(uri: str, name: str) -> Progress:
    """Return how far search `name` of the MLflow store at `uri` is.

    Raises:
        TrackingError: the store cannot be reached, or holds no such search.
    """
    try:
        record = find_begun(uri, name)
        return so_far(record, name, record.read.trials())
    except FAULTS as error:
        raise TrackingError(unwritable(uri, str(error))) from error


def so_far(record: Record, name: str, trials: Sequence[Candidate]) -> Progress:
    """Return the progress of the search `record` is of, of which these trials have ended."""
    run = record.client.get_run(record.search.run_id)
    tags, limits = run.data.tags, record.read.limits()
    winners = {budget: winner(trials, limit, rule_of(tags)) for budget, limit in limits.items()}
    return Progress(
        name=name,
        phase=cast(Phase, tags.get("paredown.phase", "starting")),
        trials=len(trials),
        expected=int(tags.get("paredown.expected", 0)),
        stopped=sum(trial.state == "stopped" for trial in trials),
        wall_s=run.data.metrics.get("wall_s", 0.0),
        best={
            budget: None if best is None else BudgetResult(budget, limits[budget], best)
            for budget, best in winners.items()
        },
        metric=scale_of(tags),
    )

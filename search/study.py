"""Optuna, and nothing else: what to try next for one budget. The only file that imports it."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from methods.base import Choice, Knob, KnobValue, Range, defaults
from methods.chain import AnyMethod
from search.base import SearchError

Storage: TypeAlias = BaseStorage

RECOVERY: dict[str, Knob] = {
    "learning_rate": Range(0.01, 0.2, default=0.05, log=True),
    "distill": Range(0.0, 1.0, default=0.5),
}
"""The knobs of recovery, which every method shares. Without labels there is nothing to weigh, and `distill` is gone."""


@dataclass(frozen=True)
class Proposal:
    """What to try: a method with its knobs and recovery's, as trial `number` of `budget`."""

    budget: str
    number: int
    method: str
    knobs: Mapping[str, KnobValue]
    recovery: Mapping[str, KnobValue]

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from every other proposal of the search."""
        return self.budget, self.number

    def seed(self, base: int) -> int:
        """This trial's own seed, from the search's."""
        return _seed(base, self.budget, self.number)


class BudgetStudy:
    """The trials of one budget: each method first with its defaults, then whatever the sampler draws.

    Every draw is seeded by the search's seed and the trial's number, so a search that was killed and resumed proposes
    what an undisturbed one would have.
    """

    def __init__(
        self, storage: Storage, name: str, budget: str, methods: Sequence[AnyMethod], seed: int, *, labels: bool
    ) -> None:
        self.budget = budget
        self._methods = {method.name: method for method in methods}
        self._recovery = RECOVERY if labels else {"learning_rate": RECOVERY["learning_rate"]}
        self._seed = seed
        self._study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)

    @property
    def round(self) -> int:
        """How many proposals make a round: one per method, so that no search depends on its number of workers."""
        return len(self._methods)

    @property
    def told(self) -> int:
        """How many trials have ended, in whatever way."""
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)))

    def unfinished(self) -> list[Proposal]:
        """The proposals asked but never told, in order: a killed driver leaves them behind."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [self._proposal(Trial(self._sampling(trial.number), trial._trial_id)) for trial in running]

    def ask(self) -> Proposal:
        """The next proposal; it counts as running until it is told."""
        trials = self._study.get_trials(deepcopy=False)
        number = sum(trial.state != TrialState.WAITING for trial in trials)
        if number < len(self._methods) and number == len(trials):
            self._study.enqueue_trial(self._defaults(list(self._methods)[number]))
        return self._proposal(self._sampling(number).ask())

    def tell(self, number: int, top1: float | None, excess: Mapping[str, float] = MappingProxyType({})) -> None:
        """Ends a trial with its validation top-1, or as failed with None.

        `excess` is how far each limited cost lies above its limit, as a share of it; positive is infeasible.
        """
        if top1 is None:
            self._study.tell(number, state=TrialState.FAIL)
            return
        trial = Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)
        for cost in set(excess) - set(trial.constraints):
            trial.set_constraint(cost, excess[cost])
        self._study.tell(number, top1, state=TrialState.COMPLETE)

    def _sampling(self, number: int) -> optuna.Study:
        startup = 2 * len(self._methods)
        self._study.sampler = optuna.samplers.TPESampler(
            seed=_seed(self._seed, self.budget, number), n_startup_trials=startup
        )
        return self._study

    def _defaults(self, method: str) -> dict[str, Any]:
        own = {f"{method}.{name}": value for name, value in defaults(self._methods[method]).items()}
        shared = {f"recovery.{name}": knob.default for name, knob in self._recovery.items()}
        return {"method": method} | own | shared

    def _proposal(self, trial: Trial) -> Proposal:
        method = str(trial.suggest_categorical("method", list(self._methods)))
        recovery = {name: _suggest(trial, f"recovery.{name}", knob) for name, knob in self._recovery.items()}
        knobs = {name: _suggest(trial, f"{method}.{name}", knob) for name, knob in self._methods[method].knobs.items()}
        return Proposal(self.budget, trial.number, method, knobs, recovery)


def storage(location: str) -> Storage:
    """Optuna's storage at a database URL, or in a journal file at that path."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in location:
        try:
            return RDBStorage(location)
        except (SQLAlchemyError, ImportError) as error:
            raise SearchError(
                f"cannot use tracking.studies: {textwrap.shorten(str(error), 300)}; expected a database URL that "
                "SQLAlchemy can open, or a file name; correct it, or leave it out"
            ) from error
    path = Path(location)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(path), grace_period=5)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _suggest(trial: Trial, name: str, knob: Knob) -> KnobValue:
    if isinstance(knob, Choice):
        return cast(KnobValue, trial.suggest_categorical(name, list(knob.options)))
    return trial.suggest_float(name, knob.low, knob.high, log=knob.log)


def _seed(base: int, budget: str, number: int) -> int:
    return int(np.random.SeedSequence([base, zlib.crc32(budget.encode()), number]).generate_state(1)[0])

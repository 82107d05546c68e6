"""Optuna, and nothing else: what to try next for one budget. The only file that imports it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner, PercentilePruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from methods.base import Choice, Knob, KnobValue, Range
from methods.chain import AnyMethod
from methods.protocol import defaults
from search.base import SearchError, shortened
from search.record.store import HELD_S, check_sqlite, sqlite_address, sqlite_path, without_sql
from search.trials import Proposal, trial_seed

log = logging.getLogger(__name__)

Storage: TypeAlias = BaseStorage

RECOVERY: dict[str, Knob] = {
    "learning_rate": Range(0.01, 0.2, default=0.05, log=True),
    "distill": Range(0.0, 1.0, default=0.5),
}
"""The knobs of recovery, which every method shares."""


def recovery_knobs(steps: int, *, labels: bool) -> dict[str, Knob]:
    """Those that mean something: without steps none does, without labels there is nothing for `distill` to weigh.

    >>> list(recovery_knobs(400, labels=False)), recovery_knobs(0, labels=True)
    (['learning_rate'], {})
    """
    unused = set(RECOVERY) if steps == 0 else set() if labels else {"distill"}
    return {name: knob for name, knob in RECOVERY.items() if name not in unused}


@dataclass(frozen=True)
class Strategy:
    """A search's means beyond drawing at random; the benchmark of its quality switches them off.

    It `models` told trials (TPE), `starts` with every method's defaults, `stops` trials that fall behind in recovery,
    `shares` good proposals between neighbouring budgets, and `explores`: judges more trials than it trains.
    """

    models: bool = True
    starts: bool = True
    stops: bool = True
    shares: bool = True
    explores: bool = True


FULL = Strategy()
RANDOM = Strategy(models=False, starts=False, stops=False, shares=False, explores=False)

ENOUGH = 10
"""Complete trials, below which nothing is said of what decided top-1."""

KEPT = 2 / 3
"""A trial continues while it would be among this share of the told ones. A median stopped trials close to the best:
most accuracies of one budget lie close together, and how they are ordered changes while the learning rate falls."""

BEST, LATEST = 100, 200
"""Trials that the sampler sees of a budget that has more: the time of a draw grows with them. TPE models the best
25 by themselves, and those are the same here; of the others, from which it tells them, old ones weigh little anyway."""

Start: TypeAlias = Mapping[str, Any]
"""A proposal by the names of Optuna's parameters, as one study's `best` gives it to another's `ask`."""


class _Seen(optuna.Study):
    """A study as the sampler sees it: the `trials_seen`, which are set before it draws."""

    trials_seen: Sequence[FrozenTrial] = ()

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self.trials_seen if states is None or trial.state in states]


class BudgetStudy:
    """The trials of one budget: each method first with its defaults, then the sampler's draws.

    Every draw is seeded by the search's seed and the trial's number, so a search that was killed and resumed proposes
    what an undisturbed one would have.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        budget: str,
        methods: Sequence[AnyMethod],
        seed: int,
        *,
        labels: bool,
        steps: int = 1,
        warmup: int = 0,
        explore: int = 1,
        strategy: Strategy = FULL,
    ) -> None:
        self.budget = budget
        self._methods = {method.name: method for method in methods}
        self._seed = seed
        self._strategy = strategy
        self._explore = explore
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            pruner=self._pruner(warmup) if strategy.stops else NopPruner(),
        )
        self._seen = _Seen(name, self._study._storage)
        trials = self._study.get_trials(deepcopy=False)
        drawn = {name for trial in trials for name in trial.params}  # an old study goes on with the knobs it began with
        wanted = recovery_knobs(steps, labels=labels)
        self._recovery = {
            name: knob for name, knob in RECOVERY.items() if name in wanted or f"recovery.{name}" in drawn
        }
        self.asked = _asked(trials)
        self.told = sum(trial.state.is_finished() for trial in trials)

    @property
    def round(self) -> int:
        """The proposals in a round: `explore` per method, so that no search depends on its number of workers."""
        return len(self._methods) * self._explore

    def unfinished(self) -> list[Proposal]:
        """The proposals asked but never told, in order: a killed driver leaves them behind."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [self._proposal(Trial(self._sampling(trial.number), trial._trial_id)) for trial in running]

    def ask(self, start: Start | None = None) -> Proposal:
        """The next proposal; it counts as running until it is told.

        Args:
            start: what to propose instead of a draw, as another study's `best` gave it; one that was tried here, or
                whose method this budget does not have, is ignored.
        """
        trials = self._study.get_trials(deepcopy=False)
        number = _asked(trials)
        self.asked = number + 1
        if number == len(trials):  # else a driver was killed between queueing and asking
            if number < len(self._methods) and self._strategy.starts:
                start = self._defaults(list(self._methods)[number])
            tried = [trial.params for trial in trials]
            if start is not None and start["method"] in self._methods and start not in tried:
                self._study.enqueue_trial(dict(start))
        trial = self._study.ask()
        return self._proposal(Trial(self._sampling(number), trial._trial_id))

    def best(self) -> Start | None:
        """Return the proposal of the best told trial within the limits, if there is one."""
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = max(filter(_fits, ended), key=lambda trial: (trial.value, -trial.number), default=None)
        return None if best is None else best.params

    def should_continue(self, number: int, step: int, top1: float) -> bool:
        """Take in what a running trial reached at a step of recovery; False if it should be stopped early.

        It is compared with trials that were told as complete, never with those beside it: timing decides nothing.
        """
        return not self._reach(number, step, top1).should_prune()

    def tell(self, number: int, top1: float | None, excess: Mapping[str, float] = MappingProxyType({})) -> None:
        """Ends a trial with its validation top-1, or as failed with None.

        `excess` is how far each limited cost lies above its limit, as a share of it; positive is infeasible.
        """
        self.told += 1
        if top1 is None:
            self._study.tell(number, state=TrialState.FAIL)
            return
        trial = self._trial(number)
        for cost in set(excess) - set(trial.constraints):
            trial.set_constraint(cost, excess[cost])
        self._study.tell(number, top1, state=TrialState.COMPLETE)

    def tell_stopped(self, number: int, step: int, top1: float) -> None:
        """Ends a trial that was stopped early at a step of recovery; the sampler learns from what it reached there."""
        self.told += 1
        self._reach(number, step, top1)
        self._study.tell(number, state=TrialState.PRUNED)

    def chosen(self, turn: int) -> list[int] | None:
        """Return the trials of a round that were chosen to be trained, if that was decided."""
        found: list[int] | None = self._study.user_attrs.get(f"chosen in round {turn}")
        return found

    def choose(self, turn: int, numbers: Sequence[int]) -> None:
        """Decide which trials of a round are trained: once and for all, so that a kill changes nothing."""
        self._study.set_user_attr(f"chosen in round {turn}", list(numbers))

    def importance(self) -> dict[str, float]:
        """Return each knob's share in what decided top-1; the shares add up to 1. Empty below `ENOUGH` complete trials.

        Only knobs that had several values count.
        Source: PED-ANOVA (Watanabe, Bansal, Hutter 2023), as Optuna has it.
        """
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(complete) < ENOUGH or len({trial.value for trial in complete}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of too few trials, where it gives equal shares
            found = optuna.importance.get_param_importances(self._study)
        values = {name: {trial.params[name] for trial in complete if name in trial.params} for name in found}
        shares = {name: float(share) for name, share in found.items() if share > 0 and len(values[name]) > 1}
        return {name: share / sum(shares.values()) for name, share in shares.items()}

    def _reach(self, number: int, step: int, top1: float) -> Trial:
        """Take in what a trial reached at a step, once; the trial."""
        trial = self._trial(number)
        if step not in self._study._storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(top1, step)
        return trial

    def _trial(self, number: int) -> Trial:
        storage = self._study._storage
        return Trial(self._study, storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number))

    def _sampling(self, number: int) -> optuna.Study:
        self._seen.trials_seen = instructive(self._study.get_trials(deepcopy=False))
        self._seen.sampler = self._sampler(trial_seed(self._seed, self.budget, number))
        return self._seen

    def _sampler(self, seed: int) -> BaseSampler:
        """TPE models a method together with its knobs and the recovery's: what suits one method spoils another."""
        if not self._strategy.models:
            return RandomSampler(seed=seed)
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            return TPESampler(seed=seed, n_startup_trials=len(self._methods), multivariate=True, group=True)

    def _pruner(self, warmup: int) -> BasePruner:
        """Stop early what is behind `KEPT` of the trials told as complete at the same step, after `warmup` steps."""
        return PercentilePruner(100 * KEPT, n_startup_trials=len(self._methods), n_warmup_steps=warmup)

    def _defaults(self, method: str) -> dict[str, Any]:
        own = {f"{method}.{name}": value for name, value in defaults(self._methods[method]).items()}
        shared = {f"recovery.{name}": knob.default for name, knob in self._recovery.items()}
        return {"method": method} | own | shared

    def _proposal(self, trial: Trial) -> Proposal:
        _ = trial.relative_params  # what Optuna draws all at once, it draws when first asked: now, by the trial's seed
        method = str(self._suggest(trial, "method", Choice(tuple(self._methods), "")))
        recovery = {name: self._suggest(trial, f"recovery.{name}", knob) for name, knob in self._recovery.items()}
        own = self._methods[method].knobs
        knobs = {name: self._suggest(trial, f"{method}.{name}", knob) for name, knob in own.items()}
        return Proposal(self.budget, trial.number, method, knobs, recovery)

    def _suggest(self, trial: Trial, name: str, knob: Knob) -> KnobValue:
        """A value of its own seed: what a killed driver had written already draws nothing from the others."""
        self._seen.sampler = self._sampler(trial_seed(self._seed, self.budget, trial.number, name))
        if not isinstance(knob, Choice):
            return trial.suggest_float(name, knob.low, knob.high, log=knob.log)
        try:
            return cast(KnobValue, trial.suggest_categorical(name, list(knob.options)))
        except ValueError as error:
            raise SearchError(
                f"the study of budget {self.budget!r} was begun by an earlier paredown: {name} had other options than "
                f"{list(knob.options)}; its results stay as they are; go on under another name with --fork NEW-NAME"
            ) from error


def _asked(trials: Sequence[FrozenTrial]) -> int:
    """Count the trials, ended or not; a queued one is none yet."""
    return sum(trial.state != TrialState.WAITING for trial in trials)


def instructive(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that tell the sampler most, in order: the `BEST` and the `LATEST` that ended, and all that run."""
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(ended) <= BEST + LATEST:
        return list(trials)
    complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    best = islice(filter(_fits, sorted(complete, key=_value, reverse=True)), BEST)
    running = (trial for trial in trials if trial.state == TrialState.RUNNING)
    kept = {trial.number: trial for trial in chain(best, ended[-LATEST:], running)}
    return [kept[number] for number in sorted(kept)]


def _value(trial: FrozenTrial) -> float:
    """The top-1 that a complete trial was told with."""
    assert trial.value is not None
    return trial.value


def _fits(trial: FrozenTrial) -> bool:
    """Whether a trial that was told as complete keeps every limit."""
    return all(excess <= 0 for excess in trial.constraints.values())


def storage(location: str) -> Storage:
    """Optuna's storage at a database URL, or in a journal file at that path.

    Raises:
        SearchError: the database cannot be opened, or a line of the file is none of a journal's.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_sqlite("tracking.studies", location)
    if "://" in location:
        path = sqlite_path(location)
        try:
            if path is None:
                return RDBStorage(location)
            return RDBStorage(sqlite_address(path), engine_kwargs={"connect_args": {"timeout": HELD_S}})
        except (SQLAlchemyError, ImportError) as error:
            reason = shortened(without_sql(str(error)), 300)
            raise SearchError(
                f"cannot use tracking.studies: {reason}; expected a database URL that SQLAlchemy can open, or a file "
                "name; correct it, or leave it out"
            ) from error
    path = Path(location)
    if path.exists() and not path.is_file():
        raise SearchError(f"tracking.studies {path} is no file; expected a journal of Optuna's; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(path), grace_period=5)
    backend = JournalFileBackend(str(path), lock_obj=lock)
    with get_lock_file(lock):  # under it, a line without an end is no other driver's that is just being written
        _mend_journal(path)
    return JournalStorage(backend)


ENTRY = b'{"op_code":'
"""The beginning of every line of a journal."""


def _mend_journal(path: Path) -> None:
    """Cut off the last line of a journal if a kill or a full disk tore it: nothing was told of it.

    Raises:
        SearchError: another line is none of a journal's.
    """
    whole = 0
    with path.open("rb+") as journal:
        for number, line in enumerate(journal, 1):
            is_torn = not line.endswith(b"\n")
            if is_torn and line.startswith(ENTRY[: len(line)]):  # another's file is never cut
                log.warning("the last line of %s, %d, is torn and is cut off", path, number)
                journal.truncate(whole)
                return
            if is_torn or not _is_entry(line):
                raise SearchError(
                    f"line {number} of tracking.studies {path} is {line[:60]!r}; expected a journal of Optuna's, whose "
                    "lines are JSON; give another name, or move the file away: the same command goes on from MLflow "
                    "without it"
                )
            whole += len(line)


def _is_entry(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "op_code" in found

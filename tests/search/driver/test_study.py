"""The study of one budget: defaults first, seeded draws, and the same proposals after a driver was killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest

import methods
from methods.base import Choice, Range
from methods.protocol import defaults
from search.base import SearchError
from search.driver.study import BEST, LATEST, RANDOM, RECOVERY, BudgetStudy, instructive, storage
from search.trials import Proposal

METHODS = {name: methods.METHODS[name] for name in ("manidp", "alds", "uniform")}


def study(path: Path, *, name: str = "one", labels: bool = True, seed: int = 0) -> BudgetStudy:
    return BudgetStudy(storage(str(path)), name, "half", list(METHODS.values()), seed, labels=labels)


def objective(proposal: Proposal) -> float:
    """A made-up accuracy that depends on the proposal alone."""
    return 0.5 + 0.4 * float(proposal.recovery["distill"]) - 0.1 * (proposal.method == "uniform")


def run(made: BudgetStudy, rounds: int) -> list[Proposal]:
    found = []
    for _ in range(rounds):
        asked = [made.ask() for _ in range(made.round)]
        for proposal in asked:
            made.tell(proposal.number, objective(proposal))
        found += asked
    return found


def test_every_method_is_first_tried_with_its_defaults(tmp_path: Path) -> None:
    first = run(study(tmp_path / "s"), 1)
    assert [proposal.method for proposal in first] == list(METHODS)
    assert [proposal.number for proposal in first] == [0, 1, 2]
    for proposal in first:
        assert proposal.knobs == defaults(METHODS[proposal.method])
        assert proposal.recovery == {name: knob.default for name, knob in RECOVERY.items()}


def test_later_proposals_stay_within_every_knob(tmp_path: Path) -> None:
    for proposal in run(study(tmp_path / "s"), 5)[3:]:
        knobs = METHODS[proposal.method].knobs
        assert proposal.knobs.keys() == knobs.keys()
        for name, value in proposal.knobs.items():
            knob = knobs[name]
            assert value in knob.options if isinstance(knob, Choice) else knob.low <= value <= knob.high
        rate = RECOVERY["learning_rate"]
        assert isinstance(rate, Range)
        assert rate.low <= proposal.recovery["learning_rate"] <= rate.high


def test_what_lies_over_a_limit_is_hardly_tried_again(tmp_path: Path) -> None:
    drawn = {}
    for excess in (-0.1, 0.1):
        made = study(tmp_path / f"{excess}")
        found = []
        for _ in range(8):
            asked = [made.ask() for _ in range(made.round)]
            for proposal in asked:
                is_gated = proposal.method == "manidp"
                made.tell(proposal.number, 0.9 if is_gated else 0.5, {"macs": excess if is_gated else -0.1})
            found += asked
        drawn[excess] = sum(proposal.method == "manidp" for proposal in found)
    assert drawn[0.1] < drawn[-0.1] / 2


def test_a_limit_told_before_a_kill_is_not_told_again(tmp_path: Path) -> None:
    made = study(tmp_path / "s")
    number = made.ask().number
    trial = optuna.trial.Trial(made._study, made._study.get_trials()[number]._trial_id)
    trial.set_constraint("macs", 0.5)
    made.tell(number, 0.9, {"macs": 0.5})
    assert made._study.get_trials()[number].constraints == {"macs": 0.5}


def test_without_labels_there_is_nothing_to_weigh(tmp_path: Path) -> None:
    assert study(tmp_path / "s", labels=False).ask().recovery.keys() == {"learning_rate"}


@pytest.mark.parametrize("killed_after", range(1, 12))
def test_a_killed_driver_proposes_what_an_undisturbed_one_would(tmp_path: Path, killed_after: int) -> None:
    """Four rounds of three; the driver dies after that many proposals, some told, some not."""
    undisturbed = run(study(tmp_path / "calm"), 4)
    first = study(tmp_path / "killed")
    whole = killed_after // first.round
    run(first, whole)
    for _ in range(killed_after % first.round):
        first.ask()

    resumed = study(tmp_path / "killed")
    left = resumed.unfinished()
    assert left == undisturbed[whole * resumed.round : killed_after]
    left += [resumed.ask() for _ in range(-len(left) % resumed.round if left else 0)]
    for proposal in left:
        resumed.tell(proposal.number, objective(proposal))
    rest = run(resumed, (12 - resumed.told) // resumed.round)
    assert undisturbed[: whole * 3] + left + rest == undisturbed


def test_a_driver_killed_between_a_proposals_knobs(tmp_path: Path) -> None:
    """The trial exists in the storage, its parameters only in part: the same draw completes it."""
    undisturbed = run(study(tmp_path / "calm"), 3)
    killed = study(tmp_path / "killed")
    run(killed, 2)
    trial = killed._sampling(6).ask()
    assert trial.relative_params
    killed._suggest(trial, "method", Choice(tuple(METHODS), ""))
    killed._suggest(trial, "recovery.learning_rate", RECOVERY["learning_rate"])
    assert study(tmp_path / "killed").unfinished() == undisturbed[6:7]


def test_seeds_differ_by_budget_and_number_and_search() -> None:
    proposals = [Proposal(budget, number, "alds", {}, {}) for budget in ("half", "tiny") for number in range(3)]
    seeds = {proposal.seed(base) for proposal in proposals for base in (0, 1)}
    assert len(seeds) == 12


def test_failures_count_as_told(tmp_path: Path) -> None:
    made = study(tmp_path / "s")
    made.tell(made.ask().number, None)
    assert made.told == 1
    assert made.unfinished() == []


def test_a_database_holds_studies_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    made = BudgetStudy(storage(url), "one", "half", list(METHODS.values()), 0, labels=True)
    assert run(made, 1) == run(study(tmp_path / "s"), 1)


def test_a_database_that_cannot_be_opened_is_told() -> None:
    with pytest.raises(SearchError, match=r"cannot use tracking\.studies"):
        storage("sqlite:////nowhere/at/all.db")
    with pytest.raises(SearchError, match="expected a database URL"):
        storage("foo://bar")


def test_a_torn_last_line_of_a_journal_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "studies"
    study(path).ask()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"wor')
    assert study(path).asked == 1
    assert path.read_bytes()[: len(whole)] == whole
    assert b'"wor{' not in path.read_bytes()


@pytest.mark.parametrize(
    "line", ["not JSON\n", "[1]\n", "root:x:0", '{"a": 1}', '{"a": 1}\n', '{"op_code":4,"wor{"op_code":4}\n']
)
def test_another_line_that_is_none_is_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "studies"
    study(path).ask()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + line)
    with pytest.raises(SearchError, match=rf"line {len(lines) + 1} of .*; expected a journal .*goes on from MLflow"):
        study(path)
    assert path.read_text() == "".join(lines) + line


def test_studies_in_a_folder_or_a_device_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, Path("/dev/null")):
        with pytest.raises(SearchError, match=r"tracking\.studies .* is no file; expected a journal"):
            storage(str(place))


@pytest.mark.parametrize("place", ["sqlite://", "sqlite:///."])
def test_studies_that_are_no_file_are_refused(place: str) -> None:
    with pytest.raises(SearchError, match=r"tracking\.studies is sqlite:.*, which is no file"):
        storage(place)


def test_what_is_behind_two_thirds_of_told_trials_is_given_up(tmp_path: Path) -> None:
    made = study(tmp_path / "s")
    curves = [[0.2, 0.6], [0.4, 0.8], [0.3, 0.7]]
    for curve in curves:
        number = made.ask().number
        assert all(made.should_continue(number, step, top1) for step, top1 in enumerate(curve, start=1))
        made.tell(number, curve[-1])
    ahead, level, behind = (made.ask().number for _ in range(3))
    assert made.should_continue(ahead, 1, 0.9)
    assert made.should_continue(level, 1, 0.27)
    assert not made.should_continue(behind, 1, 0.26)
    made.tell_stopped(behind, 1, 0.26)
    assert made.told == 4
    again = study(tmp_path / "s")
    assert not again.should_continue(behind, 1, 0.26)
    assert [proposal.number for proposal in again.unfinished()] == [ahead, level]


def test_a_trial_is_not_given_up_for_one_that_is_still_running(tmp_path: Path) -> None:
    made = study(tmp_path / "s")
    numbers = [made.ask().number for _ in range(6)]
    for number in numbers[:5]:
        made.should_continue(number, 1, 0.9)
    assert made.should_continue(numbers[5], 1, 0.1)


def test_a_good_proposal_starts_a_neighbour_once(tmp_path: Path) -> None:
    one, other = study(tmp_path / "one"), study(tmp_path / "other")
    run(one, 2)
    run(other, 1)
    assert one.best() is not None
    started = other.ask(one.best())
    best = max(one._study.get_trials(), key=lambda trial: (trial.value, -trial.number))
    assert started.method == best.params["method"]
    assert started.recovery["distill"] == best.params["recovery.distill"]
    drawn = other.ask(one.best())
    assert drawn.recovery["distill"] != started.recovery["distill"]
    assert other.ask({"method": "practise"}).method in METHODS


def test_a_driver_killed_between_queueing_and_asking(tmp_path: Path) -> None:
    calm, killed = study(tmp_path / "calm"), study(tmp_path / "killed")
    start = {"method": "uniform", "recovery.distill": 0.1, "recovery.learning_rate": 0.1}
    for made in (calm, killed):
        run(made, 1)
    killed._study.enqueue_trial(start)
    assert study(tmp_path / "killed").ask(start) == calm.ask(start)
    assert killed.ask(None) == calm.ask(None)


def test_what_lies_over_a_limit_is_nobodys_start(tmp_path: Path) -> None:
    made = study(tmp_path / "s")
    assert made.best() is None
    for excess in (0.1, -0.1, 0.0):
        made.tell(made.ask().number, 0.9 + excess, {"macs": excess})
    best = made.best()
    assert best is not None
    assert best["method"] == "uniform"


def test_importance_says_which_knob_decided(tmp_path: Path) -> None:
    made = study(tmp_path / "s")
    assert made.importance() == {}
    run(made, 10)
    found = made.importance()
    assert max(found, key=lambda name: found[name]) == "recovery.distill"
    assert sum(found.values()) == pytest.approx(1)


def test_a_random_search_starts_with_no_defaults_and_gives_nothing_up(tmp_path: Path) -> None:
    drawn = [
        BudgetStudy(
            storage(str(tmp_path / name)), "one", "half", list(METHODS.values()), 0, labels=True, strategy=RANDOM
        )
        for name in ("one", "two")
    ]
    found = [run(made, 3) for made in drawn]
    assert found[0] == found[1]
    assert found[0][0].recovery["distill"] != RECOVERY["distill"].default
    for top1 in (0.9, 0.8, 0.7, 0.1):
        number = drawn[0].ask().number
        assert drawn[0].should_continue(number, 1, top1)
        drawn[0].tell(number, top1)


def test_of_many_trials_the_sampler_sees_the_best_and_the_latest(tmp_path: Path) -> None:
    kept_at = storage(str(tmp_path / "s"))
    made = BudgetStudy(kept_at, "one", "half", [METHODS["uniform"]], 0, labels=False, strategy=RANDOM)
    values = np.random.default_rng(0).permutation(BEST + LATEST + 30) / 1000
    is_over = np.arange(len(values)) % 7 == 0
    for value, over in zip(values, is_over, strict=True):
        made.tell(made.ask().number, float(value), {"macs": 0.1 if over else -0.1})
    running = {made.ask().number for _ in range(3)}
    trials = optuna.load_study(study_name="one", storage=kept_at).get_trials(deepcopy=False)
    best = np.argsort(np.where(is_over, -1, values))[-BEST:].tolist()
    latest = range(len(values) - LATEST, len(values))
    assert [trial.number for trial in instructive(trials)] == sorted({*best, *latest} | running)
    assert instructive(trials[: BEST + LATEST]) == trials[: BEST + LATEST]

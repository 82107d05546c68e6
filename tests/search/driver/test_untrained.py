"""Searches that train nothing, on images without labels: what check says, what is searched, and what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from methods.base import Infeasible
from search.driver import loop
from search.driver.compress import compress
from search.driver.preflight import preflight
from search.driver.study import BudgetStudy, storage
from search.record.progress import progress
from search.record.registry import version_tags
from search.record.searches import find_search
from search.report.html import html
from search.results import SearchResult
from search.units import Scale
from search.workload.data.sources import digits
from tests.support.searches import inline, parsed, place, quiet

SPEC = """
name: shelf
model: {source: zoo, name: resnet8, weights: teacher.safetensors}
data: {source: digits, labels: false, validation: 0.2, calibration: 128}
methods: [alds]
devices: {rock: {runtime: profile, file: rock.yaml}}
budgets:
  - {name: half, macs: 50%}
  - {name: twin, macs: 50%}
search: {trials: 3}
recovery: {steps: 0}
"""
STORE = "sqlite:///paredown.db"


@pytest.fixture
def here(teacher: Path, tmp_path: Path) -> Path:
    return place(tmp_path, teacher)


@pytest.mark.slow
def test_check_says_what_a_search_then_finds_once_for_equal_budgets(here: Path) -> None:
    spec = parsed(here, SPEC)
    told = preflight(spec, inline, quiet)
    assert told.metric == Scale("agreement")
    assert told.teacher_top1 == 1.0
    assert 0 < told.minutes < 10
    found = loop.search(spec, inline, quiet)
    for budget in told.budgets:
        assert budget.kept is not None
        assert budget.kept.keys() == budget.reasons.keys() == {"alds", "uniform"}
        assert 0.5 < min(budget.kept.values()) <= max(budget.kept.values()) <= 1.0
        first = {one.method: one for one in found.candidates if one.budget == budget.budget and one.trial < 2}
        assert {name: one.top1_validation for name, one in first.items()} == budget.kept
    assert all(not name.startswith("recovery.") for one in found.candidates for name in one.knobs)
    made = [one.run_id for one in found.candidates if one.same_as is None]
    assert sorted(find_search(STORE, "shelf").read.works().values()) == sorted(made)
    assert len(made) <= len(found.candidates) - 2  # the defaults of the twin are those of the half
    check_names(found)
    assert loop.search(spec, inline, quiet).candidates == found.candidates


def check_names(found: SearchResult) -> None:
    """What decides is called agreement wherever it is shown."""
    assert found.to_json()["metric"]["name"] == "agreement"
    assert found.teacher.top1_validation == found.teacher.top1_test == 1.0
    assert progress(STORE, "shelf").metric == Scale("agreement")
    assert version_tags(STORE, "models:/shelf@half")["metric"] == "agreement"
    page = html(found)
    assert "validation agreement" in page
    assert "top-1" not in page


def test_a_study_of_before_keeps_the_knobs_it_began_with(tmp_path: Path) -> None:
    from methods import METHODS

    def study(steps: int) -> BudgetStudy:
        kept = storage(str(tmp_path / "studies"))
        return BudgetStudy(kept, "one", "half", list(METHODS.values()), 0, labels=False, steps=steps)

    first = study(steps=1).ask()
    assert first.recovery.keys() == {"learning_rate"}
    assert study(steps=0).unfinished() == [first]
    assert study(steps=0).ask().recovery.keys() == {"learning_rate"}


@pytest.mark.slow
def test_two_hundred_pictures_are_enough(here: Path) -> None:
    """Of 8 x 8 pixels, in a folder without classes; the teacher reads one channel, so that a factory makes it grey."""
    pool, _ = digits()
    (here / "shelf").mkdir()
    for number, image in enumerate(pool.images[:200, 0]):
        Image.fromarray(image * 15).save(here / "shelf" / f"{number}.png")
    (here / "grey.py").write_text(GREY)
    text = SPEC.replace(
        "{source: zoo, name: resnet8, weights:", "{source: factory, name: './grey.py:network', weights:"
    )
    text = text.replace("{source: digits, labels: false", "{source: imagefolder, root: shelf, size: 8, labels: false")
    told = preflight(parsed(here, text), inline, quiet)
    assert told.budgets[0].kept is not None
    figures = compress(parsed(here, text), inline, method="alds", budget="half", out=here / "out", report=quiet)
    assert figures["top1_validation"] == told.budgets[0].kept["alds"]
    assert figures["metric"]["name"] == "agreement"
    assert figures["teacher"]["top1_test"] == 1.0


GREY = """
import torch
from torch import nn

from search.workload.zoo import build


class Grey(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mean(1, keepdim=True))


def network():
    return Grey(*build("resnet8", 1, 10, 0))
"""


def test_a_first_plan_that_fails_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from methods import METHODS

    def broken(*_: object) -> None:
        raise Infeasible("odd", {})

    monkeypatch.setattr(type(METHODS["uniform"]), "apply", broken)
    told = preflight(parsed(here, SPEC), inline, quiet)
    for budget in told.budgets:
        assert budget.kept is not None
        assert "uniform" not in budget.kept
        assert budget.reasons["uniform"] == "uniform failed: Infeasible: odd"
        assert budget.is_reachable

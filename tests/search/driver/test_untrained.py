"""Searches that train nothing, on images without labels: what check says, what is searched, and what it is called."""

from __future__ import annotations

import json
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
from search.report.html import html
from search.results import SearchResult
from search.units import Scale
from search.workload.sources import digits
from tests.support.searches import inline, parsed, place, quiet

SPEC = """
name: shelf
model: {source: zoo, name: resnet8, weights: teacher.safetensors}
data: {source: digits, labels: false, validation: 0.2, calibration: 128}
methods: [alds, channels]
budgets:
  - {name: half, macs: 50%}
  - {name: small, macs: 25%}
search: {trials: 4}
recovery: {steps: 0}
"""
STORE = "sqlite:///paredown.db"


@pytest.fixture
def here(teacher: Path, tmp_path: Path) -> Path:
    return place(tmp_path, teacher)


def test_check_says_what_a_search_then_finds(here: Path) -> None:
    spec = parsed(here, SPEC)
    told = preflight(spec, inline, quiet)
    assert told.metric == Scale("agreement")
    assert told.teacher_top1 == 1.0
    found = loop.search(spec, inline, quiet)
    for budget in told.budgets:
        assert budget.kept is not None
        assert budget.kept.keys() == budget.reasons.keys() == {"alds", "channels", "uniform"}
        assert 0.5 < min(budget.kept.values()) <= max(budget.kept.values()) <= 1.0
        first = {one.method: one for one in found.candidates if one.budget == budget.budget and one.trial < 3}
        assert {name: one.top1_validation for name, one in first.items()} == budget.kept
    assert 0 < told.minutes < 10
    check_names(found)


def check_names(found: SearchResult) -> None:
    """What decides is called agreement wherever it is shown."""
    assert found.to_json()["metric"]["name"] == "agreement"
    assert found.teacher.top1_validation == found.teacher.top1_test == 1.0
    assert progress(STORE, "shelf").metric == "agreement"
    assert version_tags(STORE, "models:/shelf@half")["metric"] == "agreement"
    page = html(found)
    assert "validation agreement" in page
    assert "top-1" not in page.partition("<h2>")[2].replace("top1", "").split("spec")[0]


def test_no_knob_of_recovery_is_drawn_and_equal_work_is_done_once(here: Path) -> None:
    found = loop.search(parsed(here, SPEC.replace("trials: 4", "trials: 9")), inline, quiet)
    assert all(not name.startswith("recovery.") for one in found.candidates for name in one.knobs)
    works = {(one.budget, json.dumps(one.plan, sort_keys=True)) for one in found.candidates if one.same_as is None}
    assert len(works) == sum(one.same_as is None for one in found.candidates) < len(found.candidates)
    again = loop.search(parsed(here, SPEC.replace("trials: 4", "trials: 9")), inline, quiet)
    assert again.candidates == found.candidates


def test_a_study_of_before_keeps_the_knobs_it_began_with(tmp_path: Path) -> None:
    from methods import METHODS

    def study(steps: int) -> BudgetStudy:
        kept = storage(str(tmp_path / "studies"))
        return BudgetStudy(kept, "one", "half", list(METHODS.values()), 0, labels=False, steps=steps)

    first = study(steps=1).ask()
    assert first.recovery.keys() == {"learning_rate"}
    assert study(steps=0).unfinished() == [first]
    assert study(steps=0).ask().recovery.keys() == {"learning_rate"}


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

    monkeypatch.setattr(type(METHODS["uniform"]), "settle", broken)
    told = preflight(parsed(here, SPEC), inline, quiet)
    for budget in told.budgets:
        assert budget.kept is not None
        assert "uniform" not in budget.kept
        assert budget.reasons["uniform"] == "uniform failed: Infeasible: odd"
        assert budget.is_reachable

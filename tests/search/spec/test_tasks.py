"""The task of a spec: it brings its metric, and what belongs to another task beside it is a mistake."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from search.units import Scale
from tests.search.spec.specs import mistakes, spec

OWN = {
    "name": "mine",
    "model": {"source": "factory", "name": "./a.py:net"},
    "data": {"source": "factory", "name": "./a.py:images"},
    "budgets": [{"name": "half", "macs": "50%"}],
}


def text(**changes: Any) -> str:
    return yaml.safe_dump(OWN | changes)


@pytest.mark.parametrize(
    ("task", "name"),
    [("segmentation", "mIoU"), ("regression", "R\u00b2"), ({"factory": "./a.py:Task"}, "score"), ({}, "top-1")],
)
def test_a_task_brings_its_metric(task: object, name: str) -> None:
    found = spec(text(task=task))
    assert found.metric.scale == Scale(name)
    assert found.metric.is_ours
    own = spec(text(task=task, metric={"function": "./a.py:loss", "direction": "minimize", "range": [0, 2]}))
    assert own.metric.scale == Scale("loss", worst=2, best=0)
    if task != {}:
        unlabelled = {"source": "factory", "name": "./a.py:images", "labels": False}
        assert spec(text(task=task, data=unlabelled)).metric.function == "agreement"


def test_the_task_decides_and_a_classification_is_as_it_was() -> None:
    assert spec(text(task="segmentation")).decisive()["task"] == "segmentation"
    assert spec(text(task={"factory": "./a.py:T"})).decisive()["task"] == {"factory": "./a.py:T", "args": {}}
    assert "task" not in spec(text()).decisive()
    assert spec(text(task="classification")).decisive() == spec(text()).decisive()
    assert spec(text(task={"name": "regression"})).decisive() == spec(text(task="regression")).decisive()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": "segmentaton"}, "task: no task 'segmentaton'; did you mean 'segmentation'?"),
        ({"task": {"factory": "./a.py"}}, "task.factory: './a.py' is no function; write pkg.mod:fn"),
        ({"task": {"args": {}}}, "task: expected a name, or a section with factory"),
        ({"task": {"factory": "./a.py:T", "name": "regression"}}, "task: expected a name, or a section with factory"),
        ({"task": "regression", "metric": "top1"}, "metric: top1 is that of classification, and the task is regress"),
        ({"metric": "miou"}, "metric: miou is that of segmentation, and the task is classification"),
        ({"task": "regression", "model": {"source": "zoo", "name": "resnet8"}}, "model.source: the zoo has classif"),
        ({"task": "segmentation", "data": {"source": "digits"}}, "data.source: digits has classes, and the task is"),
        (
            {"task": "regression", "data": {"source": "imagefolder", "root": "x"}},
            "data.source: imagefolder has classes or masks, and the task is regression",
        ),
    ],
)
def test_what_belongs_to_another_task_is_told(changes: dict[str, Any], told: str) -> None:
    assert told in mistakes(text(**changes))

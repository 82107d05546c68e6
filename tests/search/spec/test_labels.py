"""Images without labels: what the one key brings with it, what contradicts it, and that it leaves old specs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from search.base import SpecError
from search.record.changes import changes
from search.spec import SearchSpec, parse
from search.units import Scale

GOOD = """
name: shelf
model: {source: zoo, name: resnet8, weights: shelf.safetensors}
data: {source: imagefolder, root: shelf, labels: false}
methods: [alds]
budgets: [{name: half, macs: 50%}]
"""


def spec(**changed: object) -> SearchSpec:
    return parse(yaml.safe_dump(yaml.safe_load(GOOD) | changed), folder=Path())


def test_without_labels_students_mimic_and_agreement_decides() -> None:
    for found in (spec(), spec(recovery={"steps": 0}), spec(metric="agreement", recovery={"labels": False})):
        assert not found.recovery.labels
        assert found.metric.scale == Scale("agreement")
        assert found.metric.is_ours
    assert spec(recovery={"data": {"source": "digits"}}).recovery.data is not None
    assert spec().decisive()["metric"] == "agreement"


def test_with_labels_a_record_does_not_know_the_key() -> None:
    for data in ({"source": "digits"}, {"source": "digits", "labels": True}):
        found = spec(data=data)
        assert found.recovery.labels
        assert found.metric.scale == Scale()
        assert "labels" not in found.decisive()["data"]
    told = changes(
        spec(data={"source": "digits"}).decisive(), spec(data={"source": "digits", "labels": False}).decisive()
    )
    assert told == ['metric: "top1", now "agreement"', "recovery.labels: true, now false"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"metric": "top1"}, "metric: 'top1' compares answers with labels, and data.labels is false, where agreement"),
        ({"metric": {"function": "a:b", "name": "x"}}, "metric: 'a:b' compares answers with labels"),
        ({"recovery": {"labels": True}}, "recovery.labels: true needs labels, and data.labels is false; leave one of"),
        (
            {"model": {"source": "zoo", "name": "resnet8"}},
            "model.weights: zoo networks are trained with labels, and data.labels is false; give a file of weights",
        ),
        (
            {"data": {"source": "digits"}, "metric": "agreement"},
            "metric: agreement takes the teacher's answers for lab",
        ),
        ({"metric": {"function": "agreement", "range": [0, 2]}}, "metric: agreement has a name, a direction and a ran"),
        (
            {"recovery": {"data": {"source": "digits", "labels": False}}},
            "recovery.data.labels: those of images to mimic on are never read; leave it out",
        ),
        ({"data": {"source": "digits", "labels": "none"}}, "data.labels: Input should be a valid boolean"),
    ],
)
def test_what_needs_labels_is_refused(changed: dict[str, object], told: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(**changed)
    assert told in str(caught.value)
    assert str(caught.value).startswith("1 mistake")

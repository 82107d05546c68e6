"""The words that every method shares."""

from __future__ import annotations

import json
from dataclasses import replace

from methods.base import Plan

PLAN = Plan("alds", 900, 70, {"layers": [{"name": "1", "rank": 2}]}, 0.5, bound=0.4, notes=("kept whole: 2",))


def test_a_plans_identity_is_all_that_decides_the_student() -> None:
    assert replace(PLAN, loss=0.6, bound=None, notes=()).identity() == PLAN.identity()
    others = {"method": "x", "macs": 1, "params": 1, "choices": {"layers": []}, "macs_expected": 1}
    for name, value in others.items():
        assert replace(PLAN, **{name: value}).identity() != PLAN.identity()


def test_a_plans_identity_is_the_text_that_caches_are_keyed_by() -> None:
    text = (
        '{"choices": {"layers": [{"name": "1", "rank": 2}]}, "macs": 900, "macs_expected": null, "method": "alds", '
        '"params": 70}'
    )
    assert json.dumps(PLAN.identity(), sort_keys=True) == text

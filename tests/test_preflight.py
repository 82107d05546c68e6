"""What is said before anything is trained, where it takes more than a table of yes and no."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import InlineCluster
from search import spec
from search.preflight import preflight

SPEC = """
name: digits
model: {source: zoo, name: resnet14, weights: train}
data: {source: digits, calibration: 64}
methods: [manidp, practise, [practise, alds]]
budgets:
  - {name: half, macs: 50%}
  - {name: light, macs_expected: 50%}
  - {name: tiny, macs: 10%}
recovery: {steps: 2}
"""


def test_what_gates_and_chains_can_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.preflight.TIMED_STEPS", 1)
    found = preflight(spec.parse(SPEC, folder=tmp_path), InlineCluster, lambda *_: None)
    half, light, tiny = found.budgets

    assert half.is_reachable
    assert half.reasons["practise"] is None
    gated = half.reasons["manidp"]
    assert gated is not None
    assert "limits MACs, which manidp meets on average only" in gated
    assert f"{found.macs // 2:,} are expected" in gated

    assert light.limits == {"macs_expected": found.macs // 2}
    assert set(light.reasons.values()) == {None}

    assert "blocks dropped; raise it or try a chain such as [practise, alds]" in str(tiny.reasons["practise"])
    assert tiny.reasons["practise+alds"] is None
    least = {one.method: one.least["macs"] for one in found.methods}
    assert least["practise+alds"] < least["practise"] < found.macs // 2

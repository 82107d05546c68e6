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


FRAGILE = """
import torch
from torch import nn


class Damped(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            self.branch.weight.copy_(-0.999 * torch.eye(8)[:, :, None, None])
            self.branch.bias.zero_()

    def forward(self, x):
        return x + self.branch(x)


class Exponential(nn.Module):
    def forward(self, x):
        return torch.exp(300 * x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), Damped(), Exponential(), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
"""


def test_a_chain_that_cannot_be_planned_is_told_and_spares_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.preflight.TIMED_STEPS", 1)
    (tmp_path / "fragile.py").write_text(FRAGILE)
    model = "{source: factory, name: './fragile.py:network'}"
    text = SPEC.replace("{source: zoo, name: resnet14, weights: train}", model).replace("manidp, practise, ", "alds, ")
    found = preflight(spec.parse(text, folder=tmp_path), InlineCluster, lambda *_: None)
    assert found.budgets[0].reasons["alds"] is None
    told = found.budgets[0].reasons["practise+alds"]
    assert told is not None
    assert "infinity" in told
    assert {one.method: one.refusal for one in found.methods}["practise+alds"] is not None

"""Networks of unusual forwards: each method meets the budget as counted, or refuses with the layer and the reason."""

from __future__ import annotations

import itertools
import re
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods import METHODS
from methods.base import Budget, Infeasible, Plan, ScoreError
from methods.network import count_macs, count_params, profile
from methods.protocol import Method, defaults
from methods.training import Recipe
from search.workload.data.samples import Arrays
from tests.support.odd_networks import ODD, seeded

NO_BLOCK = "no module of the network keeps the shape"
REFUSED = {
    **{("practise", network): NO_BLOCK for network in ODD if network != "coupled"},
    ("manidp", "flipped"): "inner: it runs on several maps of an image",
    ("manidp", "attentive"): "manidp gates ungrouped convolutions",
    ("manidp", "subclassed"): "inner: it is a Squashed, a subclass that is traced through",
    ("alds", "subclassed"): "3 layers are kept whole .*inner: it is a Squashed, a subclass",
}
"""The refusals that are right, and a part of each message; every other pair meets its budget."""


@pytest.mark.parametrize(("method", "network"), list(itertools.product(METHODS, ODD)))
def test_a_budget_is_met_as_counted_or_refused_with_a_reason(method: str, network: str) -> None:
    teacher = seeded(ODD[network])
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    plan = planned(METHODS[method], teacher, images)
    if isinstance(plan, str) or (method, network) in REFUSED:
        assert re.search(REFUSED.get((method, network), "^$"), str(plan)), plan
        return
    student = METHODS[method].apply(teacher, plan, images)
    METHODS[method].settle(student, plan, images)
    assert (count_macs(student, images), count_params(student)) == (plan.macs, plan.params)
    assert student(images.clone()).isfinite().all()
    assert torch.equal(images, before)


@pytest.mark.parametrize("method", ["uniform", "itpruner", "alds", "manidp"])
def test_frozen_parameters_stay_frozen(method: str) -> None:
    teacher, images = seeded(ODD["numbered"]), torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plan = planned(METHODS[method], teacher, images)
    assert isinstance(plan, Plan)
    student = METHODS[method].apply(teacher, plan, images)
    frozen = {name: value.clone() for name, value in student.named_parameters() if not value.requires_grad}
    assert sum("inner" in name for name in frozen) == sum("inner" in name for name, _ in student.named_parameters()) > 0
    assert all("inner" in name or "order" in name for name in frozen)
    before = {name: value.clone() for name, value in student.named_parameters()}
    data = Arrays(images.numpy(), np.arange(16) % 10)
    assert list(METHODS[method].recover(student, teacher, data, Recipe(2, batch_size=8), seed=0)) == [2]
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved == before.keys() - frozen.keys()


def planned(method: Method, teacher: nn.Module, images: Tensor) -> Plan | str:
    """Plan for 90 % of the MACs, as a search does, or say why there is no plan."""
    found = profile(teacher, images)
    assert sum(layer.macs for layer in found.layers) <= found.macs
    if refusal := method.accepts(found):
        return refusal
    try:
        scores = method.merge([method.score(one, teacher, images, 0) for one in method.shards(found, images)], found)
        return method.allocate(scores, found, Budget("90%", macs=int(0.9 * found.macs)), defaults(method))
    except (Infeasible, ScoreError) as error:
        return str(error)


class Random(nn.Module):
    """Drops values in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(nn.functional.dropout(self.body(x).mean((2, 3)), 0.5)))


def test_a_network_that_differs_from_call_to_call_is_refused_for_that() -> None:
    images = torch.rand(16, 3, 16, 16)
    for method, told in (("uniform", "answers the same image differently"), ("manidp", "answers the same images diff")):
        plan = planned(METHODS[method], seeded(Random), images)
        assert told in str(plan)

"""Networks that return several tensors: one of them counts, and nothing else of them changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

from methods import METHODS
from methods.base import Budget
from methods.manidp.sites import trace
from methods.network import count_macs, profile
from methods.protocol import defaults
from search.base import WorkloadError
from search.export import exported
from search.workload.outputs import OneOutput
from search.workload.teacher import check_teacher
from tests.methods.test_contract import images, partials


class Both(NamedTuple):
    logits: Tensor
    aux: Tensor


class Several(nn.Module):
    """A stem, a block and two heads, with a parameter of its own; returns `form` of both outputs."""

    def __init__(self, form: Any, *, in_training_only: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.in_training_only = form, in_training_only
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.head, self.aux = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x).mean((2, 3)) * self.scale
        if self.in_training_only and not self.training:
            return self.head(features)
        return self.form(self.head(features), self.aux(features))


def as_dict(logits: Tensor, aux: Tensor) -> dict[str, Tensor]:
    return {"out": logits, "aux": aux}


def as_pair(logits: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    return logits, aux


FORMS = [(as_dict, "out", False), (as_pair, 0, False), (Both, "logits", False), (Both, "logits", True), (Both, 0, True)]


@pytest.mark.parametrize(("form", "output", "in_training_only"), FORMS)
def test_the_named_output_is_the_networks(form: Any, output: str | int, in_training_only: bool) -> None:
    network = Several(form, in_training_only=in_training_only)
    names, state = [name for name, _ in network.named_modules()], set(network.state_dict())
    one = OneOutput(network, output)
    assert [name for name, _ in one.named_modules()] == names
    assert set(one.state_dict()) == state
    for mode in (True, False):
        one.train(mode)
        assert network.training is mode
        assert one(images()).shape == (24, 10)
    check_teacher(one, images()[:2], 10)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), trace(one)):
        assert torch.equal(twin(images()), one(images()))
    twin = copy.deepcopy(one)
    twin.head = nn.Linear(16, 4)
    assert twin(images()).shape == (24, 4)
    assert one(images()).shape == (24, 10)
    program = exported(one, images()[:2]).module()
    torch.testing.assert_close(program(images()), one(images()))


@pytest.mark.parametrize("method", ["channels", "alds", "manidp"])
def test_methods_cut_it_as_any_other(method: str) -> None:
    one, verbs = OneOutput(Several(as_dict), "out").eval(), METHODS[method]
    found = profile(one, images())
    scores = verbs.merge(partials(verbs, one, found), found)
    plan = verbs.allocate(scores, found, Budget("b", macs=int(0.7 * found.macs)), defaults(verbs))
    student = verbs.apply(one, plan, images())
    assert count_macs(student, images()) == plan.macs
    assert student(images()).shape == (24, 10)


def test_without_a_name_or_with_a_wrong_one_it_is_told_what_there_is() -> None:
    network = Several(as_dict).eval()
    with pytest.raises(
        WorkloadError, match=r"returned a dict of 'out' and 'aux' for .* name them as model\.output, or"
    ):
        check_teacher(network, images()[:2], 10)
    with pytest.raises(WorkloadError, match=r"^model\.output is 'main', but the network returned a dict of 'out' and"):
        check_teacher(OneOutput(network, "main"), images()[:2], 10)


def test_outputs_of_one_network_tell_apart() -> None:
    assert str(OneOutput(Several(as_dict), "out")) != str(OneOutput(Several(as_dict), "aux"))
    assert cast(Tensor, OneOutput(Several(as_dict), "aux").state_dict()["scale"]) == 2

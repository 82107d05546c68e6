"""Modules that are to be kept come out of every method as they went in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods import METHODS, named
from methods.base import Budget, Infeasible
from methods.chain import plan_of
from methods.manidp.gates import Gated
from methods.network import profile
from methods.network.keeping import KEPT, keep, kept
from methods.protocol import defaults
from tests.methods.test_contract import images, partials, scored_on
from tests.support.networks import NETWORKS

LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def shapes(network: nn.Module, under: str) -> dict[str, tuple[type, torch.Size]]:
    """The kinds of the layers under a name, and the shapes of their weights."""
    return {
        name: (type(module), module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, LAYERS) and f"{name}.".startswith(f"{under}.")
    }


@pytest.mark.parametrize("method", [*METHODS, "practise+alds", "channels+alds", "itpruner+manidp"])
@pytest.mark.parametrize("under", ["body.3", "head"])
def test_what_is_kept_comes_out_as_it_went_in(method: str, under: str) -> None:
    teacher = NETWORKS["residual"]()
    assert shapes(teacher, under)
    assert keep(teacher, [f"{under}*"]) == []
    found = profile(teacher, images())
    scored = scored_on(teacher)
    budget = Budget("b", macs=int(0.96 * found.macs))
    if (method, under) == ("practise", "body.3"):  # the one block that could go
        with pytest.raises(Infeasible, match=KEPT):
            plan_of(named(method), scored, budget, defaults(named(method)))
        return
    plan = plan_of(named(method), scored, budget, defaults(named(method)))
    student = named(method).apply(teacher, plan, images())
    if isinstance(student, Gated):
        sites = plan.choices.get("sites") or plan.choices["links"][-1]["choices"]["sites"]
        assert sites["conv"]
        assert not [name for name in sites["conv"] if name.startswith(under)]
    else:
        assert shapes(student, under) == shapes(teacher, under)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_why_it_leaves_them(method: str) -> None:
    teacher = NETWORKS["residual"]()
    keep(teacher, ["body.3.*"])
    found, verbs = profile(teacher, images()), METHODS[method]
    told = verbs.untouched(verbs.merge(partials(verbs, teacher, found), found), found)
    inner = [name for name in kept(teacher) if name in {layer.name for layer in found.layers}]
    assert len(inner) == 2
    assert [name for name in inner if KEPT in told[name]] == inner


def test_groups_that_kept_layers_read_or_norm_are_fixed() -> None:
    teacher = NETWORKS["residual"]()
    free = {group.name for group in profile(teacher, images()).groups if group.fixed is None}
    keep(teacher, ["body.1"])
    assert isinstance(teacher.get_submodule("body.1"), nn.BatchNorm2d)
    fixed = {group.name: group.fixed for group in profile(teacher, images()).groups if group.name in free}
    assert fixed["body.0"] == f"body.1 cannot be cut: {KEPT}"
    assert any(reason is None for reason in fixed.values())


def test_the_last_call_counts() -> None:
    teacher = NETWORKS["plain"]()
    assert keep(teacher, ["0", "nothing", "2*"]) == ["nothing", "2*"]  # module 2 has no weights
    assert keep(teacher, ["3"]) == []
    assert list(kept(teacher)) == ["3"]

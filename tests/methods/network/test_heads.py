"""Heads of attention as channel groups: found, proved, cut, scored, refit and exported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods import METHODS
from methods.base import Budget, Plan, Scores
from methods.network import ChannelGroup, Profile, count_macs, count_params, profile
from methods.network.cut import CRITERIA, cut, cut_to, entries
from methods.network.keeping import KEPT, keep
from methods.network.widths import levels, width_costs
from methods.protocol import defaults
from search.export import exported, onnx_program
from tests.support.odd_networks import seeded
from tests.support.transformers import Biased, FromInput, Fused, Normed, ScaledByInput, Separate, transformer

IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
CUTTABLE = (Fused, Normed, Separate, Biased)

written = pytest.mark.parametrize("attention", CUTTABLE)


@cache
def teacher(attention: Callable[[int, int], nn.Module]) -> tuple[nn.Module, Profile]:
    model = transformer(attention)
    return model, profile(model, IMAGES)


def heads_of(found: Profile) -> list[ChannelGroup]:
    return [group for group in found.groups if ".attn." in group.name]


@cache
def scores_of(method: str, attention: Callable[[int, int], nn.Module]) -> Scores:
    model, found = teacher(attention)
    one = METHODS[method]
    return one.merge([one.score(shard, model, IMAGES, 0) for shard in one.shards(found, IMAGES)], found)


def planned(method: str, attention: Callable[[int, int], nn.Module], share: float) -> Plan:
    found = teacher(attention)[1]
    one = METHODS[method]
    budget = Budget("small", macs=int(share * found.macs))
    return one.allocate(scores_of(method, attention), found, budget, defaults(one))


@written
def test_heads_are_a_group_beside_the_widths_that_were(attention: Callable[[int, int], nn.Module]) -> None:
    found = teacher(attention)[1]
    assert [(group.width, group.fixed) for group in heads_of(found)] == [(4, None), (3, None)]
    assert [group.name for group in found.groups if not group.fixed and "mlp" in group.name] == [
        "blocks.0.mlp.0",
        "blocks.1.mlp.0",
    ]


def test_a_head_owns_its_rows_columns_and_the_modules_counts() -> None:
    (group, _) = heads_of(teacher(Fused)[1])
    assert {(one.module, one.axis, one.start, one.columns) for one in group.members} == {
        *(("blocks.0.attn.qkv", "out", start, 6) for start in (0, 24, 48)),
        ("blocks.0.attn.proj", "in", 0, 6),
        ("blocks.0.attn.num_heads", "count", 0, 1),
        ("blocks.0.attn.attn_dim", "count", 0, 6),
    }
    assert sum(one.macs for one in group.members) == 2 * 16 * 16 * 6  # its two products
    (group, _) = heads_of(teacher(Biased)[1])
    own = {one.module: (one.axis, one.params) for one in group.members}
    assert (own["blocks.0.attn.table"], own["blocks.0.attn.temperature"]) == ((1, 31), (0, 0))


@written
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_cut_is_a_silenced_network_at_the_predicted_cost(
    attention: Callable[[int, int], nn.Module], criterion: str
) -> None:
    model, found = teacher(attention)
    costs, groups = width_costs(found)
    for row in ((1, 48, 2, 20), (3, 7, 3, 48), (2, 1, 1, 1)):
        widths = {group.name: width for group, width in zip(groups, row, strict=True)}
        student = cut(model, groups, widths, criterion)
        assert costs["macs"](np.array(row)) == count_macs(student, IMAGES)
        assert costs["params"](np.array(row)) == count_params(student)
    kept = {group.name: np.array([group.width - 1]) for group in heads_of(found)}
    silenced = copy.deepcopy(model)
    for group in heads_of(found):
        (reader,) = (one for one in group.members if one.axis == "in")
        layer = silenced.get_submodule(reader.module)
        assert isinstance(layer, nn.Linear)
        layer.weight.data[:, entries(reader, np.arange(group.width - 1))] = 0
    with torch.no_grad():
        torch.testing.assert_close(cut_to(model, groups, kept)(IMAGES), silenced(IMAGES), rtol=1e-4, atol=1e-5)


@written
@pytest.mark.parametrize("method", ["uniform", "itpruner", "channels"])
def test_every_method_takes_whole_heads(method: str, attention: Callable[[int, int], nn.Module]) -> None:
    model, found = teacher(attention)
    plan = planned(method, attention, 0.4)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    student = METHODS[method].apply(model, again, IMAGES)
    assert (count_macs(student, IMAGES), count_params(student)) == (plan.macs, plan.params)
    rows = {row[0]: row[1:3] for row in plan.choices["groups"]}
    assert any(rows[group.name][0] < group.width for group in heads_of(found))
    plain = METHODS[method].apply(model, again)
    with torch.no_grad():
        wanted, refit, cut_only = (one(IMAGES) for one in (model, student, plain))
    assert F.mse_loss(refit, wanted) < F.mse_loss(cut_only, wanted)
    assert count_macs(copy.deepcopy(student), IMAGES) == plan.macs


def test_a_student_is_a_network_like_its_teacher() -> None:
    model = teacher(Fused)[0]
    student = METHODS["uniform"].apply(model, planned("uniform", Fused, 0.4), IMAGES)
    found = profile(student, IMAGES)
    assert found.macs == count_macs(student, IMAGES)
    again = [group for group in heads_of(found) if group.fixed is None]
    attention = student.get_submodule("blocks.0.attn")
    assert attention.num_heads == 1 or (again and again[0].width == attention.num_heads)


@pytest.mark.parametrize("attention", [Fused, Biased])
def test_a_student_is_exported(attention: Callable[[int, int], nn.Module]) -> None:
    student = METHODS["uniform"].apply(teacher(attention)[0], planned("uniform", attention, 0.4), IMAGES)
    program = exported(student, IMAGES[:2])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(IMAGES), student(IMAGES), rtol=1e-4, atol=1e-5)
    assert onnx_program(student, IMAGES[:2])


def test_a_dead_head_costs_nothing_and_goes_first() -> None:
    model = transformer(Fused)
    attention = model.get_submodule("blocks.0.attn")
    assert isinstance(attention, Fused)
    attention.qkv.weight.data[2 * 24 + 6 : 2 * 24 + 12] = 0
    attention.qkv.bias.data[2 * 24 + 6 : 2 * 24 + 12] = 0
    found = profile(model, IMAGES)
    one = METHODS["channels"]
    scores = one.merge([one.score(shard, model, IMAGES, 0) for shard in one.shards(found, IMAGES)], found)
    order, errors = scores["blocks.0.attn.qkv|order"], scores["blocks.0.attn.qkv|errors"]
    assert (len(order), order[0]) == (4, 1)
    assert errors[1] == pytest.approx(0, abs=1e-6)
    assert errors[-1] == pytest.approx(1, rel=1e-3)


def test_heads_that_cannot_go_say_what_to_do() -> None:
    found = teacher(FromInput)[1]
    for group in heads_of(found):
        assert "nor without half of the heads (blocks." in str(group.fixed)
        assert "attn.num_heads); keep the width of a head" in str(group.fixed)
    assert [group.name for group in found.groups if group.fixed is None] == ["blocks.0.mlp.0", "blocks.1.mlp.0"]


@pytest.mark.parametrize("gain", [0.1, 0.3, 1.0, 2.0])
def test_a_scale_that_would_change_with_the_heads_shows(gain: float) -> None:
    model = transformer(ScaledByInput)
    for number in (0, 1):
        model.get_submodule(f"blocks.{number}.attn.qkv").weight.data *= gain  # type: ignore[union-attr,operator]
    for group in heads_of(profile(model, IMAGES)):
        assert (group.width, group.fixed is None) == (24, False)


class Flat(nn.Module):
    """Attention and wide layers in one module, which has a width of its own beside its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.patches, self.qkv, self.proj = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 72), nn.Linear(24, 24)
        self.wide, self.narrow, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.narrow(self.wide(x).relu())
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def test_what_can_be_cut_by_the_channel_still_is() -> None:
    found = profile(seeded(Flat), IMAGES)
    free = {group.name: group.width for group in found.groups if group.fixed is None}
    assert free == {"patches": 24, "qkv": 4, "wide": 48}


def test_kept_modules_keep_their_heads() -> None:
    model = transformer(Fused)
    assert not keep(model, ["blocks.0.attn"])
    first, second = heads_of(profile(model, IMAGES))
    assert (KEPT in str(first.fixed), second.fixed) == (True, None)


def test_one_head_stays() -> None:
    model = transformer(lambda dim, heads: Fused(dim, 1))
    assert all(group.fixed for group in heads_of(profile(model, IMAGES)))


def test_timm_networks_gain_heads() -> None:
    timm = pytest.importorskip("timm")
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=10
    )
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, window_size=4, embed_dim=12, depths=(2,), num_heads=(3,), num_classes=10
    )
    for model in (vit, swin):
        found = profile(model.eval(), IMAGES)
        assert [group.fixed for group in heads_of(found)] == [None, None]
        costs, groups = width_costs(found)
        least = np.array([levels(group, 1)[0] for group in groups])
        student = cut(model, groups, {group.name: int(one) for group, one in zip(groups, least, strict=True)})
        assert costs["macs"](least) == count_macs(student, IMAGES)

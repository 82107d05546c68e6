"""Channel groups found on torchvision's networks, and wirings that must be refused with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from methods import METHODS
from methods.base import Budget
from methods.network import ChannelGroup, count_macs, count_params, profile
from methods.network.cut import cut
from methods.network.widths import levels, width_costs
from methods.protocol import defaults
from tests.support.networks import NETWORKS

EXAMPLE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def find_groups(model: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    return profile(model, example).groups


class Reader(nn.Module):
    """A convolution of 8 channels, `middle` and a classifier over its outputs."""

    def __init__(self, middle: nn.Module, left: int) -> None:
        super().__init__()
        self.first, self.second, self.middle = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), middle
        self.head = nn.Linear(left, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.second(self.first(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[no-any-return]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("middle", "left", "reason"),
    [
        (nn.GroupNorm(2, 8), 8, "middle is a GroupNorm"),
        (nn.ConvTranspose2d(8, 8, 1), 8, "middle is a ConvTranspose2d"),
        (nn.Conv2d(8, 16, 1, groups=4), 16, "convolution groups of middle do not line up"),
        (Scale(), 8, "a parameter of no layer"),
        (Function(lambda x: torch.cat([x, x.flip(1)], 1)), 16, "differs from one in which nothing reads them"),
        (Function(lambda x: torch.cat([x] * 9, 1)), 72, "reordered or repeated"),
        (Function(lambda x: x - x.mean(1, keepdim=True)), 8, "differs from one in which nothing reads them"),
        (Function(lambda x: x + x.flip(1)), 8, "differs from one in which nothing reads them"),
        (Function(lambda x: x.view(-1, 8, 14, 14)), 8, "does not run without these channels"),
        (Function(lambda x: x[:, 2:6]), 4, "no whole runs of entries"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), 8, "middle is a ParametrizedConv2d"),
    ],
)
def test_what_cannot_be_cut_is_fixed_with_a_reason(middle: nn.Module, left: int, reason: str) -> None:
    torch.manual_seed(0)
    groups = {group.name: group for group in find_groups(Reader(middle, left), EXAMPLE)}
    assert groups["first"].fixed is None
    with pytest.raises(AssertionError, match=reason):
        assert groups["second"].fixed is None, groups["second"].fixed


def test_per_channel_modules_follow() -> None:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.PReLU(8), nn.PReLU())
    model = Reader(middle, 8).eval()
    costs, groups = width_costs(profile(model, EXAMPLE))
    student = cut(model, groups, {"second": 3})
    assert student(EXAMPLE).shape == (2, 4)
    assert costs["params"](np.array([8, 3])) == count_params(student) == 3 * 9 * 8 + 8 + 9 * 3 + 3 * 3 + 1 + 4 * 3 + 4


class Dense(nn.Module):
    """A map is concatenated with a layer's output for it, normed, flattened and normed again, as DenseNet might."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(10)
        self.third, self.wide, self.head = nn.Conv2d(10, 5, 1), nn.BatchNorm1d(5 * 4), nn.Linear(5 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        both = self.norm(torch.cat([x, self.second(x)], 1))
        return self.head(self.wide(self.third(both).flatten(1)))  # type: ignore[no-any-return]


def test_norms_behind_a_concatenation_and_a_flattened_map_follow() -> None:
    torch.manual_seed(0)
    model = Dense().eval()
    rows = profile(model, EXAMPLE)
    costs, groups = width_costs(rows)
    members = {(group.name, member.module): member for group in groups for member in group.members}
    assert [group.name for group in groups] == ["first", "second", "third"]
    assert (members["second", "norm"].start, members["third", "wide"].columns) == (6, 4)
    for criterion in ("l1", "bn_gamma"):
        student = cut(model, groups, {"first": 4, "second": 1, "third": 2}, criterion)
        assert costs["macs"](np.array([4, 1, 2])) == count_macs(student, EXAMPLE)
        assert costs["params"](np.array([4, 1, 2])) == count_params(student)


class Ghost(nn.Module):
    """A map beside what a cheap layer makes of it, added to one that has its channels at once, as in GhostNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.some, self.cheap = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1, groups=4)
        self.norm, self.wide = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        some = self.some(x)
        x = self.wide(self.norm(x + torch.cat([some, self.cheap(some)], 1)))
        return self.head(torch.cat([x, x.relu()], 1).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["uniform", "itpruner", "channels"])
def test_channels_that_an_axis_holds_more_than_once_go_together(method: str) -> None:
    torch.manual_seed(0)
    model, images = Ghost().eval(), torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = profile(model, images)
    groups = {group.name: group for group in found.groups}
    assert [(group.name, group.width) for group in found.groups if not group.fixed] == [("stem", 4), ("wide", 6)]
    places = {(member.module, member.axis, member.start, member.columns) for member in groups["stem"].members}
    assert {("stem", "out", 0, 1), ("stem", "out", 4, 1), ("norm", "norm", 4, 1), ("wide", "in", 4, 1)} <= places
    one = METHODS[method]
    scores = one.merge([one.score(shard, model, images, 0) for shard in one.shards(found, images)], found)
    plan = one.allocate(scores, found, Budget("60 %", macs=found.macs * 6 // 10), defaults(one))
    student = one.apply(model, plan, images)
    assert (count_macs(student, images), count_params(student)) == (plan.macs, plan.params)
    assert student(images).isfinite().all()


def test_a_layer_that_reads_a_channel_twice_loses_what_both_columns_are_worth() -> None:
    torch.manual_seed(0)
    model, images = Ghost().eval(), torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = profile(model, images)
    one = METHODS["uniform"]
    scores = one.merge([one.score(shard, model, images, 0) for shard in one.shards(found, images)], found)
    assert scores["wide|errors"][-1] == pytest.approx(1, rel=1e-3)  # all that its only reader reads is gone


def test_tied_layers_are_fixed() -> None:
    model = Reader(nn.Conv2d(8, 8, 1), 8)
    model.middle.weight = model.second.weight
    groups = find_groups(model, EXAMPLE)
    assert [group.fixed is None for group in groups] == [False, False, False, False]
    assert "shares a parameter" in str(groups[1].fixed)


class Attention(nn.Module):
    """Two heads of four over the pixels of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(tokens.shape)).transpose(1, 2).view_as(x)  # type: ignore[no-any-return]


def test_attention_keeps_its_channels() -> None:
    torch.manual_seed(0)
    groups = {group.name: group.fixed is None for group in find_groups(Reader(Attention(), 8), EXAMPLE)}
    assert groups["first"]
    assert not groups["middle.qkv"]


def test_one_convolution_group_cannot_be_divided() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    groups = {group.name: group for group in find_groups(Reader(wide, 4), EXAMPLE)}
    assert (groups["second"].multiple, groups["second"].fixed) == (4, None)
    assert (groups["middle.1"].multiple, groups["middle.1"].fixed) == (2, None)
    single = nn.Sequential(nn.Conv2d(8, 1, 1), nn.ReLU())
    assert find_groups(Reader(single, 1), EXAMPLE)[2].fixed == "its channels cannot be divided"


def test_frozen_and_training_networks_are_found_and_left_as_they_were() -> None:
    model = NETWORKS["residual"]().requires_grad_(False).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert find_groups(model, EXAMPLE) == find_groups(NETWORKS["residual"](), EXAMPLE)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    student = cut(model, find_groups(model, EXAMPLE), {"body.0": 8})
    assert student.training
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 12),
        ("mobilenet_v2", 25),
        ("mobilenet_v3_small", 27),
        ("regnet_y_400mf", 37),
        ("convnext_tiny", 18),
        pytest.param("resnet50", 37, marks=pytest.mark.slow),
        pytest.param("resnext50_32x4d", 21, marks=pytest.mark.slow),
        pytest.param("densenet121", 120, marks=pytest.mark.slow),
        pytest.param("vgg16_bn", 15, marks=pytest.mark.slow),
        pytest.param("swin_t", 12, marks=pytest.mark.slow),
        pytest.param("shufflenet_v2_x0_5", 18, marks=pytest.mark.slow),
    ],
)
def test_torchvision_networks_cost_what_is_predicted(name: str, count: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    example = torch.rand(1, 3, 32, 32)
    rows = profile(model, example)
    costs, groups = width_costs(rows)
    assert len(groups) == count
    vector = np.array([levels(group, 8)[: position % 3 + 1][-1] for position, group in enumerate(groups)], dtype=int)
    widths = {group.name: int(width) for group, width in zip(groups, vector, strict=True)}
    student = cut(model, groups, widths)
    assert costs["macs"](vector) == count_macs(student, example)
    assert costs["params"](vector) == count_params(student)


def test_channels_that_are_shuffled_stay_and_those_between_two_layers_of_a_branch_go() -> None:
    groups = find_groups(torchvision.models.shufflenet_v2_x0_5(num_classes=10).eval(), torch.rand(1, 3, 32, 32))
    fixed = {group.name: group.fixed for group in groups if group.fixed}
    assert {name[:12] for name in fixed} == {"stage2.0.bra", "stage3.0.bra", "stage4.0.bra", "fc"}
    assert not any(name.endswith("branch2.0") for name in fixed)
    assert all(
        str(reason).startswith("torch-pruning cannot follow its channels (") for reason in [*fixed.values()][:-1]
    )


def test_a_long_profile_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.network.coupling.STEPS_TOLD", 1)
    told: list[tuple[int, int, str]] = []
    profile(NETWORKS["concat"](), EXAMPLE, lambda *words: told.append(words))
    assert {note for *_, note in told} == {"steps along the channels, at most", "trial cuts, at most"}
    assert all(0 < done <= most for done, most, _ in told)


def test_a_walk_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.network.coupling.MOST_STEPS", 3)
    groups = find_groups(NETWORKS["concat"](), EXAMPLE)
    assert all("RuntimeError: the ways between its layers multiply" in str(group.fixed) for group in groups)

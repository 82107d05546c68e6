"""Channel groups as data and under the knife: the cost of widths, the channels that stay, slicing equals masking."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.base import Budget, ScoreError
from methods.hooks import hooked
from methods.network import ChannelGroup, Profile, count_macs, count_params, profile
from methods.network.cut import CRITERIA, channel_scores, cut, cut_to, kept_channels
from methods.network.groups import Member
from methods.network.widths import WidthCost, from_choices, levels, to_choices, width_costs, widths_out_of_reach
from tests.support.networks import NETWORKS

EXAMPLE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

READ_FROM: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {"0": ("2",), "3": ("5",), "6": ("8",)},
    "residual": {
        "body.0": ("body.2", "body.3"),
        "body.3.inner.0": ("body.3.inner.2",),
        "body.4.inner.0": ("body.4.inner.2",),
        "body.4.outer.0": ("body.4",),
    },
    "bottleneck": {
        "body.0": ("body.2",),
        "body.3.narrow.0": ("body.3.narrow.2",),
        "body.3.spread.0": ("body.3.spread.2",),
        "body.3.widen.0": ("body.3", "body.4"),
        "body.4.narrow.0": ("body.4.narrow.2",),
        "body.4.spread.0": ("body.4.spread.2",),
    },
    "depthwise": {"body.0": ("body.2", "body.3"), "body.3.expand.0": ("body.3.expand.2", "body.3.depth.2")},
    "grouped": {
        "body.0": ("body.2",),
        "body.3.narrow.0": ("body.3.narrow.2", "body.3.spread.2"),
        "body.3.widen.0": ("body.3",),
    },
    "concat": {
        "body.0": ("body.2",),
        "body.3.left.0": ("body.3.left.2",),
        "body.3.right.0": ("body.3.right.2",),
        "body.4": ("body.6",),
    },
    "flatten": {"0": ("2",), "3": ("5",), "7": ("8",)},
    "squeeze": {
        "body.0": ("body.2", "body.3"),
        "body.3.expand.0": ("body.3.expand.2", "body.3.depth.2", "body.3.gate"),
        "body.3.gate.squeeze": ("body.3.gate.squeeze",),
    },
}
"""By hand, per network and group: the modules whose outputs hold the group's channels, after norm and activation."""

networks = pytest.mark.parametrize("name", NETWORKS)
quick = settings(max_examples=15, deadline=None, derandomize=True)


@cache
def teacher(name: str) -> tuple[nn.Module, Profile]:
    model = NETWORKS[name]()
    return model, profile(model, EXAMPLE)


def free(name: str) -> tuple[ChannelGroup, ...]:
    return tuple(group for group in teacher(name)[1].groups if group.fixed is None)


def some_widths(name: str) -> st.SearchStrategy[dict[str, int]]:
    return st.sampled_from((1, 2, 8)).flatmap(
        lambda channels: st.fixed_dictionaries(
            {group.name: st.sampled_from(levels(group, channels)) for group in free(name)}
        )
    )


@contextmanager
def silenced(model: nn.Module, channels: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Zero `channels` of the named modules' outputs."""

    def hook(gone: np.ndarray) -> Any:
        def silence(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.clone()
            output[:, torch.from_numpy(gone)] = 0
            return output

        return silence

    with hooked(model.get_submodule(name).register_forward_hook(hook(gone)) for name, gone in channels.items()):
        yield


@networks
def test_groups_are_those_known_by_hand(name: str) -> None:
    assert [group.name for group in free(name)] == list(READ_FROM[name])
    (output,) = (group for group in teacher(name)[1].groups if group.fixed is not None)
    assert output.fixed == "only the network's output reads its channels"


@networks
@quick
@given(data=st.data())
def test_slicing_equals_masking(name: str, data: st.DataObject) -> None:
    model, groups = teacher(name)[0], free(name)
    widths, criterion = data.draw(some_widths(name)), data.draw(st.sampled_from(CRITERIA))
    kept = kept_channels(model, groups, widths, criterion)
    gone = {
        place: np.setdiff1d(np.arange(group.width), kept[group.name])
        for group in groups
        for place in READ_FROM[name][group.name]
        if group.name in kept
    }
    with torch.no_grad(), silenced(model, gone):
        masked = model(EXAMPLE)
    with torch.no_grad():
        torch.testing.assert_close(cut(model, groups, widths, criterion)(EXAMPLE), masked, rtol=1e-4, atol=1e-5)


@networks
@quick
@given(data=st.data())
def test_predicted_cost_is_the_counted_cost(name: str, data: st.DataObject) -> None:
    model, rows = teacher(name)
    costs, groups = width_costs(rows)
    widths = data.draw(some_widths(name))
    vector = np.array([widths[group.name] for group in groups])
    student = cut(model, groups, widths)
    assert costs["macs"](vector) == count_macs(student, EXAMPLE)
    assert costs["params"](vector) == count_params(student)


def test_cost_of_a_plain_network_on_paper() -> None:
    """Maps of 8 x 8, 8 x 8 and 4 x 4; each filter has its weights, a scale and a shift; ten classes with a bias."""
    costs, groups = width_costs(teacher("plain")[1])
    a, b, c = widths = np.array([5, 7, 11])
    assert [group.width for group in groups] == [16, 24, 32]
    assert costs["macs"](widths) == 64 * 27 * a + 64 * 9 * a * b + 16 * 9 * b * c + 10 * c
    assert costs["params"](widths) == 27 * a + 9 * a * b + 9 * b * c + 2 * (a + b + c) + 10 * c + 10
    assert (costs["macs"].constant, costs["params"].constant) == (0, 10)
    assert np.array_equal(costs["macs"].pairs, np.triu(costs["macs"].pairs))


@networks
def test_full_widths_change_nothing(name: str) -> None:
    model, groups = teacher(name)[0], free(name)
    student = cut(model, groups, {group.name: group.width for group in groups})
    assert student is not model
    for key, value in model.state_dict().items():
        assert torch.equal(student.state_dict()[key], value)
    with torch.no_grad():
        assert torch.equal(student(EXAMPLE), model(EXAMPLE))


@networks
def test_the_teacher_stays_and_every_member_keeps_the_same_channels(name: str) -> None:
    """Each weight is stamped with its own position, which the student's weights then tell."""
    model, groups = NETWORKS[name](), free(name)
    state = model.state_dict()
    for value in state.values():
        value.copy_(torch.arange(value.numel()).view_as(value))
    widths = {group.name: levels(group, 1)[0] for group in groups}
    kept = kept_channels(model, groups, widths, "l1")
    student = cut(model, groups, widths).state_dict()
    assert all(torch.equal(value, torch.arange(value.numel()).view_as(value)) for value in model.state_dict().values())
    for group in groups:
        for member in group.members:
            stamps = student[f"{member.module}.weight"]
            if member.axis == "norm":
                assert stamps.tolist() == kept[group.name].tolist()
                continue
            per_filter = state[f"{member.module}.weight"][0].numel()
            if member.axis == "out":
                found = stamps.flatten(1)[:, 0] // per_filter
            else:
                places = stamps[0].flatten(1)[:, 0] if stamps.ndim == 4 else stamps[0]
                entry = places % per_filter // stamps[0, 0].numel() - member.start
                found = entry[(entry >= 0) & (entry < group.width * member.columns)] // member.columns
            assert found.unique().tolist() == kept[group.name].tolist()


def test_scores_are_summed_over_the_producing_layers_each_over_its_mean() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(1, 3, 1))
    weights = {"0": [1.0, -2.0, 3.0], "2": [60.0, 30.0, -30.0]}
    with torch.no_grad():
        for name, values in weights.items():
            model.get_submodule(name).weight.copy_(torch.tensor(values).view(3, 1, 1, 1))  # type: ignore[union-attr, operator]
        model[1].weight.copy_(torch.tensor([-2.0, 1.0, 0.0]))  # type: ignore[operator]
    members = (Member("0", "out", 0, 1), Member("1", "norm", 0, 1, 2), Member("2", "out", 0, 1))
    group = ChannelGroup("0", 3, members)
    for criterion in ("l1", "l2"):
        np.testing.assert_allclose(channel_scores(model, group, criterion), [0.5 + 1.5, 1 + 0.75, 1.5 + 0.75])
    np.testing.assert_allclose(channel_scores(model, group, "bn_gamma"), [2, 1, 0])
    distances = np.array([3 + 2, 3 + 5, 2 + 5]) / (20 / 3) + np.array([30 + 90, 30 + 60, 90 + 60]) / 120
    np.testing.assert_allclose(channel_scores(model, group, "fpgm"), distances)


def test_a_norm_behind_a_concatenation_scores_its_own_segment() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([100.0, 100, 1, 2, 3]))  # type: ignore[operator]
    group = ChannelGroup("elsewhere", 3, (Member("0", "norm", 2, 1, 2),))
    np.testing.assert_allclose(channel_scores(model, group, "bn_gamma"), [0.5, 1, 1.5])


def test_ties_go_to_the_lower_channel_and_runs_stay_whole() -> None:
    model = nn.Sequential(nn.Conv2d(1, 60, 1))
    nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    group = ChannelGroup("0", 60, (Member("0", "out", 0, 1),))
    assert kept_channels(model, [group], {"0": 31}, "l1")["0"].tolist() == list(range(31))
    with torch.no_grad():
        model[0].weight[[33, 58]] = torch.tensor([5.0, 7.0]).view(2, 1, 1, 1)  # type: ignore[index, operator]
    pairs = ChannelGroup("0", 60, group.members, multiple=2)
    assert kept_channels(model, [pairs], {"0": 6}, "l1")["0"].tolist() == [0, 1, 32, 33, 58, 59]


def test_a_weight_that_is_not_a_number_is_named() -> None:
    model = NETWORKS["plain"]()
    with torch.no_grad():
        model.get_submodule("3").weight[0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(ScoreError, match="'3'"):
        cut(model, free("plain"), {"3": 8})


@pytest.mark.parametrize(
    ("widths", "criterion", "message"),
    [
        ({"nowhere": 4}, "l1", "no channel group 'nowhere'"),
        ({"body.3.narrow.0": 12}, "l1", "a multiple of 8 from 8 to 32"),
        ({"body.0": 0}, "l1", "cannot have 0 channels"),
        ({"body.0": 17}, "l1", "cannot have 17 channels"),
        ({"head": 5}, "l1", "must keep 10 channels, not 5: only the network's output"),
        ({"body.0": 8}, "size", "'size' is unknown; expected one of l1"),
    ],
)
def test_impossible_cuts_are_refused(widths: dict[str, int], criterion: str, message: str) -> None:
    model, rows = teacher("grouped")
    with pytest.raises(ValueError, match=message):
        cut(model, rows.groups, widths, criterion)


@networks
def test_a_plan_as_json_makes_the_same_student(name: str, tmp_path: Path) -> None:
    model, groups = teacher(name)[0], free(name)
    widths = {group.name: levels(group, 8)[0] for group in groups[1:]} | {groups[0].name: groups[0].width}
    choices = json.loads(json.dumps(to_choices(groups, widths, "l2")))
    read, read_widths, criterion = from_choices(choices)
    assert (read_widths, criterion) == (widths, "l2")
    student, expected = cut(model, read, read_widths, criterion), cut(model, groups, widths, "l2")
    torch.save(student.state_dict(), tmp_path / "student.pt")
    stranger = cut(NETWORKS[name](), read, read_widths, "fpgm")
    stranger.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(student(EXAMPLE), expected(EXAMPLE))
        assert torch.equal(stranger(EXAMPLE), expected(EXAMPLE))


@given(width=st.integers(1, 300), channels=st.integers(1, 64), multiple=st.integers(1, 16))
def test_levels_are_a_grid_up_to_the_full_width(width: int, channels: int, multiple: int) -> None:
    group = ChannelGroup("g", width * multiple, (), multiple)
    found = levels(group, channels)
    assert found == sorted(set(found))
    assert found[-1] == group.width
    assert all(level % multiple == 0 and level > 0 for level in found)
    assert len({b - a for a, b in pairwise(found[:-1])}) <= 1


def test_cut_to_takes_any_channels() -> None:
    model = teacher("plain")[0]
    student = cut_to(model, free("plain"), {"0": np.array([1, 15])})
    assert torch.equal(student.state_dict()["0.weight"], model.state_dict()["0.weight"][[1, 15]])
    assert torch.equal(student.state_dict()["3.weight"], model.state_dict()["3.weight"][:, [1, 15]])


def test_infeasible_names_what_is_missed() -> None:
    rows = teacher("plain")[1]
    error = widths_out_of_reach(
        "uniform", Budget("tiny", macs=1000, params=10**6, channels=4), rows, {"macs": 7000, "params": 9}
    )
    assert error.least == {"macs": 7000, "params": 9}
    assert str(error) == (
        f"budget 'tiny' allows 1,000 MACs ({1000 / rows.macs:.1%} of the teacher), but uniform reaches no less than "
        f"7,000 ({7000 / rows.macs:.1%}), of which 0 cannot be pruned, at channel multiples of 4; "
        "raise it or try another method"
    )
    both = str(widths_out_of_reach("x", Budget("b", macs=10, params=10), rows, {"macs": 9, "params": 9}))
    assert "10 MACs" in both
    assert "10 params" in both
    assert "both together are not" in both


def test_infeasible_names_the_largest_group_that_is_fixed() -> None:
    rows = teacher("plain")[1]
    fixed = replace(rows, groups=tuple(replace(one, fixed=f"reason of {one.name}") for one in rows.groups))
    layers = {one.name: {member.module for member in one.members if not member.params} for one in fixed.groups[:-1]}
    largest = max(layers, key=lambda name: sum(rows.layer(layer).macs for layer in layers[name]))
    told = str(widths_out_of_reach("uniform", Budget("b", macs=1), fixed, {"macs": 7000, "params": 9}))
    assert f"({len(layers)} channel groups are fixed, the largest of them {largest}: reason of {largest})" in told


def test_width_cost_is_the_polynomial() -> None:
    cost = WidthCost(5, np.array([2, 3]), np.array([[1, 4], [0, 0]]))
    assert cost(np.array([10, 7])) == 5 + 20 + 21 + 100 + 280

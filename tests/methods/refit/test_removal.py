"""Elimination: the errors promised are those measured, and neither shards nor rounds change what comes of it."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.network import ChannelGroup, Profile, profile
from methods.network.cut import entries
from methods.network.groups import Member
from methods.refit import removal
from methods.refit.moments import second_moments
from methods.refit.removal import errors_of, kept_runs, removal_keys, removal_shards, score_removal
from tests.methods.refit.test_fit import IMAGES
from tests.support.networks import NETWORKS

networks = pytest.mark.parametrize("name", NETWORKS)


def scored(network: nn.Module, found: Profile) -> dict[str, np.ndarray]:
    return {
        key: value
        for shard in removal_shards(found, len(IMAGES))
        for key, value in score_removal(shard, network, IMAGES).items()
    }


def lost(network: nn.Module, group: ChannelGroup, gone: list[int]) -> float:
    """The relative energy that readers lose without `gone` channels, by least squares on their inputs' moments."""
    total = 0.0
    for member in (member for member in group.members if member.axis == "in"):
        weight = cast(Tensor, network.get_submodule(member.module).weight).detach().double().flatten(1)
        second = second_moments(network, [member.module], IMAGES)[member.module][0]
        per_entry = weight.shape[1] // cast(Tensor, network.get_submodule(member.module).weight).shape[1]
        columns = entries(Member("", "in", 0, per_entry), entries(member, np.array(gone))).tolist()
        stays = [column for column in range(weight.shape[1]) if column not in columns]
        fitted = weight @ second[:, stays] @ torch.linalg.inv(second[stays][:, stays])
        rest = weight.clone()
        rest[:, stays] -= fitted
        energy = float(((weight @ second) * weight).sum())
        total += float(((rest @ second) * rest).sum()) / energy
    return total


@networks
def test_every_width_loses_what_its_channels_cost(name: str) -> None:
    network = NETWORKS[name]()
    found = profile(network, IMAGES)
    scores = scored(network, found)
    assert set(scores) == set(removal_keys(found))
    for group in (group for group in found.groups if group.fixed is None):
        order, errors = scores[f"{group.name}|order"], scores[f"{group.name}|errors"]
        assert sorted(order) == list(range(group.width // group.multiple))
        assert errors[0] == 0
        assert (np.diff(errors) >= 0).all()
        singles = [lost(network, group, runs(group, [run])) for run in order]
        assert errors[1] == pytest.approx(singles[0], rel=1e-6)
        assert errors[1] <= min(singles) * (1 + 1e-6)
        half = len(order) // 2
        assert errors[half] == pytest.approx(lost(network, group, runs(group, order[:half].tolist())), rel=1e-5)
        width = group.width - half * group.multiple
        assert errors_of(scores, group, [width]).tolist() == [errors[half]]
        assert kept_runs(scores, group, width) == sorted(set(range(group.width)) - set(runs(group, order[:half])))


def runs(group: ChannelGroup, chosen: list[int]) -> list[int]:
    return entries(Member("", "out", 0, group.multiple), np.array(chosen, dtype=int)).tolist()


def test_groups_scored_apart_have_the_same_errors() -> None:
    network = NETWORKS["residual"]()
    found = profile(network, IMAGES)
    together = scored(network, found)
    for kind, *tasks in removal_shards(found, len(IMAGES)):
        for task in tasks:
            for key, value in score_removal((kind, task), network, IMAGES).items():
                assert value.tobytes() == together[key].tobytes()


@networks
def test_wide_readers_lose_channels_in_rounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]()
    found = profile(network, IMAGES)
    monkeypatch.setattr(removal, "NARROW", 1)
    monkeypatch.setattr(removal, "ROUNDS", 3)
    scores = scored(network, found)
    for group in (group for group in found.groups if group.fixed is None):
        order, errors = scores[f"{group.name}|order"], scores[f"{group.name}|errors"]
        at_once = -(-len(order) // 3)
        assert sorted(order) == list(range(len(order)))
        assert (np.diff(errors) >= 0).all()
        first = lost(network, group, runs(group, order[:at_once].tolist()))
        assert errors[at_once] == pytest.approx(first, rel=1e-5)


@networks
def test_readers_too_wide_are_taken_channel_by_channel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]()
    found = profile(network, IMAGES)
    monkeypatch.setattr(removal, "WIDEST", 1)
    scores = scored(network, found)
    for group in (group for group in found.groups if group.fixed is None):
        errors = scores[f"{group.name}|errors"]
        assert errors[0] == 0
        assert (np.diff(errors, 2) >= -1e-12).all()  # nothing is made up for: the least goes first, then the next
        assert errors[-1] == pytest.approx(sum(member.axis == "in" for member in group.members))


def test_dead_channels_cost_nothing_and_go_first() -> None:
    torch.manual_seed(0)
    head = nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *head).eval()
    with torch.no_grad():
        network[0].weight[[2, 5]] = 0
        network[0].bias[[2, 5]] = 0
    scores = scored(network, profile(network, IMAGES))
    assert set(scores["0|order"][:2].tolist()) == {2, 5}
    assert scores["0|errors"][2] < 1e-5

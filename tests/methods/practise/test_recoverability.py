"""The loss of a network without a block: against numbers on paper, closed forms and a slow second implementation."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.base import ScoreError
from methods.practise.blocks import drop, find_blocks
from methods.practise.recoverability import (
    Reference,
    Repair,
    adaptor_error,
    add_adaptors,
    fit_channels,
    observe,
    recoverability,
    sequential_error,
)
from tests.methods.practise.test_blocks import DEEP, Averaged, Linearly, Patches, deep, silenced
from tests.support.networks import _seeded, residual

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def reference(network: nn.Module, images: Tensor = IMAGES) -> Reference:
    return observe(network, images, find_blocks(network, images[:2]).removable)


# The fit


@settings(max_examples=30)
@given(st.integers(1, 5), st.floats(0, 2), st.integers(0, 2**16))
def test_the_fit_is_the_least_squares_solution(channels: int, ridge: float, seed: int) -> None:
    """A second implementation: the pull towards the identity as rows beside the data's."""
    random = np.random.default_rng(seed)
    source, target = random.normal(2, 1, (6, 7, channels)), random.normal(-1, 3, (6, 7, channels))
    weight, bias = fit_channels(torch.tensor(source), torch.tensor(target), ridge=ridge)
    x, y = source.reshape(-1, channels), target.reshape(-1, channels)
    centred = x - x.mean(0)
    pull = np.sqrt(ridge * np.square(centred).sum(0).mean()) * np.eye(channels)
    expected = np.linalg.lstsq(np.vstack([centred, pull]), np.vstack([y - y.mean(0), pull]), rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(bias.numpy(), y.mean(0) - x.mean(0) @ expected, atol=1e-9)


def test_a_fit_without_need_is_the_identity() -> None:
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    for source, target in ((x, x), (torch.zeros(9, 4), torch.zeros(9, 4))):
        weight, bias = fit_channels(source, target, ridge=1e-3)
        torch.testing.assert_close(weight, torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(bias, torch.zeros(4, dtype=torch.float64))
    weight, _ = fit_channels(x, -x, ridge=1e9)
    torch.testing.assert_close(weight, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)


# What is lost


@pytest.mark.parametrize("name", DEEP)
def test_a_silent_block_is_no_loss(name: str) -> None:
    block = DEEP[name][1][1]
    seen = reference(silenced(deep(name), block))
    assert sequential_error(seen, [block]) == 0
    assert adaptor_error(seen, [block], steps=0, seed=0) == 0
    assert sequential_error(seen, DEEP[name][1][:1]) > 0
    pair = sorted([block, DEEP[name][1][0]])
    assert sequential_error(seen, pair) == sequential_error(seen, DEEP[name][1][:1])


def linear_maps() -> nn.Module:
    blocks = [Linearly(nn.Conv2d(6, 6, 1)) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(3, 6, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def linear_tokens() -> nn.Module:
    return Averaged(nn.Sequential(Patches(6), *[Linearly(nn.Linear(6, 6)) for _ in range(2)]), 6)


@pytest.mark.parametrize("build", [linear_maps, linear_tokens])
def test_a_linear_block_is_made_up_for_completely(build: object) -> None:
    network = _seeded(build)  # type: ignore[arg-type]
    seen = reference(network)
    assert len(seen.blocks) == 2
    for dropped in ([name] for name in seen.blocks):
        assert sequential_error(seen, dropped, ridge=0) < 1e-10
        assert adaptor_error(seen, dropped, steps=0, seed=0) > 1e-2
    assert sequential_error(seen, list(seen.blocks), ridge=0) < 1e-10


@pytest.mark.parametrize("name", DEEP)
def test_repair_lowers_the_error_of_every_block(name: str) -> None:
    seen = reference(deep(name))
    for block in seen.blocks:
        plain = recoverability(seen, [block], "drop")
        assert 0 < recoverability(seen, [block]) < plain
        assert 0 < plain == adaptor_error(seen, [block], steps=0, seed=9)


@torch.no_grad()
@pytest.mark.parametrize("dropped", [["body.3"], ["body.5"], ["body.8"], ["body.3", "body.7"]])
def test_the_sequential_error_step_by_step(dropped: list[str]) -> None:
    """A second implementation: block after block by hand, with the fit in numpy and the axis by hand."""
    network = deep("residual")
    student = teacher = IMAGES
    for position, block in enumerate(cast(nn.Sequential, network.body)):
        name = f"body.{position}"
        teacher = block(teacher)
        student = student if name in dropped else block(student)
        if position >= int(dropped[0][5:]):
            x, y = (v.double().permute(0, 2, 3, 1).flatten(0, 2).numpy() for v in (student, teacher))
            centred, aim = x - x.mean(0), y - y.mean(0)
            gram = centred.T @ centred
            pull = 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram))
            fitted = centred @ np.linalg.solve(gram + pull, centred.T @ aim + pull) + y.mean(0)
            shape = student.permute(0, 2, 3, 1).shape
            student = torch.tensor(fitted).float().reshape(shape).permute(0, 3, 1, 2).relu()
    expected = float((student - teacher).double().square().mean() / teacher.double().var(correction=0))
    assert sequential_error(reference(network), dropped) == pytest.approx(expected, rel=1e-4)


def test_more_images_need_less_of_a_pull() -> None:
    network = deep("depthwise")
    few, many = reference(network, IMAGES), reference(network, IMAGES.repeat(5, 1, 1, 1))
    assert sequential_error(few, ["body.3"]) == sequential_error(few, ["body.3"], ridge=0.1)
    assert sequential_error(many, ["body.3"]) == sequential_error(many, ["body.3"], ridge=1e-3)


def test_the_maps_are_those_of_all_blocks_up_to_pooling() -> None:
    seen = reference(deep("residual"))
    assert list(seen.maps) == [f"body.{place}" for place in (3, 4, 5, 6, 7, 8)]
    assert seen.tap == "body"
    assert torch.equal(seen.features, seen.maps["body.8"])
    assert reference(deep("tokens")).tap == "body"
    assert list(reference(deep("tokens")).maps) == ["body.0", "body.1", "body.2", "body.3"]


class Reusing(nn.Module):
    """One activation for the stem and for the last map; behind the blocks a part that reads two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 6, 3), nn.ReLU()
        self.one, self.two = Linearly(nn.Conv2d(6, 6, 1)), Linearly(nn.Conv2d(6, 6, 3, padding=1))
        self.joined, self.last = Joined(), nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = self.act(self.stem(x))
        x = self.joined(self.two(self.one(start)), beside=start)
        return cast(Tensor, self.head(self.act(self.last(x)).mean((2, 3))))


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        return cast(Tensor, self.here(x) + self.there(beside))


@pytest.mark.parametrize("repair", ["sequential_ls", "adaptor_sgd", "drop"])
def test_modules_that_run_twice_or_read_two_maps_are_no_hindrance(repair: Repair) -> None:
    seen = reference(_seeded(Reusing))
    assert list(seen.blocks) == ["one", "two"]
    assert list(seen.maps) == ["one", "two"]
    assert seen.tap == "act"
    assert seen.features.shape[1] == 8
    assert recoverability(seen, ["two"], repair, steps=4) > 0


def test_features_that_tell_nothing_are_refused() -> None:
    broken, constant = copy.deepcopy(deep("squeeze")), copy.deepcopy(deep("squeeze"))
    first = cast(nn.Conv2d, broken.get_submodule("body.0"))
    nn.init.constant_(first.weight, float("nan"))
    for parameter in constant.get_submodule("body").parameters():
        nn.init.zeros_(parameter)
    for network in (broken, constant):
        with pytest.raises(ScoreError, match="holds NaN or infinity, or does not vary"):
            observe(network, IMAGES, dict.fromkeys(DEEP["squeeze"][1], "identity"))


def test_an_unknown_repair_is_named() -> None:
    with pytest.raises(ValueError, match="repair is 'hope', expected one of sequential_ls, adaptor_sgd, drop"):
        recoverability(reference(deep("squeeze")), ["body.3"], "hope")  # type: ignore[arg-type]


def test_the_teacher_is_left_as_it_was() -> None:
    network = copy.deepcopy(deep("residual")).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen = reference(network)
    recoverability(seen, ["body.3"])
    recoverability(seen, ["body.3"], "adaptor_sgd", steps=2)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# Adaptors


def three_per_stage() -> nn.Module:
    from torchvision.models import resnet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = resnet.ResNet(resnet.BasicBlock, [3, 3, 3, 3])
        return network.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("dropped", "writers", "readers"),
    [
        ("layer1.1", ["layer1.0.conv2"], ["layer1.2.conv1", "layer2.0.conv1", "layer2.0.downsample.0"]),
        (
            "layer2.1",
            ["layer2.0.conv2", "layer2.0.downsample.0"],
            ["layer2.2.conv1", "layer3.0.conv1", "layer3.0.downsample.0"],
        ),
        ("layer4.1", ["layer4.0.conv2", "layer4.0.downsample.0"], ["layer4.2.conv1"]),
    ],
)
def test_adaptors_stand_where_the_authors_put_them(dropped: str, writers: list[str], readers: list[str]) -> None:
    student = three_per_stage()
    drop(student, {dropped: "identity"})
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = student(images)
    adaptors = add_adaptors(student, [dropped])
    pairs = {name: module for name, module in student.named_modules() if isinstance(module, nn.Sequential)}
    assert len(adaptors) == len(writers) + len(readers)
    assert all(pairs[name][1] in adaptors for name in writers)
    assert all(pairs[name][0] in adaptors for name in readers)
    assert torch.equal(student(images), before)


@torch.no_grad()
@pytest.mark.parametrize("name", DEEP)
def test_adaptors_change_nothing_at_first(name: str) -> None:
    student = copy.deepcopy(deep(name))
    block = DEEP[name][1][1]
    drop(student, {block: "identity"})
    before = student(IMAGES)
    assert len(add_adaptors(student, [block])) >= 2
    assert torch.equal(student(IMAGES), before)


def test_depthwise_and_grouped_layers_get_no_adaptor() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 6, 1), Linearly(nn.Conv2d(6, 6, 1)), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)
    )
    drop(network, {"1": "identity"})
    (adaptor,) = add_adaptors(network, ["1"])
    assert adaptor is cast(nn.Sequential, network[0])[1]


def test_steps_of_sgd_lower_the_error_and_repeat() -> None:
    seen = reference(deep("bottleneck"))
    before, after, again, other = (
        recoverability(seen, ["body.4"], "adaptor_sgd", steps=steps, seed=seed)
        for steps, seed in ((1, 0), (20, 0), (20, 0), (20, 1))
    )
    assert after < before < recoverability(seen, ["body.4"], "drop")
    assert after == again == pytest.approx(other, rel=0.2)


class Choosing(nn.Module):
    """A network whose path depends on its input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.body(x if x.sum() > 0 else 2 * x))


def test_adaptors_need_a_graph() -> None:
    network = Choosing(deep("squeeze"))
    bright = IMAGES + 1
    seen = reference(network, bright)
    assert recoverability(seen, ["body.body.3"]) == recoverability(reference(deep("squeeze"), bright), ["body.3"])
    with pytest.raises(ScoreError, match=r"torch.fx cannot trace the network .*; score by sequential_ls"):
        recoverability(seen, ["body.body.3"], "adaptor_sgd")


def test_no_more_images_are_seen_than_their_maps_find_room(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, images = residual(), torch.randn(200, 3, 16, 16)
    blocks = find_blocks(teacher, images[:2]).removable
    whole = observe(teacher, images, blocks)
    per_image = sum(output.nbytes for output in whole.maps.values()) // 200
    monkeypatch.setattr("methods.practise.recoverability.MOST_BYTES", 100 * per_image)
    assert (len(whole.images), len(observe(teacher, images, blocks).images)) == (200, 100)

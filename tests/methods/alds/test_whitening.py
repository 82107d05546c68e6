"""Fitted pairs: the errors promised are those measured on the outputs, and no decoder does better."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.alds.spectra import MEASURES, curves, paired
from methods.alds.whitening import FITTED, fitted_curves, fitted_factors, fitting
from methods.refit import refit
from methods.refit.fit import PRIOR, Solve
from methods.refit.moments import second_moments
from methods.training import recalibrate
from tests.support.networks import NETWORKS

seeds = st.integers(0, 10**6)

TOLERANCE = 5e-6
"""The most by which the ridge of 1e-6 moves an error for inputs as alike as in these tests."""


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth(seed: int, *shape: int) -> Tensor:
    """Maps whose neighbours and channels resemble each other, as a network's do; positive, as after a ReLU."""
    maps = tensor(seed, *shape) + 0.5
    mixed = torch.einsum("bchw,dc->bdhw", maps, tensor(seed + 1, shape[1], shape[1]))
    return nn.functional.avg_pool2d(mixed, 3, 1, 1).relu().double()


LAYERS: dict[str, Callable[[], nn.Conv2d | nn.Linear]] = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False),
    "reflecting": lambda: nn.Conv2d(6, 5, 3, padding=2, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(12, 8, 3, groups=2),
    "tall": lambda: nn.Conv2d(6, 16, 1),
    "linear": lambda: nn.Linear(100, 24),
}


def case(kind: str, seed: int) -> tuple[nn.Conv2d | nn.Linear, Tensor, Tensor]:
    """A layer, its inputs and their second moments; there are enough rows for the least ridge."""
    torch.manual_seed(seed)
    layer = LAYERS[kind]().double()
    if isinstance(layer, nn.Linear):
        inputs = smooth(seed, 100, 10, 10, 10).flatten(2)
    else:
        inputs = smooth(seed, 12, layer.in_channels, 10, 9)
    return layer, inputs, second_moments(nn.Sequential(layer), ["0"], inputs)["0"]


@torch.no_grad()
def relative_output_error(layer: nn.Module, pair: nn.Module, inputs: Tensor) -> float:
    """The pair's error over the outputs, both without bias, summed over all positions of all inputs."""
    zero = torch.zeros_like(inputs)
    return float((pair(inputs) - layer(inputs)).norm() / (layer(inputs) - layer(zero)).norm())


def plain(network: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    return cast(nn.Conv2d, network.get_submodule(name))


@torch.no_grad()
def with_ridge(layer: nn.Conv2d | nn.Linear, second: Tensor, slices: int, rank: int, measured: float) -> float:
    """A measured error and the ridge's part in it: as much again of every weight, squared."""
    left, right = fitted_factors(layer.weight, second, slices=slices, rank=rank, measure="refit")
    weight = layer.weight.reshape(len(second), -1, second.shape[-1])
    lost = weight - (left @ right).transpose(1, 2).flatten(2)
    mean = second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    ridge = 1e-6 / (1 + 1e-6) * mean
    total = float((weight @ second * weight).sum())
    held = float((ridge * lost.square()).sum()), float((ridge * weight.square()).sum())
    return float(np.sqrt((measured**2 * (total - held[1]) + held[0]) / total))


def fitted_pair(layer: nn.Conv2d | nn.Linear, second: Tensor, slices: int, rank: int, measure: str) -> nn.Module:
    left, right = fitted_factors(layer.weight, second, slices=slices, rank=rank, measure=measure)
    return paired(layer, left, right, scheme=0)


@pytest.mark.parametrize("kind", sorted(LAYERS))
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_refit_is_the_error_measured_on_the_outputs(kind: str, slices: int) -> None:
    layer, inputs, second = case(kind, seed=slices)
    if layer.weight.shape[1] % slices:
        slices = 4
    white, refit = fitted_curves(layer.weight, second, slices=slices)
    assert (white[0], refit[0]) == pytest.approx((1, 1))
    assert len(refit) > 1
    for rank in range(1, len(refit)):
        errors = {
            measure: relative_output_error(layer, fitted_pair(layer, second, slices, rank, measure), inputs)
            for measure in FITTED
        }
        assert errors["refit"] == pytest.approx(refit[rank], abs=TOLERANCE)
        assert with_ridge(layer, second, slices, rank, errors["refit"]) == pytest.approx(refit[rank], abs=1e-7)
        assert errors["refit"] <= errors["white"] + 1e-6
        if slices == 1:
            assert errors["white"] == pytest.approx(white[rank], abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["plain", "grouped", "linear"])
@pytest.mark.parametrize("slices", [1, 2])
def test_no_decoder_does_better_with_the_same_encoder(kind: str, slices: int) -> None:
    layer, inputs, second = case(kind, seed=9)
    _, refit = fitted_curves(layer.weight, second, slices=slices)
    rank = len(refit) - 1
    encoder, _ = fitted_pair(layer, second, slices, rank, "refit").double().children()
    groups = getattr(layer, "groups", 1)
    outputs, read = ((layer(inputs) - layer(0 * inputs)).detach(), encoder(inputs).detach())
    if outputs.ndim == 4:
        outputs, read = (maps.transpose(0, 1).flatten(1).T for maps in (outputs, read))
    outputs, read = (rows.reshape(-1, groups, rows.shape[-1] // groups) for rows in (outputs, read))
    lost = 0.0
    for group in range(groups):
        wanted, given_ = outputs[:, group].numpy(), read[:, group].numpy()
        lost += float(np.square(wanted - given_ @ np.linalg.lstsq(given_, wanted, rcond=None)[0]).sum())
    assert float(refit[rank]) == pytest.approx((lost / float(outputs.square().sum())) ** 0.5, abs=TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([1, 2, 4]), st.sampled_from([(6, 8, 3, 3), (20, 4, 1, 1), (5, 12)]))
def test_white_is_the_tail_of_the_whitened_spectra(seed: int, slices: int, shape: tuple[int, ...]) -> None:
    weight, columns = tensor(seed, *shape).double(), int(np.prod(shape[1:]))
    rows = tensor(seed + 1, 5 * columns, columns).double() @ tensor(seed + 2, columns, columns).double()
    second = rows.T @ rows / len(rows)
    width = columns // slices
    tails, total = np.zeros(min(len(weight), width) + 1), 0.0
    whole = weight.flatten(1)
    for at in range(slices):
        part = slice(at * width, (at + 1) * width)
        whitened = whole[:, part] @ torch.linalg.cholesky(second[part, part])
        squares = np.square(np.linalg.svd(whitened.numpy(), compute_uv=False))
        tails[:-1] += squares[::-1].cumsum()[::-1]
        total += squares.sum()
    white, refit = fitted_curves(weight, second[None], slices=slices)
    np.testing.assert_allclose(white, np.sqrt(tails / total)[: len(white)], atol=1e-6)
    assert (np.diff(white) <= 1e-12).all()
    assert (np.diff(refit) <= 1e-12).all()


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1, 2, 3]))
def test_inputs_that_weigh_alike_give_the_frobenius_error(seed: int, slices: int) -> None:
    weight = tensor(seed, 6, 6, 2, 2)
    white, refit = fitted_curves(weight, 3 * torch.eye(24).double()[None], slices=slices)
    curve, whole = (curves(weight, groups=1, slices=count, scheme=0) for count in (slices, 1))
    expected = MEASURES["fro"](curve, whole, slices)
    np.testing.assert_allclose(white, expected[: len(white)], atol=1e-9)
    np.testing.assert_allclose(refit, white, atol=1e-7)


@pytest.mark.parametrize("slices", [1, 2])
def test_dead_channels_zero_weights_and_low_rank_weights(slices: int) -> None:
    dead = smooth(0, 8, 4, 9, 9)
    dead[:, 1:3] = 0
    layer = nn.Conv2d(4, 6, 3).double()
    second = second_moments(nn.Sequential(layer), ["0"], dead)["0"]
    _, refit = fitted_curves(layer.weight, second, slices=slices)
    pair = fitted_pair(layer, second, slices, len(refit) - 1, "refit")
    assert relative_output_error(layer, pair, dead) == pytest.approx(refit[-1], abs=TOLERANCE)
    assert (fitted_curves(0 * layer.weight, second, slices=slices) == 0).all()
    nothing = fitted_pair(nn.Conv2d(4, 6, 3).double(), 0 * second + 1e-30 * torch.eye(36), slices, 1, "refit")
    assert all(bool(parameter.isfinite().all()) for parameter in nothing.parameters())
    low = (tensor(0, 6, 1).double() @ tensor(1, 1, 36).double()).reshape(6, 4, 3, 3)
    layer.weight.data.copy_(low)
    for measure, curve in zip(FITTED, fitted_curves(low, second, slices=slices), strict=True):
        assert curve[1] < 1e-4
        assert relative_output_error(layer, fitted_pair(layer, second, slices, 2, measure), dead) < 1e-4


def test_a_slice_of_zeros_costs_the_others_nothing() -> None:
    weight, second = tensor(0, 6, 8).double(), torch.eye(8).double()[None]
    weight[:, :4] = 0
    _, refit = fitted_curves(weight, second, slices=2)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    expected = np.sqrt(np.square(values)[::-1].cumsum()[::-1] / np.square(values).sum())
    np.testing.assert_allclose(refit, expected[: len(refit)], atol=1e-6)
    layer = nn.Linear(8, 6, bias=False).double()
    layer.weight.data.copy_(weight)
    inputs = torch.eye(8).double()
    pair = fitted_pair(layer, second, 2, 2, "refit")
    assert relative_output_error(layer, pair, inputs) == pytest.approx(refit[2], abs=1e-6)


@pytest.mark.parametrize("measure", FITTED)
def test_components_are_shared_out_evenly(measure: str) -> None:
    layer, _, second = case("plain", 0)
    left, right = fitted_factors(layer.weight, second, slices=2, rank=2, measure=measure)
    assert (left.shape, right.shape) == ((1, 2, 8, 2), (1, 2, 2, 27))
    torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1))


def test_ranks_end_where_a_pair_would_cost_more_than_the_layer() -> None:
    # On paper: a rank costs 2 * 8 + 6 * 9 = 70 of 432 weights, so 6; the shorter side of a slice allows 7.
    layer, _, second = case("plain", 0)
    assert fitted_curves(layer.weight, second, slices=2).shape == (2, 7)
    assert fitted_curves(torch.ones(1, 4), torch.eye(4).double()[None], slices=1).shape == (2, 1)


# In order


IMAGES = smooth(3, 32, 3, 16, 16).float()


def decomposed(name: str) -> tuple[nn.Module, nn.Module, dict[str, tuple[int, int]]]:
    """A network and its student of rank 2, fitted to the inputs of the teacher's layers."""
    teacher = NETWORKS[name]()
    choices = {
        name: (1, 2)
        for name, module in teacher.named_modules()
        if (isinstance(module, nn.Conv2d) and module.weight.shape[1] > 1) or isinstance(module, nn.Linear)
    }
    student = copy.deepcopy(teacher)
    for at, second in second_moments(teacher, list(choices), IMAGES).items():
        parent, _, attribute = at.rpartition(".")
        pair = fitted_pair(plain(teacher, at), second, 1, 2, "refit")
        setattr(student.get_submodule(parent), attribute, pair)
    return teacher, student, choices


def fittings(teacher: nn.Module, choices: dict[str, tuple[int, int]]) -> dict[str, Solve]:
    return {name: fitting(teacher.get_submodule(name), slices, rank) for name, (slices, rank) in choices.items()}


@pytest.mark.parametrize("name", sorted(NETWORKS))
@torch.no_grad()
def test_the_student_comes_closer_when_it_is_fitted_in_order(name: str) -> None:
    teacher, student, choices = decomposed(name)
    recalibrate(teacher, IMAGES)  # so that to follow the teacher's norms is to estimate the student's
    before = copy.deepcopy(student)
    recalibrate(before, IMAGES)
    refit(student, teacher, IMAGES, pairs=fittings(teacher, choices))
    wanted = teacher(IMAGES)
    assert float((student(IMAGES) - wanted).norm()) < 0.9 * float((before(IMAGES) - wanted).norm())
    assert not student.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in student.modules())
    assert not any(module._forward_hooks for module in teacher.modules())
    settled = copy.deepcopy(student)
    recalibrate(settled, IMAGES)
    torch.testing.assert_close(settled(IMAGES), student(IMAGES), rtol=0, atol=5e-3 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_a_layer_is_fitted_to_what_the_student_reads(seed: int) -> None:
    """The first layer keeps one of its two ranks; the second keeps both, so it is the least squares fit itself.

    A second implementation: the pull towards the teacher's layer as rows beside the data's.
    """
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False), nn.ReLU(), nn.Linear(2, 3, bias=False))
    student = copy.deepcopy(teacher)
    images = tensor(seed, 256, 1, 2, 2)
    student[1] = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 2, bias=False))
    student[3] = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    refit(student, teacher, images, pairs=fittings(teacher, {"1": (1, 1), "3": (1, 2)}))
    read, wanted, own = student[:3](images).double(), teacher(images).double(), teacher[3].weight.double()
    pull = (PRIOR * read.square().sum() / 2).sqrt() * torch.eye(2).double()
    expected = torch.linalg.lstsq(torch.cat([read, pull]), torch.cat([wanted, pull @ own.T])).solution
    torch.testing.assert_close((student[3][1].weight @ student[3][0].weight).T.double(), expected, rtol=1e-4, atol=1e-6)
    assert (student(images) - wanted).norm() < (teacher[3](student[:3](images)) - wanted).norm()


@torch.no_grad()
def test_full_rank_in_order_changes_nothing_but_the_norms() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4)).eval()
    student = copy.deepcopy(teacher)
    student[0] = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 4, 1))
    refit(student, teacher, IMAGES, pairs=fittings(teacher, {"0": (1, 3)}))
    torch.testing.assert_close(student(IMAGES), teacher(IMAGES), rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(self.conv(x).relu()).mean((2, 3)))


@torch.no_grad()
def test_a_layer_that_runs_twice_and_a_single_image_are_left_as_they_are() -> None:
    teacher: nn.Module = Twice().eval()
    student = copy.deepcopy(teacher)
    student.conv = fitted_pair(plain(teacher, "conv"), second_moments(teacher, ["conv"], IMAGES)["conv"], 1, 2, "refit")
    before = student(IMAGES)
    refit(student, teacher, IMAGES, pairs=fittings(teacher, {"conv": (1, 2)}))
    assert torch.equal(student(IMAGES), before)
    teacher, student, choices = decomposed("plain")
    before = student(IMAGES)
    refit(student, teacher, IMAGES[:1], pairs=fittings(teacher, choices))
    assert torch.equal(student(IMAGES), before)

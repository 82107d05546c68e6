"""Students refit to their teacher: the closed form against another, and what has to stay as it is."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.network import profile
from methods.network.cut import cut_to, kept_channels, outputs_kept
from methods.network.widths import levels
from methods.refit import fit, moments, refit
from methods.refit.fit import PRIOR
from methods.training import recalibrate
from tests.support.networks import NETWORKS


def smooth(count: int = 32) -> Tensor:
    """Images `(n, 3, 16, 16)` with structure."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, 16, mode="bilinear")


IMAGES = smooth()


def halved(teacher: nn.Module) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """A student with about half of every group's channels, and the outputs that its layers keep."""
    groups = [group for group in profile(teacher, IMAGES).groups if group.fixed is None]
    widths = {group.name: (legal := levels(group, 1))[(len(legal) - 1) // 2] for group in groups}
    kept = kept_channels(teacher, groups, widths, "l1")
    return cut_to(teacher, groups, kept), outputs_kept(teacher, groups, kept)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_narrow_student_comes_closer_to_its_teacher(name: str) -> None:
    teacher = NETWORKS[name]()
    student, kept = halved(teacher)
    before = copy.deepcopy(student)
    recalibrate(before, IMAGES)
    refit(student, teacher, IMAGES, kept=kept)
    wanted = teacher(IMAGES)
    assert float((student(IMAGES) - wanted).norm()) < 0.9 * float((before(IMAGES) - wanted).norm())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in student.modules())
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_at_full_width_the_student_is_its_teacher(name: str) -> None:
    """So are its norms, whose statistics were never those of these images."""
    teacher = NETWORKS[name]()
    student = copy.deepcopy(teacher)
    refit(student, teacher, IMAGES)
    wanted = teacher(IMAGES)
    torch.testing.assert_close(student(IMAGES), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_a_layer_of_fewer_columns_is_fitted_on_the_rows_of_the_wider_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PLENTY", 1)
    teacher = NETWORKS["residual"]()
    student, kept = halved(teacher)
    before = copy.deepcopy(student)
    refit(student, teacher, IMAGES, kept=kept)
    wanted = teacher(IMAGES)
    assert float((student(IMAGES) - wanted).norm()) < float((before(IMAGES) - wanted).norm())


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_layer_is_fitted_by_ridge_regression_held_to_its_weight(bias: bool) -> None:
    """A second implementation: the pull as rows beside the data's, a free bias as an extra column of ones."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=bias))
    student = copy.deepcopy(teacher)
    student[1].weight[2:4] = 0  # what comes of the first layer is kept for it by name
    student[3].weight += 0.1
    images = torch.randn(300, 1, 2, 3)[:256]
    held = copy.deepcopy(student[3])
    student[1].requires_grad_(False)
    refit(student, teacher, images)
    read, wanted = student[:3](images).double(), teacher(images).double()
    spread = read - read.mean(0) if bias else read
    pull = (PRIOR * spread.square().sum() / 5).sqrt() * torch.eye(5).double()
    ones = torch.ones(len(images), 1).double()
    columns = torch.cat([torch.cat([read, ones * bias], 1), torch.cat([pull, torch.zeros(5, 1).double()], 1)])
    targets = torch.cat([wanted, pull @ held.weight.double().T])
    expected = torch.linalg.lstsq(columns, targets, driver="gelsd").solution
    torch.testing.assert_close(student[3].weight.double().T, expected[:5], rtol=1e-4, atol=1e-5)
    if bias:
        torch.testing.assert_close(student[3].bias.double(), expected[5], rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """One layer that runs twice, two that share a weight, a frozen one, and one whose weight is read by the network."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.one, self.other, self.frozen = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.other.weight = self.one.weight
        self.frozen.requires_grad_(False)
        self.code, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.other(self.one(self.twice(self.twice(x).relu())).relu())
        return cast(Tensor, self.head(self.code(self.frozen(mixed).mean((2, 3))) @ self.code.weight))


@torch.no_grad()
def test_layers_that_cannot_be_fitted_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher = Odd().eval()
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter *= 0.8
    before = copy.deepcopy(student.state_dict())
    refit(student, teacher, IMAGES)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    student.load_state_dict(before)
    refit(student, teacher, IMAGES * torch.inf)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    student.load_state_dict(before)
    monkeypatch.setattr(fit, "WIDEST", 2)
    refit(student, teacher, IMAGES)
    refit(student, teacher, IMAGES[:1])
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_plan_names_the_layers_that_are_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile(NETWORKS["flatten"](), IMAGES)
    assert fit.too_wide(found) == ()
    monkeypatch.setattr(fit, "WIDEST", 255)
    assert fit.too_wide(found) == ("too wide to be refit: 7",)

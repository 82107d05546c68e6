"""Settled before training, a gated network's outputs are finite, of the teacher's scale, and cost what was planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from methods.base import Budget
from methods.manidp import ManiDP
from methods.manidp.gates import Gated
from methods.network import profile
from methods.protocol import defaults
from methods.training import recalibrate
from tests.support.odd_networks import seeded

IMAGES = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHOD = ManiDP()


def convolved(inputs: int, outputs: int, size: int = 3, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class Inverted(nn.Module):
    """An inverted residual of six times the width, with or without a squeeze-excite product."""

    def __init__(self, width: int, *, is_squeezed: bool) -> None:
        super().__init__()
        self.expand = nn.Sequential(*convolved(width, 6 * width, 1), *convolved(6 * width, 6 * width, groups=6 * width))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6 * width, 6 * width, 1), nn.Sigmoid())
        self.project = nn.Sequential(*convolved(6 * width, width, 1)[:2])
        self.is_squeezed = is_squeezed

    def forward(self, x: Tensor) -> Tensor:
        wide = self.expand(x)
        return x + cast(Tensor, self.project(wide * self.squeeze(wide) if self.is_squeezed else wide))


class Dense(nn.Module):
    """A layer of a DenseNet: what it makes of its input, beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.inner = nn.BatchNorm2d(width), nn.Sequential(*convolved(width, 32, 1))
        self.outer = nn.Conv2d(32, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.outer(self.inner(torch.relu(self.first(x))))], 1)


def headed(*body: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*convolved(3, 16), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: headed(*(Inverted(16, is_squeezed=False) for _ in range(6)), width=16),
    "squeeze-excite": lambda: headed(*(Inverted(16, is_squeezed=True) for _ in range(6)), width=16),
    "dense": lambda: headed(*(Dense(16 + 8 * place) for place in range(6)), width=64),
}


def settled(kind: str, share: float, trained_on: Tensor = IMAGES) -> tuple[nn.Module, Gated, int]:
    """A teacher whose norms fit some images, and its student, settled on `IMAGES`."""
    teacher = seeded(KINDS[kind])
    recalibrate(teacher, trained_on)
    rows = profile(teacher, IMAGES)
    scores = METHOD.merge([METHOD.score(shard, teacher, IMAGES, 0) for shard in METHOD.shards(rows, IMAGES)], rows)
    plan = METHOD.allocate(scores, rows, Budget("b", macs=int(share * rows.macs)), defaults(METHOD))
    student = cast(Gated, METHOD.apply(teacher, plan, IMAGES))
    METHOD.settle(student, plan, IMAGES)
    assert plan.macs_expected is not None
    return teacher, student, plan.macs_expected


@torch.no_grad()
@pytest.mark.parametrize(("kind", "share"), [("depthwise", 0.6), ("squeeze-excite", 0.6), ("dense", 0.8)])
def test_outputs_keep_the_teachers_scale(kind: str, share: float, caplog: pytest.LogCaptureFixture) -> None:
    teacher, student, target = settled(kind, share)
    unseen = 1.5 * torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    for images in (IMAGES, unseen):
        expected, found = teacher(images).abs().max(), student(images).abs().max()
        assert expected / 10 < found < 10 * expected
    assert 0.995 * target <= student.instance_macs(IMAGES).double().mean() <= target
    assert not caplog.records


@torch.no_grad()
def test_norms_are_not_estimated_anew_on_images_that_are_none_of_the_teachers() -> None:
    teacher, student, _ = settled("depthwise", 0.95, 0.3 + 2 * IMAGES.roll(1, 0).square())
    wanted = teacher(IMAGES)
    assert (student(IMAGES) - wanted).norm() < 0.5 * wanted.norm()

"""Tasks: what a perfect, a poor and an ignored answer are worth, and that every loss is one number per image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from methods.training import Classification, Recipe, Regression, Segmentation, Task
from methods.training.objective import instance_losses
from methods.training.task import IGNORED, mean_iou, r_squared

CASES: dict[str, tuple[Task, Tensor, Tensor]] = {
    "classification": (Classification(), torch.randn(5, 4, generator=torch.manual_seed(0)), torch.arange(5) % 4),
    "segmentation": (Segmentation(), torch.randn(5, 4, 6, 7), torch.randint(4, (5, 6, 7))),
    "regression": (Regression(), torch.randn(5, 3), torch.randn(5, 3)),
    "single numbers": (Regression(), torch.randn(5), torch.randn(5)),
}
every_task = pytest.mark.parametrize(("task", "outputs", "labels"), CASES.values(), ids=CASES)


@every_task
def test_a_loss_is_one_finite_number_per_image_that_falls_along_its_gradient(
    task: Task, outputs: Tensor, labels: Tensor
) -> None:
    for measure in (task.losses, lambda ours, _: task.mimicry(ours, outputs.flip(0), 4.0)):
        ours = outputs.clone().requires_grad_()
        before = measure(ours, labels)
        assert before.shape == (5,)
        before.sum().backward()
        assert ours.grad is not None
        after = measure(ours.detach() - 1e-2 * ours.grad, labels)
        assert float(after.sum()) < float(before.detach().sum())


@every_task
def test_the_teachers_own_outputs_are_mimicked_perfectly(task: Task, outputs: Tensor, labels: Tensor) -> None:
    assert float(task.mimicry(outputs, outputs, 4.0).abs().max()) < 1e-5
    assert task.score(task.answers(outputs), task.labels(outputs)) == pytest.approx(1)
    assert task.score(task.answers(outputs), labels) < 1


@every_task
def test_a_recipe_weighs_labels_and_teacher(task: Task, outputs: Tensor, labels: Tensor) -> None:
    target, recipe = outputs.flip(0), Recipe(steps=1, distill=0.25, task=task)
    expected = 0.75 * task.losses(outputs, labels) + 0.25 * task.mimicry(outputs, target, recipe.temperature)
    torch.testing.assert_close(instance_losses(outputs, labels, target, recipe), expected)


def test_ignored_pixels_change_nothing() -> None:
    outputs, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    labels[0, :2] = IGNORED
    others = outputs.clone()
    others[0, :, :2] += 5 * torch.randn(3, 2, 4)
    task = Segmentation()
    torch.testing.assert_close(task.losses(outputs, labels), task.losses(others, labels))
    assert mean_iou(outputs.argmax(1), labels) == mean_iou(others.argmax(1), labels)
    labels[0] = IGNORED
    assert float(task.losses(outputs, labels)[0]) == 0


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_mean_iou_is_that_of_sets_of_pixels(seed: int) -> None:
    chance = torch.manual_seed(seed)
    found, wanted = (torch.randint(4, (3, 5, 5), generator=chance) for _ in range(2))
    found[0, 0, 0] = wanted[0, 0, 0]
    pairs = [((found == kind), (wanted == kind)) for kind in range(4)]
    shares = [float((one & other).sum() / (one | other).sum()) for one, other in pairs if bool((one | other).any())]
    assert mean_iou(found, wanted) == pytest.approx(sum(shares) / len(shares))
    order = torch.randperm(3, generator=chance)
    assert mean_iou(found[order], wanted[order]) == mean_iou(found, wanted)


def test_r_squared_is_blind_to_units_and_0_for_the_mean() -> None:
    labels = torch.randn(50, 3, generator=torch.manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0])
    answers = labels + 0.3 * torch.randn(50, 3)
    assert r_squared(answers, labels) == pytest.approx(r_squared(1000 * answers + 7, 1000 * labels + 7), abs=1e-5)
    assert r_squared(labels.mean(0).expand_as(labels), labels) == pytest.approx(0, abs=1e-6)
    assert r_squared(-labels, labels) == 0


def test_regression_losses_are_blind_to_units() -> None:
    outputs, labels = CASES["regression"][1:]
    losses = Regression().losses(outputs, labels)
    torch.testing.assert_close(Regression().losses(100 * outputs, 100 * labels), losses)
    torch.testing.assert_close(losses, F.mse_loss(outputs, labels, reduction="none").mean(1) / _variance(labels))


def _variance(labels: Tensor) -> Tensor:
    return (labels - labels.mean(0)).square().mean()

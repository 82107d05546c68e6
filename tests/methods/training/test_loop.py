"""The training loop, on problems whose answer is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from methods.training import Recipe, evaluate, parts, reads, recalibrate, recover, top1, train
from methods.training.loop import _train_mode
from methods.training.objective import classifier_name, last_map
from methods.training.recipe import WHOLE, Chance
from search.workload import zoo
from search.workload.data.samples import Arrays
from tests.support.networks import NETWORKS

RECIPE = Recipe(40, batch_size=32, learning_rate=0.05, report_every=10)


def blobs(count: int = 256, seed: int = 0) -> Arrays:
    """Three classes of `(1, 4, 4)` images, told apart by the bright row: separable, with noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    images = random.normal(0, 0.3, (count, 1, 4, 4)).astype(np.float32)
    images[np.arange(count), 0, labels] += 1
    return Arrays(images, labels, mirror=True)


def network(width: int = 8, *, seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(width * 16, 3),
        )


def trained(model: nn.Module, recipe: Recipe = RECIPE, *, seed: int = 0, teacher: nn.Module | None = None) -> list[int]:
    return list(train(model, blobs(), recipe, seed, teacher))


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


# Training


def test_a_separable_problem_is_learnt() -> None:
    model, unseen = network(), blobs(seed=1)
    before = evaluate(model, unseen, cross_entropy)
    assert trained(model) == [10, 20, 30, 40]
    assert evaluate(model, unseen, cross_entropy) < 0.2 * before
    assert evaluate(model, unseen, top1) > 0.97


def test_progress_is_told_with_the_model_fit_to_be_evaluated() -> None:
    model = network()
    steps = []
    for step in train(model, blobs(), replace(RECIPE, steps=25), 0):
        assert not any(module.training for module in model.modules())
        steps.append(step)
    assert steps == [10, 20, 25]
    assert not model.training


class Sliced(nn.Conv2d):
    """A strided 1x1 convolution as one of stride 1 on every other pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[:, :, ::2, ::2].contiguous(), self.weight)


def test_a_narrow_strided_projection_trains_as_it_should() -> None:
    """Maps of 6 channels, channels last, had torch write out of bounds here: a crash, or wrong gradients."""
    torch.manual_seed(0)
    model = network(6)[:3].append(nn.Conv2d(6, 16, 1, stride=2, bias=False)).append(nn.Flatten())
    model.append(nn.Linear(64, 3))
    other = copy.deepcopy(model)
    other[3] = Sliced(6, 16, 1, bias=False)
    other[3].load_state_dict(model[3].state_dict())
    for one in (model, other):
        trained(one, replace(RECIPE, steps=5))
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", range(1, 13))
def test_any_number_of_steps_trains(steps: int) -> None:
    model = network()
    before = weights(model)
    told = trained(model, Recipe(steps, batch_size=32))
    assert told[-1] == steps
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("teacher", [None, network(seed=5).eval()])
def test_one_seed_gives_one_network_bit_for_bit(teacher: nn.Module | None) -> None:
    def result(seed: int) -> Tensor:
        model = network(dropout=0.2)
        trained(model, replace(RECIPE, steps=12), seed=seed, teacher=teacher)
        return weights(model)

    assert torch.equal(result(3), result(3))
    assert not torch.equal(result(3), result(4))


def test_zero_steps_change_nothing() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    assert trained(model, replace(RECIPE, steps=0)) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_set_smaller_than_a_batch_is_gone_through_as_often_as_it_takes() -> None:
    model = network()
    assert list(train(model, blobs(7), replace(RECIPE, steps=5), 0)) == [5]


@pytest.mark.parametrize("teacher", [None, network(seed=5).eval()])
def test_a_loss_that_is_no_number_stops_with_a_reason(teacher: nn.Module | None) -> None:
    data = blobs(64)
    data.images[:] = np.nan
    with pytest.raises(FloatingPointError) as caught:
        list(train(network(), data, RECIPE, 0, teacher))
    assert str(caught.value) == (
        "the training loss became nan at step 1 of 40; expected a finite number; "
        "lower the learning rate (0.05) or check the data"
    )


def test_norms_and_biases_do_not_decay() -> None:
    """Without a gradient there is only decay: a constant input of zeros leaves all but the first convolution alone."""
    model = network()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    silent = Arrays(np.zeros((64, 1, 4, 4), dtype=np.float32), np.zeros(64, dtype=np.int64))
    recipe = Recipe(2, batch_size=64, learning_rate=0.1, momentum=0.0, weight_decay=0.1, warmup=0.0)
    expected = 0.5
    # one cycle without warm-up, by hand: a cosine from the peak in two steps, to 1/250,000 of it after the second
    low = 0.1 / 25 / 1e4
    for rate in (low + (0.1 - low) * 0.5, low):
        expected *= 1 - rate * 0.1
    list(train(model, silent, recipe, 0))
    convolution = model[0].weight.detach()
    assert torch.allclose(convolution, torch.full_like(convolution, expected), rtol=1e-6)
    # the batch norm takes the convolution's bias away again, so only decay could have moved it
    assert torch.allclose(model[0].bias, torch.full((8,), 0.5), atol=1e-7)
    assert torch.equal(model[1].weight, torch.full((8,), 0.5))


# Learning from a teacher


def distance(model: nn.Module, teacher: nn.Module) -> float:
    images, _ = blobs(seed=1).batch(np.arange(256))
    with torch.no_grad():
        return float(F.mse_loss(model.eval()(images), teacher(images)))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    model = network(seed=1)
    trained(model)
    return model.eval()


def test_features_of_the_same_width_are_mimicked(teacher: nn.Module) -> None:
    student = copy.deepcopy(teacher)
    nn.init.normal_(student[0].weight, std=0.3)
    before, classifier = distance(student, teacher), student[-1].weight.clone()
    list(recover(student, teacher, blobs(), replace(RECIPE, labels=False), 0))
    assert distance(student, teacher) < 0.3 * before
    assert torch.equal(student[-1].weight, classifier)


def test_outputs_are_mimicked_where_the_width_was_cut(teacher: nn.Module) -> None:
    student = network(4, seed=2)
    before = distance(student, teacher)
    list(recover(student, teacher, blobs(), replace(RECIPE, labels=False), 0))
    assert distance(student, teacher) < 0.5 * before


@pytest.mark.parametrize("width", [8, 4])
def test_without_labels_no_label_is_looked_at(teacher: nn.Module, width: int) -> None:
    data = blobs()
    wrong = replace(data, labels=(data.labels + 1) % 3)
    students = [network(width, seed=2) for _ in range(2)]
    for student, samples in zip(students, (data, wrong), strict=True):
        list(recover(student, teacher, samples, replace(RECIPE, steps=5, labels=False), 0))
    assert torch.equal(weights(students[0]), weights(students[1]))


def test_without_labels_nothing_is_dropped_at_random() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), StochasticDepth(0.5, "row"))
    for labels in (True, False):
        _train_mode(model, replace(RECIPE, labels=labels))
        assert [module.training for module in model] == [True, True, labels, labels]


def test_recovery_sees_no_more_images_than_it_may() -> None:
    class Watched:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __len__(self) -> int:
            return 300

        def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
            self.seen += indices.tolist()
            return blobs(300).batch(indices, augment, part)

    drawn = []
    for seed, images in ((0, 20), (0, 20), (1, 20), (0, 500)):
        watched = Watched()
        list(train(network(), watched, replace(RECIPE, steps=8, batch_size=16, images=images), seed))
        drawn.append(set(watched.seen))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) <= 20 < len(drawn[3])


@pytest.mark.parametrize(
    ("build", "size", "tap"),
    [
        (lambda: zoo.build("resnet14", 1, 10, 0), (1, 8, 8), "5"),
        (lambda: zoo.build("mobilenet-cifar", 1, 10, 0), (1, 16, 16), "50"),
        (NETWORKS["flatten"], (3, 16, 16), None),
        (NETWORKS["squeeze"], (3, 16, 16), "body"),
        (lambda: torchvision.models.vit_b_32(image_size=32), (3, 32, 32), "encoder"),
        (lambda: torchvision.models.resnet18(), (3, 64, 64), "layer4"),
        (lambda: torchvision.models.mobilenet_v2(), (3, 64, 64), "features"),
    ],
)
def test_the_last_map_is_what_pooling_reads(build: Callable[[], nn.Module], size: Any, tap: str | None) -> None:
    assert last_map(build().eval(), torch.zeros(1, *size)) == tap


def test_the_share_of_distillation_goes_from_labels_to_the_teacher() -> None:
    """A teacher that is always wrong: its student is right with `distill` 0 and wrong with `distill` 1."""
    liar = network(seed=1)
    data = blobs()
    list(train(liar, replace(data, labels=(data.labels + 1) % 3), RECIPE, 0))
    found = {}
    for distill in (0.0, 1.0):
        student = network(seed=2)
        list(recover(student, liar.eval(), data, replace(RECIPE, distill=distill), 0))
        found[distill] = evaluate(student, blobs(seed=1), top1)
    assert found[0.0] > 0.95
    assert found[1.0] < 0.05


def test_all_distillation_is_blind_to_labels(teacher: nn.Module) -> None:
    data = blobs()
    students = [network(seed=2) for _ in range(2)]
    for student, labels in zip(students, (data.labels, (data.labels + 1) % 3), strict=True):
        list(recover(student, teacher, replace(data, labels=labels), replace(RECIPE, steps=5, distill=1.0), 0))
    assert torch.equal(weights(students[0]), weights(students[1]))


def test_the_teacher_stays_as_it_was() -> None:
    teacher = network(seed=1).eval()
    before = weights(teacher)
    list(recover(network(), teacher, blobs(), replace(RECIPE, steps=3), 0))
    assert torch.equal(weights(teacher), before)
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_classifier_is_the_last_linear_layer() -> None:
    assert classifier_name(network()) == "5"
    assert classifier_name(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1), nn.Flatten())) == "1"
    with pytest.raises(ValueError, match="neither a Linear nor a Conv2d"):
        classifier_name(nn.ReLU())


# Norms


def statistics(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The plain average over batches of each channel's mean and unbiased variance."""
    flat = [batch.transpose(0, 1).flatten(1) for batch in batches]
    return sum(one.mean(1) for one in flat) / len(flat), sum(one.var(1) for one in flat) / len(flat)


def test_norms_are_estimated_anew_as_plain_averages() -> None:
    images = torch.rand(60, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 4 - 1
    norm = nn.BatchNorm2d(2, momentum=0.3)
    nn.init.constant_(norm.running_mean, 77.0)
    norm.num_batches_tracked.fill_(100)
    model = nn.Sequential(norm, nn.Dropout(0.5), nn.Conv2d(2, 2, 1)).eval()
    recalibrate(model, images, batch_size=20)
    mean, variance = statistics([images[:20], images[20:40], images[40:]])
    assert torch.allclose(norm.running_mean, mean, atol=1e-6)
    assert torch.allclose(norm.running_var, variance, atol=1e-5)
    assert norm.momentum == 0.3
    assert not any(module.training for module in model.modules())


def test_a_second_norm_sees_what_the_first_one_gives_in_training() -> None:
    images = torch.rand(40, 2, 3, 3, generator=torch.Generator().manual_seed(0)) + 5
    first, second = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    nn.init.constant_(first.weight, 3.0)
    recalibrate(nn.Sequential(first, second).eval(), images)
    assert torch.allclose(second.running_mean, torch.zeros(2), atol=1e-4)
    assert torch.allclose(second.running_var, torch.full((2,), 9.0 * 360 / 359), rtol=1e-3)


@pytest.mark.parametrize("count", [2, 21, 41])
def test_no_image_is_left_out_and_none_stands_alone(count: int) -> None:
    images = torch.rand(count, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(2)
    recalibrate(nn.Sequential(norm, nn.Conv2d(2, 1, 1)).eval(), images, batch_size=20)
    assert norm.num_batches_tracked == -(-count // 20)
    assert torch.allclose(norm.running_mean, images.mean((0, 2, 3)), atol=0.02)


def test_a_single_image_leaves_the_norms_as_they_are() -> None:
    model = network().eval()
    before = weights(model)
    recalibrate(model, torch.rand(1, 1, 4, 4))
    assert torch.equal(weights(model), before)


# Evaluation


def test_parts_are_smaller_where_images_are_larger() -> None:
    def sizes(side: int, count: int) -> list[int]:
        return [len(part) for part in parts(torch.empty(count, 3, side, side))]

    assert sizes(8, 300) == sizes(64, 300) == [128, 128, 44]
    assert sizes(224, 100) == [41, 41, 18]
    assert sizes(2048, 3) == [1, 1, 1]
    assert [len(read) for read in reads(blobs(1025))] == [342, 342, 341]
    assert [len(read) for read in reads(blobs(1025), 100)] == [100]


@pytest.mark.parametrize("metric", [top1, cross_entropy])
def test_evaluation_does_not_depend_on_the_size_of_reads(
    metric: Callable[[Tensor, Tensor], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = network(), blobs(101)
    model.train()
    whole = evaluate(model, data, metric)
    for size in (1, 7, 100, 101):
        monkeypatch.setattr("methods.training.evaluation.READ", size)
        assert evaluate(model, data, metric) == pytest.approx(whole, rel=1e-5)
    images, labels = data.batch(np.arange(101))
    with torch.no_grad():
        assert whole == pytest.approx(metric(model.eval()(images), labels), rel=1e-5)


def test_training_in_half_precision_keeps_whole_weights() -> None:
    model = network()
    trained(model, replace(RECIPE, precision="bf16"))
    assert evaluate(model, blobs(seed=1), top1) > 0.95
    assert all(value.dtype == torch.float32 for value in model.parameters())


@pytest.mark.parametrize("labels", [True, False])
def test_a_loss_that_depends_on_frozen_parameters_alone_ends_the_training(labels: bool) -> None:
    """Without labels the last map is mimicked, which does not see the classifier."""
    model, teacher = network(), network(seed=1)
    model.requires_grad_(False)
    if not labels:
        model[-1].requires_grad_(True)
    before = [value.clone() for value in model.parameters()]
    assert trained(model, replace(RECIPE, labels=labels), teacher=teacher) == [RECIPE.steps]
    assert not model.training
    assert all(torch.equal(value, old) for value, old in zip(model.parameters(), before, strict=True))

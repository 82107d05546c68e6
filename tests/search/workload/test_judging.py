"""A first look at the teacher: metrics that are no shares are refused, and odd teachers are told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.training import top1
from search.base import WorkloadError
from search.workload.judging import answers, check_metric, warn_of
from search.workload.usercode import UserMetric
from tests.support.numbered import numbered

LABELS = torch.arange(60) % 3
GOOD = 5 * F.one_hot(LABELS, 3).float() + torch.linspace(-1, 1, 180).reshape(60, 3)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            lambda logits, labels: 100 * top1(logits, labels),
            "gave 100 for the teacher, 100 for right answers and 0 for",
        ),
        (
            lambda logits, labels: 1 - top1(logits, labels),
            "gave 0 for the teacher, 0 for right answers and 1 for wrong",
        ),
        (F.cross_entropy, "for right answers and 10 for wrong ones; expected a share from 0 to 1 that is larger"),
        (lambda logits, labels: -F.cross_entropy(logits, labels), "return a fraction in place of a percentage, and"),
    ],
)
def test_metrics_that_are_no_shares_are_refused(function: Callable[[Tensor, Tensor], float], told: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        check_metric(UserMetric("m:f", function), GOOD, LABELS)
    assert "the metric m:f gave" in str(caught.value)
    assert told in str(caught.value)


def test_shares_are_metrics() -> None:
    def correlation(logits: Tensor, labels: Tensor) -> float:
        return 2 * top1(logits, labels) - 1

    def needing_all(logits: Tensor, labels: Tensor) -> float:
        raise ValueError("needs every class")

    for function in (top1, correlation, needing_all, lambda logits, labels: 0.25):
        check_metric(UserMetric("m:f", function), GOOD, LABELS)


def test_teachers_at_chance_and_of_probabilities_are_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_of(GOOD, LABELS)
    assert not caplog.text
    warn_of(GOOD.roll(1, 0), LABELS)
    assert "right on 0.0 % of 60 training images, and the commonest label alone on 33.3 %: no more than" in caplog.text
    caplog.clear()
    warn_of(GOOD.softmax(1), LABELS)
    assert "outputs are probabilities already: each row sums to 1; expected logits" in caplog.text
    assert "chance" not in caplog.text


def test_a_teacher_that_looks_at_the_whole_batch_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) - x.flatten(1).mean(0)

    answers(Centred(), numbered(200))
    assert "answers an image differently if other images are in its batch" in caplog.text
    assert "from call to call" not in caplog.text


def test_a_teacher_that_prepares_its_images_in_place_is_steady(caplog: pytest.LogCaptureFixture) -> None:
    class Halving(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.div_(2).flatten(1)

    answers(Halving(), numbered(200))
    assert not caplog.text


@pytest.mark.parametrize("is_random", [False, True])
def test_a_teacher_that_differs_from_call_to_call_is_told(caplog: pytest.LogCaptureFixture, is_random: bool) -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) + (torch.rand(len(x), 1) if is_random else 0)

    before = torch.get_rng_state()
    logits, labels = answers(Network(), numbered(200))
    assert torch.equal(torch.get_rng_state(), before)
    assert (len(logits), len(labels)) == (128, 128)
    assert ("answers the same images differently from call to call" in caplog.text) == is_random

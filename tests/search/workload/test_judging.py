"""A first look at the teacher: metrics that are no shares are refused, and odd teachers are told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.training import top1
from search.base import WorkloadError
from search.units import TOP1, Scale
from search.workload.judging import answers, check_metric, warn_of
from search.workload.usercode import UserMetric
from tests.search.workload.numbered import numbered

LABELS = torch.arange(60) % 3
GOOD = 5 * F.one_hot(LABELS, 3).float() + torch.linspace(-1, 1, 180).reshape(60, 3)


def error(logits: Tensor, labels: Tensor) -> float:
    return 1 - top1(logits, labels)


def percentage(logits: Tensor, labels: Tensor) -> float:
    return 100 * top1(logits, labels)


def correlation(logits: Tensor, labels: Tensor) -> float:
    return 2 * top1(logits, labels) - 1


@pytest.mark.parametrize(
    ("function", "scale", "told"),
    [
        (percentage, TOP1, "gave 100 for the teacher, 100 for right answers and 0 for"),
        (
            correlation,
            TOP1,
            "for right answers and -1 for wrong ones; expected values from 0 to 1, larger for",
        ),
        (error, TOP1, "gave 0 for the teacher, 0 for right answers and 1 for wrong"),
        (
            F.cross_entropy,
            TOP1,
            "and 10 for wrong ones; expected values from 0 to 1, larger for better answers;",
        ),
        (F.cross_entropy, Scale("loss", 0, 2), "and metric.direction: minimize of a loss"),
        (top1, Scale("a", 1, 0), "expected values from 0 to 1, smaller for better answers; give metric.range, such as"),
        (percentage, Scale("a", 0, 90), "gave 100 for the teacher, 100 for right answers and 0 for wrong ones"),
    ],
)
def test_metrics_that_leave_their_range_or_fall_are_refused(
    function: Callable[[Tensor, Tensor], float], scale: Scale, told: str
) -> None:
    with pytest.raises(WorkloadError) as caught:
        check_metric(UserMetric("m:f", function, scale, is_clipped=scale != TOP1), GOOD, LABELS)
    assert "the metric m:f gave" in str(caught.value)
    assert told in str(caught.value)


def test_metrics_in_their_range_are_shares_to_a_search() -> None:
    def needing_all(logits: Tensor, labels: Tensor) -> float:
        raise ValueError("needs every class")

    for function in (top1, needing_all, lambda logits, labels: 0.25):
        check_metric(UserMetric("m:f", function), GOOD, LABELS)
    half = GOOD.clone()
    half[:30] = half[:30].roll(1, 1)
    for function, worst, best in ((percentage, 0, 100), (correlation, -1, 1), (error, 1, 0)):
        metric = UserMetric("m:f", function, Scale("m", worst, best), is_clipped=True)
        check_metric(metric, GOOD, LABELS)
        assert metric(half, LABELS) == 0.5
    loss = UserMetric("m:f", F.cross_entropy, Scale("loss", 2, 0), is_clipped=True)
    check_metric(loss, GOOD, LABELS)
    assert loss(100 * GOOD.roll(1, 1), LABELS) == 0  # as bad as a guess, and no worse
    assert 0.9 < loss(GOOD, LABELS) < 1


def test_a_result_out_of_range_is_refused_at_any_time() -> None:
    with pytest.raises(WorkloadError, match=r"the metric m:f gave -1; expected a result from 0 to 1; .*metric\.range"):
        UserMetric("m:f", correlation)(GOOD.roll(1, 1), LABELS)
    with pytest.raises(WorkloadError, match="the metric m:f gave 100; expected a result from 0 to 90; mend it"):
        UserMetric("m:f", percentage, Scale("a", 0, 90), is_clipped=True)(GOOD, LABELS)
    assert UserMetric("m:f", lambda logits, labels: 1 + 1e-9)(GOOD, LABELS) == 1


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

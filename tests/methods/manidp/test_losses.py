"""ManiDP's pure functions: losses, weights, thresholds and the schedule, against figures on paper and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from methods.manidp import instance_weights, mean_rank_threshold, similarity_loss
from methods.manidp.gates import active
from methods.manidp.losses import quantile_threshold, remain_rate, sparsity_loss

seeds = st.integers(0, 10**6)
rates = st.floats(0.01, 1.0)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Similarity


@given(seeds, st.integers(1, 9))
def test_similarity_agrees_with_a_plain_loop(seed: int, images: int) -> None:
    saliency, features = draws(seed, images, 5).abs(), draws(seed + 1, images, 3, 2, 2)

    def cosine(rows: np.ndarray, i: int, j: int) -> float:
        return float(rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])))

    left, right = (rows.double().flatten(1).numpy() for rows in (saliency, features))
    pairs = [(cosine(right, i, j) - cosine(left, i, j)) ** 2 for i in range(images) for j in range(images)]
    assert float(similarity_loss(saliency, features)) == pytest.approx(sum(pairs) / images**2, abs=1e-5)


@given(seeds)
def test_similarity_ignores_scale_and_order(seed: int) -> None:
    saliency, features = draws(seed, 6, 4).abs() + 0.1, draws(seed + 1, 6, 5)
    loss = float(similarity_loss(saliency, features))
    scales = draws(seed + 2, 6, 1).abs() + 0.1
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert float(similarity_loss(scales * saliency, features / scales)) == pytest.approx(loss, abs=1e-5)
    assert float(similarity_loss(saliency[order], features[order])) == pytest.approx(loss, abs=1e-5)
    assert float(similarity_loss(saliency, scales * saliency)) == pytest.approx(0, abs=1e-5)
    assert float(similarity_loss(saliency[:1], features[:1])) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-4])
def test_a_row_of_tiny_saliencies_has_a_small_gradient(size: float) -> None:
    saliency = torch.ones(4, 8)
    saliency[0] = size
    saliency.requires_grad_()
    similarity_loss(saliency, draws(0, 4, 6)).backward()  # type: ignore[no-untyped-call]
    assert saliency.grad is not None
    assert saliency.grad.isfinite().all()
    assert saliency.grad.abs().max() < 2000


def test_similarity_is_float32_under_autocast() -> None:
    saliency, features = draws(0, 32, 16).abs(), draws(1, 32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        under = similarity_loss(saliency, features)
    assert under.dtype == torch.float32
    assert torch.equal(under, similarity_loss(saliency, features))


# Sparsity and its weights


@given(seeds, st.floats(0.0, 5.0), st.floats(0.1, 2.0), st.floats(0.5, 3.0))
def test_weights_fall_from_one_to_nothing(seed: int, mean_loss: float, t: float, gamma: float) -> None:
    limit = max(t * mean_loss, 1e-3)
    losses = torch.cat([draws(seed, 20).abs() * limit, torch.tensor([0.0, limit, 2 * limit])])
    weights = instance_weights(losses, mean_loss, t=t, gamma=gamma)
    expected = [max(0.0, (limit - loss) / limit) ** gamma for loss in losses.double().tolist()]
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-3)
    assert weights[-3] == 1
    assert weights[-1] == 0
    order = losses.argsort()
    assert (weights[order].diff() <= 0).all()


def test_no_gradient_flows_through_the_weights() -> None:
    losses = torch.rand(5, requires_grad=True)
    assert not instance_weights(losses, 1.0, t=0.5, gamma=1.0).requires_grad


def test_only_easy_images_are_pushed_to_be_sparse() -> None:
    saliency = torch.ones(3, 4, requires_grad=True)
    weights = instance_weights(torch.tensor([0.0, 0.5, 9.0]), 2.0, t=0.5, gamma=1.0)
    sparsity_loss(saliency, weights).backward()  # type: ignore[no-untyped-call]
    assert saliency.grad is not None
    torch.testing.assert_close(saliency.grad, torch.tensor([[1 / 12], [1 / 24], [0.0]]).expand(3, 4))


# Thresholds


def slow_rank(count: int, rate: float) -> int:
    """The ceiling with a guard, in exact decimals."""
    return next(rank for rank in range(1, count + 1) if rank >= round(rate * count, 9))


@given(seeds, st.integers(1, 200), rates)
def test_mean_rank_is_an_entry_of_the_right_rank(seed: int, channels: int, rate: float) -> None:
    mean = draws(seed, channels).abs()
    threshold = mean_rank_threshold(mean, rate)
    assert threshold == sorted(mean.tolist(), reverse=True)[slow_rank(channels, rate) - 1]


def test_mean_rank_on_paper() -> None:
    mean = torch.arange(1.0, 101.0)
    assert mean_rank_threshold(mean, 0.55) == 46  # 0.55 x 100 is a little over 55 in floats
    assert mean_rank_threshold(mean, 1.0) == 1
    assert mean_rank_threshold(mean, 1e-9) == 100
    assert mean_rank_threshold(torch.tensor([2.0, 2.0, 1.0]), 1 / 3) == 2


@given(seeds, st.integers(1, 20), st.integers(1, 30), rates)
def test_quantiles_realise_the_rate_on_their_batch(seed: int, images: int, channels: int, rate: float) -> None:
    saliency = draws(seed, images, channels).abs()
    assume(len(set(saliency.flatten().tolist())) == saliency.numel())
    kept = active(saliency, quantile_threshold(saliency, rate))
    others = images * (channels - 1)
    assert int(kept.sum()) == images + (slow_rank(others, rate) if others else 0)
    assert rate <= float(kept.double().mean()) <= rate + 1 / channels + 1 / (images * channels)
    assert (active(saliency, quantile_threshold(saliency, 0.0)).sum(1) == 1).all()
    assert active(saliency, quantile_threshold(saliency, 1.0)).all()


@pytest.mark.parametrize("rate", [-0.5, 1.01, math.nan])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    for threshold in (mean_rank_threshold, quantile_threshold):
        with pytest.raises(ValueError, match=r"the remain rate is .*, expected a share of 1"):
            threshold(torch.rand(4, 1), rate)


# Schedule


@given(st.floats(0.05, 1.0), st.floats(0.0, 0.9))
def test_the_rate_falls_from_one_and_is_held(final: float, hold: float) -> None:
    found = [remain_rate(progress, final, hold) for progress in np.linspace(0, 1, 101)]
    assert found[0] == pytest.approx(1)
    assert found == sorted(found, reverse=True)
    assert remain_rate(1 - hold, final, hold) == pytest.approx(final)
    assert found[-1] == pytest.approx(final)
    assert remain_rate((1 - hold) / 2, final, hold) == pytest.approx((1 + final) / 2)

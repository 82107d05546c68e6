"""ManiDP's losses, thresholds and schedule as pure functions of saliencies, features and losses.

Symbols: pi is the saliency `(n, C)` that a gate gives to each of a convolution's `C` output channels for each of `n`
images, theta the threshold below which a channel is skipped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_NORM = 1e-3
"""Rows are normalised by at least this, which bounds the gradient of a row of zeros."""

SMALLEST_LOSS = 1e-3
"""Least limit below which images count as easy."""


def similarity_loss(saliency: Tensor, features: Tensor) -> Tensor:
    """The distance of images alike in features from being alike in saliency: `||R - T||_F^2 / n^2`, in float32.

    `T` and `R` `(n, n)` are the cosines between the rows of `saliency` `(n, C)` and of `features` `(n, ...)`, which
    are flattened. 0 for equal or rescaled rows, and for one image, if no row is shorter than 1e-3.

    Source: ManiDP, the similarity (graph) loss of the authors' code. Differs: norms are floored at 1e-3, not 1e-12,
    since a row of tiny saliencies otherwise has gradients of 1e13; bfloat16 is not used.

    >>> similarity_loss(torch.eye(2), torch.tensor([[3.0, 0.0], [5.0, 0.0]]))
    tensor(0.5000)
    """
    with torch.autocast(saliency.device.type, enabled=False):
        return (_cosines(features) - _cosines(saliency)).square().mean()


def _cosines(rows: Tensor) -> Tensor:
    directions = F.normalize(rows.float().flatten(1), dim=1, eps=SMALLEST_NORM)
    return directions @ directions.T


def instance_weights(losses: Tensor, mean_loss: float, *, t: float, gamma: float) -> Tensor:
    """The push of each image `(n,)` to use few channels: `max(0, (C - L_i) / C) ** gamma`, `C = t L`.

    `losses` are `L_i`, `mean_loss` is `L`, of past steps; `C` is at least 1e-3. An image fitted perfectly has weight 1,
    one whose loss reaches `C` has 0. Higher `gamma` > 0 spares the images in between.

    Source: ManiDP, the complexity-dependent weights of the authors' code. Differs: no gradient flows through them,
    because it would reward raising the loss of easy images.

    >>> instance_weights(torch.tensor([0.0, 0.5, 3.0]), 2.0, t=0.5, gamma=2.0).tolist()
    [1.0, 0.25, 0.0]
    """
    limit = max(t * mean_loss, SMALLEST_LOSS)
    return ((limit - losses.detach().float()) / limit).clamp(min=0) ** gamma


def sparsity_loss(saliency: Tensor, weights: Tensor) -> Tensor:
    """The mean over images of `weights` `(n,)` times the mean saliency of the image's channels, `saliency` `(n, C)`.

    Source: ManiDP, the "lasso" of the authors' code: a mean, so that a layer's width does not matter.

    >>> float(sparsity_loss(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([0.5, 0.0])))
    0.5
    """
    return (weights * saliency.float().mean(1)).mean()


def mean_rank_threshold(mean_saliency: Tensor, remain_rate: float) -> float:
    """The threshold of the authors: the `ceil(remain_rate C)`-th largest of the mean saliencies `(C,)`.

    Raises:
        ValueError: the rate is not in (0, 1], or there is no saliency.

    Source: ManiDP, the authors' code. Differs: a product like 0.55 x 100 = 55.00000000000001 counts as 55.

    >>> mean_rank_threshold(torch.arange(100.0), 0.55)
    45.0
    """
    _check_rate(remain_rate, 0 < remain_rate <= 1)
    if not len(mean_saliency):
        raise ValueError("the mean saliencies are empty, expected one per channel; pass those of a gate")
    rank = max(1, _ceil(remain_rate * len(mean_saliency)))
    return float(mean_saliency.sort(descending=True).values[rank - 1])


def quantile_threshold(saliency: Tensor, remain_rate: float) -> Tensor:
    """The threshold, a scalar, that the share `remain_rate` of saliencies `(n, C)` reaches, each image's best aside.

    The best channel of an image is active anyway, so the realised share of active channels exceeds the rate by less
    than 1 / C. The threshold lies half-way to the next smaller saliency, so that rounding does not decide who is kept.

    Raises:
        ValueError: the rate is not in [0, 1].

    Source: none; unlike ranks of means, quantiles make the realised share of active channels the wanted one.

    >>> float(quantile_threshold(torch.tensor([[4.0, 2.0, 0.0], [1.0, 9.0, 0.5]]), 0.5))
    0.75
    """
    _check_rate(remain_rate, 0 <= remain_rate <= 1)
    values = beside_the_best(saliency.detach().float()).flatten().sort(descending=True).values
    return between(values, _ceil(remain_rate * len(saliency) * (saliency.shape[1] - 1)))


def beside_the_best(saliency: Tensor) -> Tensor:
    """The saliencies `(n, C)` with the largest of each row, the first of equals, set to 0."""
    return saliency.scatter(1, saliency.argmax(1, keepdim=True), 0.0)


def between(values: Tensor, count: int) -> Tensor:
    """The threshold that the first `count` of falling `values` reach; above all of them for a count of 0."""
    if count == 0:
        return values[0] + 1
    return (values[count - 1] + values[min(count, len(values) - 1)]) / 2


def _ceil(product: float) -> int:
    """The ceiling, with a guard against products just above an integer."""
    return math.ceil(product * (1 - 1e-12))


def _check_rate(rate: float, is_valid: bool) -> None:
    if not is_valid:
        raise ValueError(f"the remain rate is {rate}, expected a share of 1; convert a sparsity to 1 - it")


def remain_rate(progress: float, final: float, hold: float) -> float:
    """The remain rate at `progress` in [0, 1] of training: a half cosine from 1 to `final`, held over the last `hold`.

    Source: ManiDP, the authors' code, where `hold` is 0 and the last threshold is never trained with.

    >>> [round(remain_rate(step / 10, 0.5, hold=0.4), 3) for step in (0, 3, 6, 10)]
    [1.0, 0.75, 0.5, 0.5]
    """
    done = min(1.0, progress / (1 - hold)) if hold < 1 else 1.0
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

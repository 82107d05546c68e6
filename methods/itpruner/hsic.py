"""The extent to which channel groups of a network repeat each other: normalised HSIC (linear CKA), exact over batches.

A batch turns every group's activation into a centred Gram matrix and keeps only the inner products of those matrices.
Inner products of batches are averaged first and divided once at the end, so many small batches estimate one ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from methods.base import ScoreError

SMALLEST_BATCH = 4
"""The debiased estimator divides by `n - 3`."""

_ROUNDING = 1e-12
"""Float32 rounding leaves constant features centred energy below this share of the whole."""


def nhsic(features: Sequence[Tensor], *, unbiased: bool = True) -> Tensor:
    """Normalised HSIC with a linear kernel between every two feature sets, `(L, L)` float64, diagonal 1.

    A feature set that does not vary (a dead layer) depends on nothing, itself included: its row, column and diagonal
    are 0. Debiased values have mean 0 for independent features and may be slightly negative; biased ones lie in
    `[0, 1]` but approach 1 for any features of many more dimensions than samples.

    Args:
        features: `L` tensors `(n, d...)` of the same n samples, flattened to `(n, d)`; d may differ.
        unbiased: the U-centred estimator (needs n >= 4); else the double-centred one.

    Raises:
        ValueError: feature sets disagree on n, or n is under 4 and `unbiased`.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), eq. 2-4; debiased form: Nguyen et al. 2021 (arXiv 2010.15327),
        eq. 3. ITPruner, arXiv 2108.08532, ranks layers by it.
    Differs: ITPruner's code uses the biased form on one batch in train mode; there wide layers all look alike.

    >>> x = torch.tensor([[1.0], [2.0], [4.0], [8.0], [9.0]])
    >>> nhsic([x, -3 * x + 1])
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    return ratio(hsic([centred_gram(feature, unbiased=unbiased) for feature in features], unbiased=unbiased))


def centred_gram(features: Tensor, *, unbiased: bool = True) -> Tensor:
    """The centred Gram matrix `(n, n)`, float64, of features `(n, d...)`; all 0 if they do not vary.

    The product is taken in the features' own precision after subtracting each feature's mean, since a large mean
    would swallow float32's digits; centring the matrix itself is in float64.

    Raises:
        ValueError: n is under 4 and `unbiased`.
    """
    n = features.shape[0]
    if unbiased and n < SMALLEST_BATCH:
        raise ValueError(f"debiased HSIC of {n} samples; it needs at least {SMALLEST_BATCH}: pass more samples")
    flat = features.reshape(n, -1)
    centred = flat - flat.mean(0)
    if centred.square().sum() <= _ROUNDING * flat.square().sum():
        return torch.zeros(n, n, dtype=torch.float64, device=features.device)
    gram = (centred @ centred.T).double()
    return _u_centre(gram) if unbiased else gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _u_centre(gram: Tensor) -> Tensor:
    """Székely and Rizzo's U-centring: off the diagonal every row and column sums to 0; the diagonal is 0."""
    n = len(gram)
    gram = gram - torch.diag(gram.diagonal())
    rows = gram.sum(1) / (n - 2)
    rows = rows - gram.sum() / (2 * (n - 1) * (n - 2))
    gram = gram - rows[:, None] - rows[None, :]
    return gram - torch.diag(gram.diagonal())


def hsic(grams: Sequence[Tensor], *, unbiased: bool = True) -> Tensor:
    """HSIC of every two centred Gram matrices `(n, n)`, as `(L, L)` float64."""
    sizes = {len(gram) for gram in grams}
    if len(sizes) != 1:
        raise ValueError(f"HSIC of feature sets with {sorted(sizes)} samples; all must hold the same samples")
    n = sizes.pop()
    rows = torch.stack([gram.flatten() for gram in grams])
    return rows @ rows.T / (n * (n - 3) if unbiased else max(1, n - 1) ** 2)


def ratio(hsic: Tensor) -> Tensor:
    """HSIC `(L, L)` divided by the geometric mean of the two diagonal entries; 0 where one of them is 0."""
    scale = hsic.diagonal().sqrt()
    alive = scale > 0
    scale = torch.where(alive, scale, 1.0)
    normal = hsic / torch.outer(scale, scale)
    return normal - torch.diag(normal.diagonal() - alive.double())


def merge_batches(partials: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """The mean of every batch's HSIC matrix, `(L, L)` float64, bit for bit the same for any order of `partials`.

    Each partial holds `batch` (its id), `batches` (how many there are) and `hsic` `(L, L)`. `math.fsum` rounds each
    sum once, correctly, so neither order nor grouping can show.

    Raises:
        ScoreError: a batch is missing or there twice.

    Source: Nguyen et al. 2021, section 3: average HSIC over minibatches, never the ratio.
    """
    ids = sorted(int(partial["batch"]) for partial in partials)
    expected = int(partials[0]["batches"]) if partials else 1
    if ids != list(range(expected)):
        raise ScoreError(f"merging batches {ids}; expected each of 0 to {expected - 1} once: score what is missing")
    stacked = np.stack([partial["hsic"] for partial in partials])
    sums = [math.fsum(column) for column in stacked.reshape(len(ids), -1).T]
    return np.array(sums).reshape(stacked.shape[1:]) / len(ids)

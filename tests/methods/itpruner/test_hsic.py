"""Normalised HSIC: its invariances, numbers on paper, an obvious second implementation, and the exact merge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.base import ScoreError
from methods.itpruner.hsic import centred_gram, hsic, merge_batches, nhsic, ratio

seeds = st.integers(0, 2**32 - 1)
either = pytest.mark.parametrize("unbiased", [True, False])


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_orthogonal_features_have_the_similarity_worked_out_by_hand() -> None:
    # Both kernels hold only +-1 and agree in half their entries, so their inner product is 0.
    pairs, halves = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert torch.equal(nhsic([pairs, halves], unbiased=False), torch.eye(2, dtype=torch.float64))
    # With a and b side by side: <aa', aa' + bb'> / (|aa'| |aa' + bb'|) = 16 / (4 sqrt 32).
    both = torch.cat([pairs, halves], 1)
    assert nhsic([pairs, both], unbiased=False)[0, 1].item() == pytest.approx(1 / math.sqrt(2))


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(4, 7))
def test_debiased_hsic_is_the_mean_over_quadruples_of_distinct_samples(seed: int, n: int) -> None:
    one, two = drawn(seed, (n, 3), (n, 2))
    k, m = one @ one.T, two @ two.T
    terms = []
    for a, b, c, d in itertools.permutations(range(n), 4):
        terms.append((k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c])).item())
    found = hsic([centred_gram(one), centred_gram(two)])
    assert found[0, 1].item() == pytest.approx(math.fsum(terms) / len(terms), rel=1e-9, abs=1e-12)


@either
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_similarity_ignores_rotation_scale_shift_and_the_order_of_samples(unbiased: bool, seed: int) -> None:
    one, two, mix, shift = drawn(seed, (9, 5), (9, 4), (5, 5), (5,))
    rotation, _ = torch.linalg.qr(mix)
    expected = nhsic([one, two], unbiased=unbiased)
    for changed in (one @ rotation, 1e-3 * one, -7.0 * one, one + shift):
        torch.testing.assert_close(nhsic([changed, two], unbiased=unbiased), expected)
    torch.testing.assert_close(nhsic([one.flip(0), two.flip(0)], unbiased=unbiased), expected)
    torch.testing.assert_close(expected, expected.T, rtol=0, atol=1e-15)
    torch.testing.assert_close(expected.diagonal(), torch.ones(2, dtype=torch.float64))
    assert expected.abs().max() <= 1 + 1e-12
    assert unbiased or expected.min() >= 0


@either
def test_stretching_one_axis_changes_similarity(unbiased: bool) -> None:
    one, two = drawn(0, (20, 3), (20, 3))
    two = two + one
    stretched = one * torch.tensor([10.0, 1.0, 1.0])
    assert abs(nhsic([one, two], unbiased=unbiased) - nhsic([stretched, two], unbiased=unbiased)).max() > 0.05


def test_duplicated_samples_leave_the_biased_form_unchanged() -> None:
    features = drawn(3, (8, 4), (8, 6))
    doubled = [torch.cat([feature, feature]) for feature in features]
    torch.testing.assert_close(nhsic(doubled, unbiased=False), nhsic(features, unbiased=False))


@pytest.mark.parametrize("width", [100, 1000, 10000])
def test_only_the_debiased_form_sees_that_wide_features_are_independent(width: int) -> None:
    features = [feature.float() for feature in drawn(width, (100, width), (100, width))]
    assert abs(nhsic(features)[0, 1]) < 0.05
    assert nhsic(features, unbiased=False)[0, 1] > 0.4


def test_a_large_mean_costs_no_digits() -> None:
    one, two = drawn(1, (32, 200), (32, 50))
    two = two + one[:, :50]
    exact = nhsic([one, two])
    shifted = nhsic([(one + 30).float(), (two + 30).float()])
    torch.testing.assert_close(shifted, exact, atol=2e-6, rtol=0)


@either
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
def test_features_that_do_not_vary_depend_on_nothing(unbiased: bool, constant: float) -> None:
    alive, *_ = drawn(5, (6, 2))
    found = nhsic([alive, torch.full((6, 3), constant)], unbiased=unbiased)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_a_small_but_varying_layer_is_not_dead() -> None:
    one, two = drawn(6, (16, 4), (16, 4))
    torch.testing.assert_close(nhsic([one * 1e-8, two * 1e6]), nhsic([one, two]))


def test_too_few_or_unequal_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 samples; it needs at least 4"):
        nhsic([torch.randn(3, 2)])
    with pytest.raises(ValueError, match=r"\[5, 6\] samples"):
        nhsic([torch.randn(5, 2), torch.randn(6, 2)])


def partial(batch: int, batches: int, matrix: np.ndarray) -> Mapping[str, np.ndarray]:
    return {"batch": np.array(batch), "batches": np.array(batches), "hsic": matrix}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e12, 1e12), min_size=4, max_size=4), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_merging_in_any_order_gives_the_correctly_rounded_mean(values: list[list[float]], random: object) -> None:
    partials = [partial(i, len(values), np.array(row).reshape(2, 2)) for i, row in enumerate(values)]
    shuffled = list(partials)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    merged = merge_batches(partials)
    assert merged.tobytes() == merge_batches(shuffled).tobytes()
    assert merged[0, 1] == math.fsum(row[1] for row in values) / len(values)


def test_batches_estimate_what_all_samples_do() -> None:
    one, two = drawn(8, (1024, 12), (1024, 12))
    two = 0.5 * one + two
    batches = [
        partial(b, 16, hsic([centred_gram(f[64 * b : 64 * b + 64]) for f in (one, two)]).numpy()) for b in range(16)
    ]
    averaged = ratio(torch.from_numpy(merge_batches(batches)))
    everything = nhsic([one, two])[0, 1]
    one_biased = nhsic([one[:64], two[:64]], unbiased=False)[0, 1]
    assert abs(averaged[0, 1] - everything) < 0.02 < abs(one_biased - everything)


@pytest.mark.parametrize("ids", [[], [0, 2], [0, 1, 1], [0, 1, 3]])
def test_a_missing_or_repeated_batch_is_refused(ids: list[int]) -> None:
    with pytest.raises(ScoreError, match="expected each of 0 to"):
        merge_batches([partial(i, 3, np.eye(2)) for i in ids])

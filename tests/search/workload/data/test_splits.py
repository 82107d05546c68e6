"""Splits: their laws, their fingerprint, and the data that no split takes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.base import DataError
from search.workload.data.samples import Arrays, Indexed
from search.workload.data.splits import check_stable, split
from tests.search.workload.numbered import numbered, numbers, parted


@given(st.integers(4, 200), st.floats(0.05, 0.3), st.integers(1, 300), st.booleans(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_splits_share_nothing_and_lose_nothing(
    count: int, validation: float, calibration: int, has_test: bool, seed: int
) -> None:
    found = split(
        numbered(count), numbered(7) if has_test else None, validation=validation, calibration=calibration, seed=seed
    )
    held = max(1, round(count * validation))
    train, chosen, test = numbers(found.train), numbers(found.validation), numbers(found.test)
    assert len(chosen) == held
    if has_test:
        assert test == list(range(7))
        assert sorted(train + chosen) == list(range(count))
    else:
        assert len(test) == held
        assert sorted(train + chosen + test) == list(range(count))
    sample = [int(value) for value in found.calibration.flatten()]
    assert len(sample) == min(calibration, len(train))
    assert set(sample) <= set(train)
    assert len(set(sample)) == len(sample)


def test_the_seed_decides_the_split_and_nothing_else_does() -> None:
    first, again, other = (parted(numbered(50), seed=seed) for seed in (1, 1, 2))
    for part in ("train", "validation", "test"):
        assert numbers(getattr(first, part)) == numbers(getattr(again, part))
    assert np.array_equal(first.calibration, again.calibration)
    assert numbers(first.validation) != numbers(other.validation)


def test_the_fingerprint_changes_with_anything_that_counts() -> None:
    pool = numbered(40)
    relabelled, repainted = pool.labels.copy(), pool.images.copy()
    found = parted(pool)
    spare = next(number for number in numbers(found.train) if number not in found.calibration)
    relabelled[spare] += 1
    repainted[spare] += 0.5
    prints = [
        parted(pool),
        parted(pool, seed=1),
        parted(pool, validation=0.3),
        parted(pool, numbered(8)),
        parted(pool, calibration=6),
        parted(Arrays(pool.images, relabelled)),
        parted(Arrays(repainted, pool.labels)),
        parted(Arrays(pool.images, pool.labels, std=2.0)),
    ]
    assert len({found.fingerprint for found in prints}) == len(prints)
    assert parted(numbered(40)).fingerprint == prints[0].fingerprint


def test_classes_are_counted_from_the_labels() -> None:
    assert parted(numbered(40, classes=7)).classes == 7


@pytest.mark.parametrize(
    ("count", "test", "validation", "name"),
    [
        (1, 3, 0.5, "train"),
        (0, 3, 0.5, "train"),
        (2, None, 0.5, "train"),
        (9, 0, 0.5, "test"),
        (10, None, 0.95, "train"),
    ],
)
def test_an_empty_split_is_refused(count: int, test: int | None, validation: float, name: str) -> None:
    with pytest.raises(DataError) as caught:
        parted(numbered(count), None if test is None else numbered(test), validation=validation)
    assert str(caught.value).startswith(
        f"the {name} split is empty: {count} images with data.validation = {validation}"
    )
    assert "expected at least one image in every split; add images or change data.validation" in str(caught.value)


def test_wrong_labels_and_shapes_are_refused() -> None:
    pool = numbered(20)
    with pytest.raises(DataError, match="a label is -1; expected classes counted from 0; renumber"):
        parted(Arrays(pool.images, pool.labels - 1))
    for label in (-1, 3):
        test = Arrays(pool.images, np.where(pool.labels == 1, label, pool.labels))
        told = rf"the test set has the label {label}; expected 0 to 2, as in training; number both"
        with pytest.raises(DataError, match=told):
            parted(pool, test)
    assert parted(pool, Arrays(pool.images, np.full(20, 2))).classes == 3
    huge = Arrays(pool.images, np.where(pool.labels == 1, 10**9, pool.labels))
    with pytest.raises(
        DataError, match=r"a label is 1000000000; expected classes counted from 0, and at most 1,000,000"
    ):
        parted(huge)
    gap = Arrays(pool.images, np.where(pool.labels == 1, 4, pool.labels))
    assert parted(gap, pool).classes == 5

    wide = Arrays(np.zeros((4, 1, 1, 2), dtype=np.float32), np.zeros(4, dtype=np.int64))
    with pytest.raises(
        DataError, match=r"training images are \(1, 1, 1\), test images \(1, 1, 2\); expected one shape"
    ):
        parted(pool, wide)


def test_classes_without_images_are_told(caplog: pytest.LogCaptureFixture) -> None:
    pool = numbered(20)
    assert parted(Arrays(pool.images, pool.labels + 1)).classes == 4
    assert "no image has the label 0, of labels up to 3; they seem to begin at 1: subtract 1 if so" in caplog.text
    assert parted(Arrays(pool.images, pool.labels * 2)).classes == 5
    assert "no image has the label 1, 3, of labels up to 4" in caplog.text
    parted(Arrays(pool.images, pool.labels * 2), Arrays(pool.images, pool.labels))
    assert "the test set has the label 1, which no training image has" in caplog.text


def test_a_test_set_is_read_whole_before_anything_is_trained() -> None:
    pool = numbered(20)
    pairs = [(torch.zeros(1, 1, 1), 0) for _ in range(300)]
    for bad, told in (
        ((torch.full((1, 1, 1), torch.nan), 0), "image 299 of the data set holds NaN"),
        ((torch.zeros(1, 1, 1), 3), "the test set has the label 3"),
        ((torch.zeros(1, 2, 1), 0), r"have the shapes \(1, 1, 1\) and \(1, 2, 1\)"),
    ):
        with pytest.raises(DataError, match=told):
            parted(pool, Indexed([*pairs[:299], bad]))


class Drawing:
    """Ten images that chance changes: by the global generators, or by one of its own."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self._draw = draw

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 1, 1), self._draw()), index % 2


def test_a_set_that_augments_by_chance_is_the_same_each_time(caplog: pytest.LogCaptureFixture) -> None:
    for draw in (random.random, np.random.random, lambda: float(torch.rand(()))):
        caplog.clear()
        check_stable(Indexed(Drawing(draw)))
        assert "changes its images by chance: validation and scoring see each changed in one fixed way" in caplog.text
        before = random.random(), np.random.random(), float(torch.rand(()))
        assert parted(Indexed(Drawing(draw))).fingerprint == parted(Indexed(Drawing(draw))).fingerprint
        assert before != (random.random(), np.random.random(), float(torch.rand(())))
        samples = Indexed(Drawing(draw))
        one, two, other = (samples.batch(np.arange(3), np.random.default_rng(seed))[0] for seed in (0, 0, 1))
        assert torch.equal(one, two)
        assert not torch.equal(one, other)
    own = np.random.default_rng(0)
    with pytest.raises(DataError, match="the data set is not stable: an item read twice gave two different images"):
        check_stable(Indexed(Drawing(own.random)))
    caplog.clear()
    check_stable(Indexed([(torch.zeros(1, 1, 1), 0)] * 9))
    assert not caplog.text

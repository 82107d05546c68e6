"""Splits: their laws, their fingerprint, and the data that no split takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.base import DataError
from search.workload.samples import Arrays
from search.workload.splits import split
from tests.support.numbered import numbered, numbers, parted


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
    wide = Arrays(np.zeros((4, 1, 1, 2), dtype=np.float32), np.zeros(4, dtype=np.int64))
    with pytest.raises(
        DataError, match=r"training images are \(1, 1, 1\), test images \(1, 1, 2\); expected one shape"
    ):
        parted(pool, wide)

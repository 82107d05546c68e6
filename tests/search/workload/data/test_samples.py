"""Samples: plain and augmented batches of images in memory and of pictures in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from search.workload.data.pictures import Preparation
from search.workload.data.samples import Arrays, Pictures, Subset
from tests.search.workload.numbered import numbered, numbers


def test_a_plain_batch_is_the_normalised_image() -> None:
    images = np.array([[[[0, 100], [200, 255]]], [[[1, 2], [3, 4]]]], dtype=np.uint8)
    samples = Arrays(images, np.array([5, 6]), scale=1 / 255, mean=0.25, std=0.5, shift=1, mirror=True)
    inputs, labels = samples.batch(np.array([1, 0]))
    assert inputs.dtype == torch.float32
    assert labels.tolist() == [6, 5]
    for image, rows in ((inputs[0], [[1, 2], [3, 4]]), (inputs[1], [[0, 100], [200, 255]])):
        expected = [[(value / 255 - 0.25) / 0.5 for value in row] for row in rows]
        assert torch.allclose(image, torch.tensor([expected]))
    assert images[0, 0, 1, 1] == 255


def moved(image: list[list[int]], down: int, right: int, *, is_mirrored: bool) -> tuple[tuple[int, ...], ...]:
    """The slow, obvious shift: pixel by pixel, zeros come in."""
    height, width = len(image), len(image[0])
    result = [[0] * width for _ in range(height)]
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                result[row + down][column + right] = image[row][column]
    return tuple(tuple(row[::-1] if is_mirrored else row) for row in result)


@pytest.mark.parametrize("mirror", [False, True])
def test_augmented_images_are_every_shift_and_mirror_and_no_other(mirror: bool) -> None:
    image = [[1, 2, 3], [4, 5, 6]]
    samples = Arrays(
        np.array([[image]], dtype=np.uint8), np.zeros(1, dtype=np.int64), shift=1, mirror=mirror, scale=1.0
    )
    inputs, _ = samples.batch(np.zeros(2000, dtype=np.int64), np.random.default_rng(0))
    seen = {tuple(tuple(int(value) for value in row) for row in one[0]) for one in inputs}
    steps = (-1, 0, 1)
    flips = (False, True) if mirror else (False,)
    assert seen == {moved(image, down, right, is_mirrored=flip) for down in steps for right in steps for flip in flips}


@given(st.integers(0, 3), st.booleans(), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_augmentation_is_a_pure_function_of_its_generator(shift: int, mirror: bool, channels: int, seed: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, channels, 5, 4)).astype(np.uint8)
    before = images.copy()
    samples = Arrays(images, np.arange(6), shift=shift, mirror=mirror)
    order = np.array([3, 3, 0, 5])
    first, labels = samples.batch(order, np.random.default_rng(seed))
    again, _ = samples.batch(order, np.random.default_rng(seed))
    assert torch.equal(first, again)
    assert first.shape == (4, channels, 5, 4)
    assert labels.tolist() == [3, 3, 0, 5]
    assert np.array_equal(images, before)
    if shift == 0 and not mirror:
        assert torch.equal(first, samples.batch(order)[0])


def test_the_channels_of_an_image_move_together() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 1, 6, 6)).astype(np.uint8)
    samples = Arrays(np.concatenate([grey, grey], 1), np.zeros(8, dtype=np.int64), shift=2, mirror=True)
    inputs, _ = samples.batch(np.arange(8), np.random.default_rng(1))
    assert torch.equal(inputs[:, 0], inputs[:, 1])


def test_a_subset_reads_its_own_positions() -> None:
    assert numbers(Subset(numbered(10), np.array([7, 2, 9]))) == [7, 2, 9]


def test_augmented_pictures_follow_their_generator(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    samples = Pictures((str(tmp_path / "noise.png"),) * 3, np.zeros(3, dtype=np.int64), Preparation(12))
    first, again, other = (samples.batch(np.arange(3), np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    plain, _ = samples.batch(np.arange(3))
    assert torch.equal(plain[0], plain[1])
    assert first.shape == plain.shape == (3, 3, 12, 12)

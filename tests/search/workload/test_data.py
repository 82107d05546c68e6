"""Data: what can be read, how it is split and augmented, and what is refused with a reason."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from methods.training import Samples
from search.base import DataError
from search.workload import sources
from search.workload.samples import Arrays, Indexed, Pictures, Subset
from search.workload.sources import from_factory
from search.workload.splits import Splits, split


def numbered(count: int, *, classes: int = 3) -> Arrays:
    """Images of one pixel that holds the image's own number, so that a batch says which images it is made of."""
    return Arrays(np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1), np.arange(count) % classes)


def numbers(samples: Samples) -> list[int]:
    return [int(value) for value in samples.batch(np.arange(len(samples)))[0].flatten()]


def parted(pool: Samples, test: Samples | None = None, **changes: Any) -> Splits:
    return split(pool, test, **({"validation": 0.2, "calibration": 5, "seed": 0} | changes))


class Pairs:
    """A map-style data set of `(image, label)`, read one by one."""

    def __init__(self, *pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def pairs(count: int) -> list[tuple[Tensor, int]]:
    return [(torch.full((1, 2, 2), float(index)), index % 3) for index in range(count)]


# Splits


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


# Batches and augmentation


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


# Factories


def test_every_kind_of_factory_result_is_read() -> None:
    arrays = {"images": np.ones((4, 1, 2, 2), dtype=np.float64), "labels": np.array([0, 1, 2, 0], dtype=np.int32)}
    tensors = {"images": torch.ones(4, 1, 2, 2), "labels": torch.tensor([0, 1, 2, 0])}
    lazy = Pairs(*[(np.ones((1, 2, 2)), np.int64(label)) for label in (0, 1, 2, 0)])
    for made in (arrays, tensors, lazy, pairs(4)):
        train, test = from_factory(made)
        assert test is None
        inputs, labels = train.batch(np.array([1, 2]))
        assert (inputs.dtype, tuple(inputs.shape)) == (torch.float32, (2, 1, 2, 2))
        assert (labels.dtype, labels.tolist()) == (torch.int64, [1, 2])
    train, test = from_factory((arrays, lazy))
    assert test is not None
    assert (len(train), len(test)) == (4, 4)
    assert torch.equal(train.batch(np.array([3]))[0], test.batch(np.array([3]))[0])


def test_tensors_that_take_part_in_training_are_read() -> None:
    images, labels = torch.rand(9, 1, 2, 2, requires_grad=True) * 2, torch.arange(9) % 3
    for made in ({"images": images, "labels": labels}, list(zip(images, labels.tolist(), strict=True))):
        found = parted(from_factory(made)[0])
        inputs, _ = found.train.batch(np.arange(len(found.train)))
        assert not inputs.requires_grad
        assert found.calibration.shape == (5, 1, 2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu_are_read() -> None:
    images, labels = torch.rand(9, 1, 2, 2, device="cuda"), torch.arange(9, device="cuda") % 3
    for made in ({"images": images, "labels": labels}, list(zip(images, labels, strict=True))):
        assert parted(from_factory(made)[0]).calibration.shape == (5, 1, 2, 2)


def test_what_is_no_data_set_is_refused() -> None:
    images, labels = np.ones((4, 1, 2, 2)), np.arange(4)
    for made, told in (
        (None, "returned NoneType"),
        (iter(pairs(3)), "returned list_iterator"),
        ((images, labels), "returned ndarray"),
        ({"x": images, "y": labels}, "returned dict"),
        ("train", "returned str"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            from_factory(made)
        assert "expected a torch dataset" in str(caught.value)
        assert "return one of these, or a pair (train, test) of them" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (np.ones((4, 2, 2)), np.arange(4), r"images \(4, 2, 2\) and labels \(4,\); expected \(n, c, h, w\) and \(n,\)"),
        (np.ones((4, 1, 2, 2)), np.arange(5), r"labels \(5,\)"),
        (np.ones((4, 1, 2, 2)), np.eye(4), r"labels \(4, 4\)"),
        (np.ones((4, 1, 2, 2)), np.arange(4) / 2, "labels of float64; expected real numbers and integers; convert"),
        (np.full((4, 1, 2, 2), "a"), np.arange(4), "images of <U1"),
        (np.ones((4, 1, 2, 2), dtype=np.complex64), np.arange(4), "images of complex64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images: np.ndarray, labels: np.ndarray, told: str) -> None:
    with pytest.raises(DataError, match=told):
        from_factory({"images": images, "labels": labels})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    images = np.ones((4, 1, 2, 2), dtype=np.float32)
    images[2, 0, 0] = value
    with pytest.raises(DataError, match=r"2 pixels .* are NaN or infinite; expected finite values; clean the data"):
        from_factory({"images": images, "labels": np.arange(4)})
    lazy, _ = from_factory(Pairs(*[(image, 0) for image in images]))
    with pytest.raises(DataError, match=r"image 2 .* holds NaN or infinity; expected finite pixels .*; clean the data"):
        parted(lazy)


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (torch.ones(1, 2, 2), "item 0 of the data set raised ValueError"),
        (("cat.png", 0), "item 0 of the data set raised"),
        ((torch.ones(1, 2, 2), 0.5), "raised TypeError"),
        ((torch.ones(2, 2), 0), r"image 0 of the data set has shape \(2, 2\); expected"),
        ((torch.ones(1, 2, 3), 0), r"the shapes \(1, 2, 2\) and \(1, 2, 3\); expected one shape"),
    ],
)
def test_items_that_are_no_pairs_are_refused(item: object, told: str) -> None:
    lazy, _ = from_factory(Pairs(item, *pairs(9)))
    with pytest.raises(DataError, match=told) as caught:
        parted(lazy, calibration=9)
    assert "the data set" in str(caught.value).rpartition(";")[2]


def test_a_set_that_raises_names_the_item() -> None:
    short = Pairs(*pairs(5))
    short.__class__ = type("Longer", (Pairs,), {"__len__": lambda self: 8})
    with pytest.raises(DataError, match=r"item [567] of the data set raised IndexError"):
        parted(Indexed(short))


# Built-in sets and folders


def test_digits() -> None:
    pool, test = sources.digits()
    assert (len(pool), test) == (1797, None)
    inputs, labels = pool.batch(np.arange(1797))
    assert inputs.shape == (1797, 1, 8, 8)
    assert abs(float(inputs.mean())) < 0.01
    assert abs(float(inputs.std()) - 1) < 0.01
    assert labels.unique().tolist() == list(range(10))


def write_idx(path: Path, array: np.ndarray, *, packed: bool) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    content = header + array.tobytes()
    place = path.with_name(f"{path.name}.gz") if packed else path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(gzip.compress(content) if packed else content)


def write_fashion(root: Path, *, packed: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    sets = {}
    for prefix, count in (("train", 5), ("t10k", 3)):
        images = random.integers(0, 256, (count, 4, 6)).astype(np.uint8)
        labels = random.integers(0, 10, count).astype(np.uint8)
        write_idx(root / f"{prefix}-images-idx3-ubyte", images, packed=packed)
        write_idx(root / f"{prefix}-labels-idx1-ubyte", labels, packed=packed)
        sets[prefix] = images, labels
    return sets


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
def test_fashion_mnist_files(tmp_path: Path, packed: bool, place: str) -> None:
    written = write_fashion(tmp_path / place, packed=packed)
    train, test = sources.fashion_mnist(tmp_path)
    for samples, (images, labels) in ((train, written["train"]), (test, written["t10k"])):
        inputs, truth = samples.batch(np.arange(len(samples)))
        assert torch.allclose(inputs[:, 0], (torch.from_numpy(images) / 255 - 0.2860) / 0.3530, atol=1e-6)
        assert truth.tolist() == labels.tolist()


def test_fashion_mnist_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        sources.fashion_mnist(tmp_path / "nowhere")
    for part in (
        f"no Fashion-MNIST in {tmp_path / 'nowhere'}",
        "expected train-images-idx3-ubyte(.gz)",
        "set data.root",
    ):
        assert part in str(caught.value)
    write_fashion(tmp_path, packed=True)
    damaged = tmp_path / "t10k-images-idx3-ubyte.gz"
    for content in (
        gzip.compress(b"\0\0\x08\x03\0\0\0\x02"),
        damaged.read_bytes()[:30],
        b"not gzipped",
        gzip.compress(b""),
    ):
        damaged.write_bytes(content)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte is no whole IDX file: .*; fetch it again"):
            sources.fashion_mnist(tmp_path)


def paint(path: Path, red: int, *, height: int = 24, width: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (red, 0, 0)).save(path)


def test_an_image_folder_with_train_and_test(tmp_path: Path) -> None:
    for number, name in enumerate(("ant", "bee", "cat")):
        for index in range(2):
            paint(tmp_path / "train" / name / f"{index}.png", 50 * number)
        paint(tmp_path / "val" / name / "0.png", 50 * number)
    pool, test = sources.image_folder(tmp_path, 16)
    assert test is not None
    assert pool.batch(np.arange(6))[1].tolist() == [0, 0, 1, 1, 2, 2]
    inputs, labels = test.batch(np.arange(3))
    assert labels.tolist() == [0, 1, 2]
    assert inputs.shape == (3, 3, 16, 16)
    for number in range(3):
        expected = torch.tensor([(50 * number / 255 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
        assert torch.allclose(inputs[number], expected[:, None, None].expand(3, 16, 16), atol=1e-5)


def test_a_flat_image_folder_has_no_test_set(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        paint(tmp_path / name / "0.png", 9)
    pool, test = sources.image_folder(tmp_path, 8)
    assert test is None
    assert pool.batch(np.arange(2))[1].tolist() == [0, 1]


def test_augmented_pictures_follow_their_generator(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    samples = Pictures((str(tmp_path / "noise.png"),) * 3, np.zeros(3, dtype=np.int64), 12)
    first, again, other = (samples.batch(np.arange(3), np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    plain, _ = samples.batch(np.arange(3))
    assert torch.equal(plain[0], plain[1])
    assert first.shape == plain.shape == (3, 3, 12, 12)


def test_folders_that_hold_no_classes_are_refused(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=r"no classes in .*; expected one sub-folder .*; correct data\.root"):
            sources.image_folder(root, 8)
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=r"pictures are missing in .*ant.*; add them or remove its folder"):
        sources.image_folder(tmp_path, 8)


def test_a_test_set_of_other_classes_is_refused(tmp_path: Path) -> None:
    for place in ("train/ant", "train/bee", "test/bee"):
        paint(tmp_path / place / "0.png", 1)
    with pytest.raises(DataError, match=r"different classes \(ant\); expected the same sub-folders in both; complete"):
        sources.image_folder(tmp_path, 8)


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "ant" / "0.png", 1)
    (tmp_path / "ant" / "1.png").write_bytes(b"no picture")
    pool, _ = sources.image_folder(tmp_path, 8)
    with pytest.raises(
        DataError, match=r"cannot read the picture .*1\.png: .*; expected a file such as JPEG or PNG; mend or remove it"
    ):
        pool.batch(np.arange(2))

"""Built-in sets and folders of pictures: their files are read, and missing or damaged ones refused."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from search.base import DataError
from search.workload.data import folders, sources
from search.workload.data.pictures import Preparation


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
        gzip.compress(b"\0\0\x08\x01\0\0\0\x02" + b"\0" * 10_000_000),  # more than it says
        gzip.compress(b"\0\0\x08\x02" + b"\x7f\xff\xff\xff" * 2),
        gzip.compress(b"\0\0\x08\x01" + b"\xff" * 8),
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
    pool, test = folders.image_folder(tmp_path, Preparation(16))
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
    pool, test = folders.image_folder(tmp_path, Preparation(8))
    assert test is None
    assert pool.batch(np.arange(2))[1].tolist() == [0, 1]


def test_folders_that_hold_no_classes_are_refused(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=r"no classes in .*; expected one sub-folder .*; correct data\.root"):
            folders.image_folder(root, Preparation(8))
    (tmp_path / "ant").mkdir()
    with pytest.raises(DataError, match=r"pictures are missing in .*ant.*; add them or remove its folder"):
        folders.image_folder(tmp_path, Preparation(8))


def test_a_test_set_of_other_classes_is_refused(tmp_path: Path) -> None:
    for place in ("train/ant", "train/bee", "test/bee"):
        paint(tmp_path / place / "0.png", 1)
    with pytest.raises(DataError, match=r"different classes \(ant\); expected the same sub-folders in both; complete"):
        folders.image_folder(tmp_path, Preparation(8))


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "ant" / "0.png", 1)
    (tmp_path / "ant" / "1.png").write_bytes(b"no picture")
    pool, _ = folders.image_folder(tmp_path, Preparation(8))
    with pytest.raises(
        DataError, match=r"cannot read the picture .*1\.png: .*; expected a file such as JPEG or PNG; mend or remove it"
    ):
        pool.batch(np.arange(2))


@pytest.mark.parametrize(("train", "held_out"), [("Training", "Testing"), ("train", "valid"), ("TRAIN", "Validation")])
def test_sets_have_the_names_that_downloads_give_them(tmp_path: Path, train: str, held_out: str) -> None:
    for name in ("ant", "bee"):
        paint(tmp_path / train / name / "0.png", 9)
        paint(tmp_path / held_out / name / "1.png", 9)
    pool, test = folders.image_folder(tmp_path, Preparation(8))
    assert test is not None
    assert (len(pool), len(test)) == (2, 2)
    assert test.batch(np.arange(2))[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (
            ("one/a", "one/b", "two/a", "two/b"),
            "holds one and two, which look like sets and not like classes; expected",
        ),
        (("test/a", "val/b"), "holds test and val, which look like sets"),
        (("train", "test"), "holds test and train, which look like sets"),
        (("all/a", "all/b"), "holds the one folder all, which holds a, b and no picture of its own; expected"),
    ],
)
def test_folders_of_sets_are_no_classes(tmp_path: Path, places: tuple[str, ...], told: str) -> None:
    for place in places:
        paint(tmp_path / place / "0.png", 1)
    with pytest.raises(DataError, match=re.escape(told)):
        folders.image_folder(tmp_path, Preparation(8))


def test_what_programs_leave_behind_is_no_class_and_no_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place in ("train", "bee/more"):  # a class may be called train
        paint(tmp_path / place / "0.png", 9)
    for place in (".ipynb_checkpoints", "__MACOSX", "bee/.ipynb_checkpoints"):
        paint(tmp_path / place / "0-checkpoint.png", 9)
    (tmp_path / "train" / "._0.png").write_bytes(b"no picture")
    pool, _ = folders.image_folder(tmp_path, Preparation(8))
    assert pool.batch(np.arange(len(pool)))[1].tolist() == [0, 1]
    assert ".ipynb_checkpoints, __MACOSX is no class and is skipped" in caplog.text

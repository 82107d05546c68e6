"""Sources of labelled images: the built-in sets, a folder of pictures, or the user's own factory."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from methods.training import Samples
from search.base import DataError
from search.workload.samples import Arrays, Indexed, Pictures


def digits() -> tuple[Samples, None]:
    """scikit-learn's 1,797 handwritten digits, `(1, 8, 8)`, pixels scaled to [0, 1]; no test set of its own."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    return Arrays(images, bunch.target.astype(np.int64), scale=1 / 16, mean=0.305, std=0.376, shift=1), None


FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist",)


def fashion_mnist(root: Path | None) -> tuple[Samples, Samples]:
    """Fashion-MNIST, 60,000 + 10,000 images `(1, 28, 28)`, from `root` or from Debian's dataset-fashion-mnist.

    Raises:
        DataError: none of the folders holds the four files.
    """
    for folder in [root] if root else [Path(name) for name in FASHION_FOLDERS]:
        for place in (folder, folder / "FashionMNIST" / "raw"):
            if found := _read_idx_sets(place):
                return found
    raise DataError(
        f"no Fashion-MNIST in {root or ' or '.join(FASHION_FOLDERS)}; expected train-images-idx3-ubyte(.gz) and its "
        "three companions there; install Debian's dataset-fashion-mnist or set data.root to the folder that has them"
    )


def _read_idx_sets(folder: Path) -> tuple[Samples, Samples] | None:
    sets: list[Samples] = []
    for prefix, shift in (("train", 2), ("t10k", 0)):
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte")
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte")
        if images is None or labels is None:
            return None
        pixels = images[:, None]
        sets.append(
            Arrays(
                pixels, labels.astype(np.int64), scale=1 / 255, mean=0.2860, std=0.3530, shift=shift, mirror=shift > 0
            )
        )
    return sets[0], sets[1]


def _read_idx(path: Path) -> np.ndarray | None:
    """Read the bytes of an IDX file, plain or gzipped, in their shape; a missing file gives None."""
    packed = path.with_name(f"{path.name}.gz")
    if not path.is_file() and not packed.is_file():
        return None
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, IndexError, OSError, EOFError) as error:
        raise DataError(f"{path} is no whole IDX file: {error}; expected one of bytes; fetch it again") from error


def image_folder(root: Path, size: int) -> tuple[Samples, Samples | None]:
    """Pictures under `root/train/CLASS/` and `root/test/CLASS/` (or `val`), or under `root/CLASS/` with no test set.

    Raises:
        DataError: a class folder holds no picture, or the test set's classes are not the training set's.
    """
    if not (root / "train").is_dir():
        return _find_pictures(root, _classes(root), size), None
    classes = _classes(root / "train")
    train = _find_pictures(root / "train", classes, size)
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None:
        return train, None
    if _classes(held_out) != classes:
        differing = ", ".join(sorted(_classes(held_out).keys() ^ classes.keys()))
        raise DataError(
            f"{held_out} and {root / 'train'} have different classes ({differing}); expected the same sub-folders in "
            "both; complete them"
        )
    return train, _find_pictures(held_out, classes, size)


def _classes(folder: Path) -> dict[str, int]:
    """Number the classes, which are the sub-folders in the order of their names."""
    names = sorted(place.name for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    if not names:
        raise DataError(f"no classes in {folder}; expected one sub-folder of pictures per class; correct data.root")
    return {name: number for number, name in enumerate(names)}


def _find_pictures(folder: Path, classes: dict[str, int], size: int) -> Pictures:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    try:
        found = make_dataset(str(folder), classes, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise DataError(
            f"pictures are missing in {folder}: {error}; expected some in every class; add them or remove its folder"
        ) from error
    paths, labels = zip(*found, strict=True)
    return Pictures(paths, np.array(labels, dtype=np.int64), size)


def from_factory(returned: object) -> tuple[Samples, Samples | None]:
    """Turn the return value of a user's data factory into sample sets.

    The value is `train` or `(train, test)`; each is a map-style torch dataset of `(image, label)`, or a dictionary with
    `images` `(n, c, h, w)` and `labels` `(n,)`.

    Raises:
        DataError: it is none of these, or an image or label in it cannot be used.
    """
    train, test = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    return _to_samples(train), None if test is None else _to_samples(test)


def _to_samples(source: object) -> Samples:
    if isinstance(source, dict) and {"images", "labels"} <= source.keys():
        return _check_arrays(_to_array(source["images"]), _to_array(source["labels"]))
    is_set = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if is_set and not isinstance(source, dict | str | np.ndarray | Tensor):
        return Indexed(source)
    raise DataError(
        f"the data factory returned {type(source).__name__}; expected a torch dataset of (image, label) or a "
        "dictionary with 'images' and 'labels'; return one of these, or a pair (train, test) of them"
    )


def _to_array(values: Any) -> np.ndarray:
    """The values of an array, or of a tensor on any device."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _check_arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise DataError(
            f"the data factory gave images {images.shape} and labels {labels.shape}; expected (n, c, h, w) and (n,)"
            "; return arrays of these shapes"
        )
    if images.dtype.kind not in "buif" or labels.dtype.kind not in "ui":
        raise DataError(
            f"the data factory gave images of {images.dtype} and labels of {labels.dtype}; expected real numbers and "
            "integers; convert them"
        )
    if not np.isfinite(images).all():
        raise DataError(
            f"{int((~np.isfinite(images)).sum())} pixels from the data factory are NaN or infinite; "
            "expected finite values; clean the data"
        )
    return Arrays(images, labels.astype(np.int64))

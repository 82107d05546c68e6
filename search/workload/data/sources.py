"""Sources of images: the built-in sets, and the user's own factory."""

from __future__ import annotations

import gzip
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from methods.training import Samples
from search.base import DataError
from search.workload.data.labels import Form, check_labels
from search.workload.data.samples import Arrays, Indexed, unlabelled

DIGITS: dict[str, Any] = {"scale": 1 / 16, "mean": 0.305, "std": 0.376}
FASHION_MNIST: dict[str, Any] = {"scale": 1 / 255, "mean": 0.2860, "std": 0.3530}
"""How the pixels of the built-in sets become inputs: `(pixel * scale - mean) / std`."""


def digits() -> tuple[Arrays, None]:
    """scikit-learn's 1,797 handwritten digits, `(1, 8, 8)`, pixels scaled to [0, 1]; no test set of its own."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    return Arrays(images, bunch.target.astype(np.int64), **DIGITS, shift=1), None


FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist",)


def fashion_mnist(root: Path | None) -> tuple[Arrays, Arrays]:
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


MOST_ITEMS = 100_000_000
"""More images than any data set of pictures has: an order of them alone takes a gigabyte."""


def _read_idx_sets(folder: Path) -> tuple[Arrays, Arrays] | None:
    sets: list[Arrays] = []
    for prefix, shift in (("train", 2), ("t10k", 0)):
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte")
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte")
        if images is None or labels is None:
            return None
        pixels = images[:, None]
        sets.append(Arrays(pixels, labels.astype(np.int64), **FASHION_MNIST, shift=shift, mirror=shift > 0))
    return sets[0], sets[1]


MOST_BYTES = 2**31
"""The largest content of an IDX file; Fashion-MNIST's has 47 MB."""


def _read_idx(path: Path) -> np.ndarray | None:
    """Read the bytes of an IDX file, plain or gzipped, in their shape; a missing file gives None."""
    packed = path.with_name(f"{path.name}.gz")
    if not path.is_file() and not packed.is_file():
        return None
    try:
        with path.open("rb") if path.is_file() else gzip.open(packed) as file:
            dimensions = file.read(4)[3]
            shape = np.frombuffer(file.read(4 * dimensions), ">i4").tolist()
            if math.prod(shape) > MOST_BYTES or min(shape, default=0) < 0:
                raise ValueError(f"its shape is {tuple(shape)}")
            return np.frombuffer(file.read(math.prod(shape) + 1), np.uint8).reshape(shape)  # what is packed may be more
    except (ValueError, IndexError, OSError, EOFError) as error:
        raise DataError(f"{path} is no whole IDX file: {error}; expected one of bytes; fetch it again") from error


def from_factory(returned: object, form: Form | None = "class") -> tuple[Samples, Samples | None]:
    """Turn the return value of a user's data factory into sample sets.

    The value is `train` or `(train, test)`; each is a map-style torch dataset of `(image, label)`, or a dictionary with
    `images` `(n, c, h, w)` and `labels` `(n, ...)` of this `form`. Without one an item may be an image alone, and
    images may come without a dictionary.

    Raises:
        DataError: it is none of these, or an image or label in it cannot be used.
    """
    is_list = isinstance(returned, list) and not any(isinstance(one, tuple | list | Tensor) for one in returned)
    train, test = returned, None
    if isinstance(returned, tuple | list) and len(returned) == 2 and (is_list or isinstance(returned, tuple)):
        train, test = returned
    read = _to_unlabelled if form is None else partial(_to_samples, form=form)
    return read(train), None if test is None else read(test)


def _to_unlabelled(source: object) -> Samples:
    images = source.get("images") if isinstance(source, dict) else source
    if isinstance(images, np.ndarray | Tensor) or isinstance(source, dict):
        pixels = _to_array(images)
        return _to_arrays(pixels, np.zeros(len(pixels) if pixels.ndim else 0, np.int64), "class")
    return unlabelled(_to_samples(source, "class"))


def _to_samples(source: object, form: Form) -> Arrays | Indexed:
    if isinstance(source, dict) and {"images", "labels"} <= source.keys():
        return _to_arrays(_to_array(source["images"]), _to_array(source["labels"]), form)
    is_set = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if is_set and not isinstance(source, dict | str | np.ndarray | Tensor):
        found = Indexed(source, form)
        if len(found) > MOST_ITEMS:
            raise DataError(
                f"the data set says that it has {len(found):,} items; expected at most {MOST_ITEMS:,}; mend its __len__"
            )
        return found
    raise DataError(
        f"the data factory returned {type(source).__name__}; expected a torch dataset of (image, label) or a "
        "dictionary with 'images' and 'labels'; return one of these, or a pair (train, test) of them, or give "
        "data.labels: false if there are no labels"
    )


def _to_array(values: Any) -> np.ndarray:
    """The values of an array, of a tensor on any device, or of a list of them, in this machine's byte order."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    try:
        is_tensors = isinstance(values, list | tuple) and any(isinstance(one, Tensor) for one in values)
        found = np.stack([_to_array(one) for one in values]) if is_tensors else np.asarray(values)
    except ValueError as error:
        raise DataError(
            f"the data factory gave a list of values of different shapes: {error}; expected one shape for all; "
            "make arrays of them"
        ) from error
    if found.dtype.kind == "f" and found.dtype.itemsize > 8:
        return found.astype(np.float64)  # torch has no longer ones
    return found.astype(found.dtype.newbyteorder("="), copy=False)


def _to_arrays(images: np.ndarray, labels: np.ndarray, form: Form) -> Arrays:
    truth = check_labels(images, labels, form)
    if not np.isfinite(images).all():
        raise DataError(
            f"{int((~np.isfinite(images)).sum())} pixels from the data factory are NaN or infinite; "
            "expected finite values; clean the data"
        )
    return Arrays(images, truth)

"""Sources of images: the built-in sets, a folder of pictures, or the user's own factory."""

from __future__ import annotations

import gzip
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from methods.training import Samples
from search.base import DataError
from search.workload.pictures import Preparation
from search.workload.samples import Arrays, Indexed, Pictures, unlabelled

DIGITS: dict[str, Any] = {"scale": 1 / 16, "mean": 0.305, "std": 0.376}
FASHION_MNIST: dict[str, Any] = {"scale": 1 / 255, "mean": 0.2860, "std": 0.3530}
"""How the pixels of the built-in sets become inputs: `(pixel * scale - mean) / std`."""


def digits() -> tuple[Arrays, None]:
    """scikit-learn's 1,797 handwritten digits, `(1, 8, 8)`, pixels scaled to [0, 1]; no test set of its own."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    return Arrays(images, bunch.target.astype(np.int64), **DIGITS, shift=1), None


log = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The endings of picture files, as torchvision's."""

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


TRAIN, HELD_OUT = ("train", "training"), ("test", "testing", "val", "valid", "validation", "eval")
"""The names of folders that hold a set, in lower case; of several held-out sets the first one is read."""


def image_folder(root: Path, prepare: Preparation) -> tuple[Samples, Samples | None]:
    """Pictures under `root/train/CLASS/` and `root/test/CLASS/`, or under `root/CLASS/` with no test set.

    The folders of the sets may have the other names of `TRAIN` and `HELD_OUT`, in either case.

    Raises:
        DataError: a class folder holds no picture, or the test set's classes are not the training set's.
    """
    sets = {name.lower(): root / name for name in _folders(root) if _folders(root / name)}
    train, held_out = _train_and_held_out(sets)
    if train is None:
        _refuse_sets(root)
        return _find_pictures(root, _classes(root), prepare), None
    classes = _classes(train)
    pictures = _find_pictures(train, classes, prepare)
    if unused := [place.name for place in sets.values() if place not in (train, held_out)]:
        log.warning("%s: %s is not read, beside %s", root, ", ".join(sorted(unused)), train.name)
    if held_out is None:
        return pictures, None
    if _classes(held_out) != classes:
        differing = ", ".join(sorted(_classes(held_out).keys() ^ classes.keys()))
        raise DataError(
            f"{held_out} and {train} have different classes ({differing}); expected the same sub-folders in both; "
            "complete them"
        )
    return pictures, _find_pictures(held_out, classes, prepare)


def unlabelled_pictures(root: Path, prepare: Preparation) -> tuple[Samples, Samples | None]:
    """All pictures in a folder and below it, without labels; of one with sets, named as for `image_folder`, theirs.

    A folder `train` beside others that are no sets may be a class of vehicles.

    Raises:
        DataError: there is no picture.
    """
    folders = _folders(root)
    train, held_out = _train_and_held_out({name.lower(): root / name for name in folders})
    if train is None or not (held_out or len(folders) == 1 or _folders(train)):
        return _all_pictures(root, prepare), None
    return _all_pictures(train, prepare), None if held_out is None else _all_pictures(held_out, prepare)


def _all_pictures(folder: Path, prepare: Preparation) -> Pictures:
    """The pictures in a folder and then below it, in the order in which those of classes are found."""
    paths = _pictures_in(folder) if folder.is_dir() else []
    paths += [path for name in _folders(folder) for path in _pictures_below(folder / name)]
    if not paths:
        raise DataError(f"no pictures in {folder}; expected some ({', '.join(ENDINGS)}); correct data.root")
    return Pictures(tuple(paths), np.zeros(len(paths), np.int64), prepare)


def _train_and_held_out(sets: Mapping[str, Path]) -> tuple[Path | None, Path | None]:
    """The folder of the training set and that of the held-out set, among folders by their names in lower case."""
    train, held_out = (next((sets[name] for name in names if name in sets), None) for names in (TRAIN, HELD_OUT))
    return train, held_out


def _folders(folder: Path) -> list[str]:
    """The names of the sub-folders, in order, without those that programs leave behind."""
    found = sorted(place.name for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    return [name for name in found if not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _refuse_sets(root: Path) -> None:
    """Refuse folders of sets in the place of classes: they hold the same sub-folders, and no picture of their own."""
    inside = {name: tuple(_folders(root / name)) for name in _folders(root)}
    named = [name for name in inside if name.lower() in TRAIN + HELD_OUT]
    named = [name for name in named if inside[name] or len(named) == len(inside)]
    alike = [name for name, below in inside.items() if len(below) > 1 and list(inside.values()).count(below) > 1]
    alike = [name for name in alike if not _pictures_in(root / name)]
    if sets := named or alike:
        is_flat = any(_pictures_in(root / name) for name in named if not inside[name])
        raise DataError(
            f"{root} holds {' and '.join(sets)}, which look like sets and not like classes; expected a folder train "
            "(or training) beside test, testing, val, valid or validation; rename them"
            + is_flat
            * ", or give data.labels: false if the pictures have no labels"
        )
    if len(inside) == 1 and (only := next(iter(inside))) and inside[only] and not any(_pictures_in(root / only)):
        raise DataError(
            f"{root} holds the one folder {only}, which holds {', '.join(inside[only][:4])} and no picture of its own; "
            f"expected one sub-folder of pictures per class; set data.root to {root / only}"
        )


def _classes(folder: Path) -> dict[str, int]:
    """Number the classes, which are the sub-folders in the order of their names."""
    names = _folders(folder)
    if not names and folder.is_dir() and (pictures := _pictures_in(folder)):
        raise DataError(
            f"{folder} holds {len(pictures):,} pictures and no folder of a class; expected one sub-folder of pictures "
            "per class; sort them, or give data.labels: false if they have no labels: then students are judged by how "
            "often they agree with the teacher"
        )
    if not names:
        raise DataError(f"no classes in {folder}; expected one sub-folder of pictures per class; correct data.root")
    if skipped := sorted(place.name for place in folder.iterdir() if place.is_dir() and _is_hidden(place.name)):
        log.warning("%s: %s is no class and is skipped", folder, ", ".join(skipped))
    return {name: number for number, name in enumerate(names)}


def _find_pictures(folder: Path, classes: dict[str, int], prepare: Preparation) -> Pictures:
    found = {name: list(_pictures_below(folder / name)) for name in classes}
    if empty := [name for name, paths in found.items() if not paths]:
        raise DataError(
            f"pictures are missing in {folder}: the classes {', '.join(empty)} have none; expected some in every "
            f"class ({', '.join(ENDINGS)}); add them or remove its folder"
        )
    labels = np.repeat(list(classes.values()), [len(paths) for paths in found.values()])
    return Pictures(tuple(path for paths in found.values() for path in paths), labels.astype(np.int64), prepare)


def _pictures_below(folder: Path) -> Iterator[str]:
    """Yield the pictures of a class in the order in which torchvision finds them, without hidden ones."""
    for place, _, _ in sorted(os.walk(folder, followlinks=True)):
        if not any(_is_hidden(part) for part in Path(place).relative_to(folder).parts):
            yield from _pictures_in(Path(place))


def _pictures_in(folder: Path) -> list[str]:
    names = (place.name for place in folder.iterdir() if place.name.lower().endswith(ENDINGS))
    return [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]


def from_factory(returned: object, *, labels: bool = True) -> tuple[Samples, Samples | None]:
    """Turn the return value of a user's data factory into sample sets.

    The value is `train` or `(train, test)`; each is a map-style torch dataset of `(image, label)`, or a dictionary with
    `images` `(n, c, h, w)` and `labels` `(n,)`. Without `labels` an item may be an image alone, and images may come
    without a dictionary.

    Raises:
        DataError: it is none of these, or an image or label in it cannot be used.
    """
    is_list = isinstance(returned, list) and not any(isinstance(one, tuple | list | Tensor) for one in returned)
    train, test = returned, None
    if isinstance(returned, tuple | list) and len(returned) == 2 and (is_list or isinstance(returned, tuple)):
        train, test = returned
    read = _to_samples if labels else _to_unlabelled
    return read(train), None if test is None else read(test)


def _to_unlabelled(source: object) -> Samples:
    images = source.get("images") if isinstance(source, dict) else source
    if isinstance(images, np.ndarray | Tensor) or isinstance(source, dict):
        pixels = _to_array(images)
        return _check_arrays(pixels, np.zeros(len(pixels) if pixels.ndim else 0, np.int64))
    return unlabelled(_to_samples(source))


def _to_samples(source: object) -> Arrays | Indexed:
    if isinstance(source, dict) and {"images", "labels"} <= source.keys():
        return _check_arrays(_to_array(source["images"]), _to_array(source["labels"]))
    is_set = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if is_set and not isinstance(source, dict | str | np.ndarray | Tensor):
        found = Indexed(source)
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


def _check_arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise DataError(
            f"the data factory gave images {images.shape} and labels {labels.shape}; expected (n, c, h, w) and (n,)"
            "; return arrays of these shapes"
        )
    if images.dtype.kind not in "buif" or labels.dtype.kind not in "bui":
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

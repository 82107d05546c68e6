"""Labelled images: the built-in sets, a folder of pictures, or the user's own; split once, by seed."""

from __future__ import annotations

import gzip
import hashlib
import operator
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.training.recipe import WHOLE, Chance, Samples
from search.base import DataError


@dataclass(frozen=True)
class Arrays:
    """Images held in memory: `images` `(n, c, h, w)` of any real type, `labels` `(n,)` int64.

    A batch is `(images * scale - mean) / std`, in float32; augmented, it is also shifted by up to `shift` pixels per
    axis (zeros come in) and mirrored with probability one half where `mirror` is set.
    """

    images: np.ndarray
    labels: np.ndarray
    scale: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    shift: int = 0
    mirror: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Inputs `(n, c, h, w)` float32 and labels `(n,)` of these indices."""
        images = self.images[indices]
        if augment is not None:
            images = _augmented(images, self.shift, mirror=self.mirror, random=augment)
        inputs = torch.from_numpy(images[part]).float().mul_(self.scale).sub_(self.mean).div_(self.std)
        return inputs, torch.from_numpy(self.labels[indices[part]])


@dataclass(frozen=True)
class Pictures:
    """Image files read on demand, resized, centre-cropped to `size`, normalised with ImageNet's mean and deviation."""

    paths: tuple[str, ...]
    labels: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Inputs `(n, 3, size, size)` float32 and labels `(n,)`; a random crop and mirror where augmented."""
        draws = [None if augment is None else augment.random(4) for _ in indices]
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(self._read, [self.paths[i] for i in indices[part]], draws[part]))
        return torch.stack(images), torch.from_numpy(self.labels[indices[part]])

    def _read(self, path: str, draw: np.ndarray | None) -> Tensor:
        from PIL import Image
        from torchvision.transforms.v2 import functional as tv

        try:
            with Image.open(path) as picture:
                image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        except (OSError, SyntaxError) as error:
            raise DataError(
                f"cannot read the picture {path}: {error}; expected a file such as JPEG or PNG; mend or remove it"
            ) from error
        if draw is None:
            image = tv.center_crop(tv.resize(image, [self.size * 8 // 7], antialias=True), [self.size, self.size])
        else:
            height, width = image.shape[-2:]
            side = max(1, round((0.08 + 0.92 * draw[0]) ** 0.5 * min(height, width)))
            top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
            image = tv.resized_crop(image, top, left, side, side, [self.size, self.size], antialias=True)
            image = tv.horizontal_flip(image) if draw[3] < 0.5 else image
        pixels = tv.to_dtype(image, torch.float32, scale=True)
        normalised: Tensor = tv.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return normalised


@dataclass(frozen=True)
class Subset:
    """Some of `source`'s samples, in the order of `indices`."""

    source: Samples
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """The source's batch at these positions."""
        return self.source.batch(self.indices[indices], augment, part)


def _augmented(images: np.ndarray, shift: int, *, mirror: bool, random: np.random.Generator) -> np.ndarray:
    """Each image shifted and mirrored by its own draw."""
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    top, left = random.integers(0, 2 * shift + 1, (2, count))
    columns = np.arange(width) + np.zeros((count, 1), dtype=np.int64)
    if mirror:
        columns = np.where(random.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    rows = top[:, None] + np.arange(height)
    picked: np.ndarray = padded.transpose(0, 2, 3, 1)[
        np.arange(count)[:, None, None], rows[:, :, None], (left[:, None] + columns)[:, None, :]
    ]
    return np.ascontiguousarray(picked.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class Indexed:
    """A map-style torch dataset of `(image, label)` pairs, read one by one; it does its own augmentation, if any."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """The pairs of these indices, stacked; raises `DataError` where one is no such pair or holds NaN."""
        images, labels = zip(*(self._pair(int(index)) for index in indices[part]), strict=True)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"the data set's images have the shapes {' and '.join(map(str, sorted(shapes)))}; "
                "expected one shape (c, h, w) for all; resize them in the data set"
            )
        return torch.stack(images), torch.tensor(labels)

    def _pair(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.source[index]
            pixels, number = torch.as_tensor(image).detach().cpu().float(), operator.index(label)
        except Exception as error:
            raise DataError(
                f"item {index} of the data set raised {type(error).__name__}: {error}; "
                "expected a pair of an image tensor (c, h, w) and an integer label; mend the data set"
            ) from error
        if pixels.ndim != 3 or not torch.isfinite(pixels).all():
            fault = f"has shape {tuple(pixels.shape)}" if pixels.ndim != 3 else "holds NaN or infinity"
            raise DataError(
                f"image {index} of the data set {fault}; expected finite pixels of shape (c, h, w); clean the data set"
            )
        return pixels, number


@dataclass(frozen=True)
class Splits:
    """What a search may see, and when: `train` by recovery, `calibration` by scoring, `validation` by decisions.

    `test` is read once per registered version. `calibration` is `(n, c, h, w)` float32, a part of train, unaugmented.
    `fingerprint` changes with the split, any of its labels and any of its images held in memory; of images read on
    demand, those of `calibration` count.
    """

    train: Samples
    validation: Samples
    test: Samples
    calibration: np.ndarray
    classes: int
    fingerprint: str


def split(pool: Samples, test: Samples | None, *, validation: float, calibration: int, seed: int) -> Splits:
    """Splits `pool` by `seed`; where there is no `test` set, one as large as the validation set is taken from it too.

    Args:
        validation: the share of the pool that becomes the validation set, in (0, 1).
        calibration: the number of training images scoring may see; all of them where there are fewer.

    Raises:
        DataError: a split is empty, a label is none of the classes, or a calibration image cannot be used.
    """
    order = np.random.default_rng(seed).permutation(len(pool))
    held = max(1, round(len(pool) * validation))
    validation_part, rest = order[:held], order[held:]
    if test is None:
        test, rest = Subset(pool, rest[:held]), rest[held:]
    parts: dict[str, Samples] = {
        "train": Subset(pool, rest), "validation": Subset(pool, validation_part), "test": test,
    }  # fmt: skip
    _check_sizes(parts, len(pool), validation)
    images, _ = pool.batch(np.sort(rest[:calibration]))
    if (shape := test.batch(np.arange(1))[0].shape[1:]) != images.shape[1:]:
        raise DataError(
            f"training images are {tuple(images.shape[1:])}, test images {tuple(shape)}; expected one shape (c, h, w); "
            "prepare both sets in the same way"
        )
    labels = _labels(pool)[np.concatenate([rest, validation_part])]
    return Splits(
        **parts,
        calibration=images.numpy(),
        classes=_count_classes(labels, test),
        fingerprint=_digest(images.numpy(), rest, validation_part, labels, *_held(pool)),
    )


def _check_sizes(parts: Mapping[str, Samples], images: int, validation: float) -> None:
    for name, part in parts.items():
        if len(part) == 0:
            raise DataError(
                f"the {name} split is empty: {images} images with data.validation = {validation}; "
                "expected at least one image in every split; add images or change data.validation"
            )


def _count_classes(labels: np.ndarray, test: Samples) -> int:
    """One more than the greatest of the train and validation labels; those of a test set in memory must be below it."""
    if labels.min() < 0:
        raise DataError(f"a label is {labels.min()}; expected classes counted from 0; renumber the labels")
    classes = int(labels.max()) + 1
    if isinstance(test, Arrays | Pictures):
        strange = test.labels[(test.labels < 0) | (test.labels >= classes)]
        if len(strange):
            raise DataError(
                f"the test set has the label {strange[0]}; expected 0 to {classes - 1}, as in training; "
                "number both sets in the same way"
            )
    return classes


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _held(samples: Samples) -> list[np.ndarray]:
    return [samples.images] if isinstance(samples, Arrays) else []


def _labels(samples: Samples) -> np.ndarray:
    """Every label of `samples`, without reading an image where the set can tell."""
    if isinstance(samples, Arrays | Pictures):
        return samples.labels
    chunks = np.array_split(np.arange(len(samples)), -(-len(samples) // 256))
    return np.concatenate([samples.batch(chunk)[1].numpy() for chunk in chunks])


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
            if found := _idx_sets(place):
                return found
    raise DataError(
        f"no Fashion-MNIST in {root or ' or '.join(FASHION_FOLDERS)}; expected train-images-idx3-ubyte(.gz) and its "
        "three companions there; install Debian's dataset-fashion-mnist or set data.root to the folder that has them"
    )


def _idx_sets(folder: Path) -> tuple[Samples, Samples] | None:
    sets: list[Samples] = []
    for prefix, shift in (("train", 2), ("t10k", 0)):
        images, labels = _idx(folder / f"{prefix}-images-idx3-ubyte"), _idx(folder / f"{prefix}-labels-idx1-ubyte")
        if images is None or labels is None:
            return None
        pixels = images[:, None]
        sets.append(
            Arrays(
                pixels, labels.astype(np.int64), scale=1 / 255, mean=0.2860, std=0.3530, shift=shift, mirror=shift > 0
            )
        )
    return sets[0], sets[1]


def _idx(path: Path) -> np.ndarray | None:
    """The bytes of an IDX file, plain or gzipped, in their shape; None where there is no such file."""
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
        return _pictures(root, _classes(root), size), None
    classes = _classes(root / "train")
    train = _pictures(root / "train", classes, size)
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None:
        return train, None
    if _classes(held_out) != classes:
        differing = ", ".join(sorted(_classes(held_out).keys() ^ classes.keys()))
        raise DataError(
            f"{held_out} and {root / 'train'} have different classes ({differing}); expected the same sub-folders in "
            "both; complete them"
        )
    return train, _pictures(held_out, classes, size)


def _classes(folder: Path) -> dict[str, int]:
    """The numbers of the classes, which are the sub-folders in the order of their names."""
    names = sorted(place.name for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    if not names:
        raise DataError(f"no classes in {folder}; expected one sub-folder of pictures per class; correct data.root")
    return {name: number for number, name in enumerate(names)}


def _pictures(folder: Path, classes: dict[str, int], size: int) -> Pictures:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    try:
        found = make_dataset(str(folder), classes, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise DataError(
            f"pictures are missing in {folder}: {error}; expected some in every class; add them or remove its folder"
        ) from error
    paths, labels = zip(*found, strict=True)
    return Pictures(paths, np.array(labels, dtype=np.int64), size)


def from_factory(made: object) -> tuple[Samples, Samples | None]:
    """What a user's data factory returned, as sample sets.

    It returns `train` or `(train, test)`; each is a map-style torch dataset of `(image, label)`, or a dictionary with
    `images` `(n, c, h, w)` and `labels` `(n,)`.

    Raises:
        DataError: it is none of these, or an image or label in it cannot be used.
    """
    train, test = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    return _samples(train), None if test is None else _samples(test)


def _samples(source: object) -> Samples:
    if isinstance(source, dict) and {"images", "labels"} <= source.keys():
        return _arrays(_array(source["images"]), _array(source["labels"]))
    is_set = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if is_set and not isinstance(source, dict | str | np.ndarray | Tensor):
        return Indexed(source)
    raise DataError(
        f"the data factory returned {type(source).__name__}; expected a torch dataset of (image, label) or a "
        "dictionary with 'images' and 'labels'; return one of these, or a pair (train, test) of them"
    )


def _array(values: Any) -> np.ndarray:
    """The values of an array, or of a tensor wherever it lives."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _arrays(images: np.ndarray, labels: np.ndarray) -> Arrays:
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

"""Split images once, by a seed: train, validation, test and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np

from methods.training import Samples
from search.base import DataError
from search.cache import digest
from search.workload.samples import Arrays, Pictures, Subset


@dataclass(frozen=True)
class Splits:
    """The images of a search: recovery sees `train`, scoring `calibration`, decisions `validation`.

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
    """Split `pool` by `seed`; without a `test` set, one as large as the validation set is taken from it too.

    Args:
        validation: the share of the pool that becomes the validation set, in (0, 1).
        calibration: the number of training images that scoring may see; all of them if there are fewer.

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
    labels = _all_labels(pool)[np.concatenate([rest, validation_part])]
    return Splits(
        **parts,
        calibration=images.numpy(),
        classes=_count_classes(labels, test),
        fingerprint=_fingerprint(images.numpy(), rest, validation_part, labels, *_images_in_memory(pool)),
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


def _fingerprint(*arrays: np.ndarray) -> str:
    parts = ((f"{array.dtype}{array.shape}", np.ascontiguousarray(array).data) for array in arrays)
    return digest(*chain.from_iterable(parts))


def _images_in_memory(samples: Samples) -> list[np.ndarray]:
    return [samples.images] if isinstance(samples, Arrays) else []


def _all_labels(samples: Samples) -> np.ndarray:
    """Every label of `samples`, read without its images if the set holds labels apart."""
    if isinstance(samples, Arrays | Pictures):
        return samples.labels
    chunks = np.array_split(np.arange(len(samples)), -(-len(samples) // 256))
    return np.concatenate([samples.batch(chunk)[1].numpy() for chunk in chunks])

"""Split images once, by a seed: train, validation, test and calibration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import nn

from methods.training import Samples, Task
from search.base import DataError
from search.cache import digest
from search.workload.data.labels import Form, numbered
from search.workload.data.samples import Answered, Arrays, Indexed, Pictures, Subset

log = logging.getLogger(__name__)

MOST_CLASSES = 1_000_000
"""More classes than any network here has outputs for: a greater label is a mistake."""


@dataclass(frozen=True)
class Splits:
    """The images of a search: recovery sees `train`, scoring `calibration`, decisions `validation`.

    `classes` are those that labels tell of, 0 where labels are numbers. `test` is read once per registered version.
    `calibration` is `(n, c, h, w)` float32, a part of train, unaugmented. `fingerprint` changes with the split, any of
    its labels and any of its images held in memory; of images read on demand, those of `calibration` count.
    """

    train: Samples
    validation: Samples
    test: Samples
    calibration: np.ndarray
    classes: int
    fingerprint: str


def split(
    pool: Samples, test: Samples | None, *, validation: float, calibration: int, seed: int, form: Form = "class"
) -> Splits:
    """Split `pool` by `seed`; without a `test` set, one as large as the validation set is taken from it too.

    Args:
        validation: the share of the pool that becomes the validation set, in (0, 1).
        calibration: the number of training images that scoring may see; all of them if there are fewer.
        form: what labels are; only those of classes are counted.

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
    found, others = _all_labels(pool), None if isinstance(test, Subset) else _all_labels(test)
    labels = found[np.concatenate([rest, validation_part])]
    known, strange = (None if one is None else numbered(one, form) for one in (found, others))
    return Splits(
        **parts,
        calibration=images.numpy(),
        classes=0 if form == "numbers" or known is None else _count_classes(known, strange),
        fingerprint=_fingerprint(images.numpy(), rest, validation_part, labels, *_images_in_memory(pool)),
    )


def answered(splits: Splits, teacher: nn.Module, task: Task) -> Splits:
    """Return splits whose validation and test labels are the teacher's answers; those of train are never read.

    The teacher is asked for those of the validation set here, so that workers all have the same.
    """
    validation = Answered(splits.validation, teacher, task)
    _ = validation.labels
    return replace(splits, validation=validation, test=Answered(splits.test, teacher, task))


def _check_sizes(parts: Mapping[str, Samples], images: int, validation: float) -> None:
    for name, part in parts.items():
        if len(part) == 0:
            raise DataError(
                f"the {name} split is empty: {images} images with data.validation = {validation}; "
                "expected at least one image in every split; add images or change data.validation"
            )


def _count_classes(labels: np.ndarray, test: np.ndarray | None) -> int:
    """One more than the greatest label of a pool, which those of the test set must be below.

    A class without images is told, since numbers that begin at 1, or that skip some, are mistakes as a rule.
    """
    if not len(labels):
        raise DataError("no label counts: every pixel is 255; expected classes counted from 0; check the masks")
    if labels.min() < 0:
        raise DataError(f"a label is {labels.min()}; expected classes counted from 0; renumber the labels")
    classes = int(labels.max()) + 1
    if classes > MOST_CLASSES:
        raise DataError(
            f"a label is {classes - 1}; expected classes counted from 0, and at most {MOST_CLASSES:,} of them; "
            "renumber the labels"
        )
    known = np.unique(labels)
    strange = sorted(set(() if test is None else np.unique(test).tolist()) - set(known.tolist()))
    if outside := [label for label in strange if not 0 <= label < classes]:
        raise DataError(
            f"the test set has the label {outside[0]}; expected 0 to {classes - 1}, as in training; "
            "number both sets in the same way"
        )
    if strange:
        log.warning("the test set has the label %s, which no training image has", strange[0])
    if missing := sorted(set(range(classes)) - set(known.tolist())):
        named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        hint = "; they seem to begin at 1: subtract 1 if so" if missing == [0] else ""
        log.warning("no image has the label %s, of labels up to %d%s", named, classes - 1, hint)
    return classes


def _fingerprint(*arrays: np.ndarray) -> str:
    parts = ((f"{array.dtype}{array.shape}", np.ascontiguousarray(array).data) for array in arrays)
    return digest(*chain.from_iterable(parts))


def _images_in_memory(samples: Samples) -> list[np.ndarray]:
    return [samples.images] if isinstance(samples, Arrays) else []


def _all_labels(samples: Samples) -> np.ndarray:
    """Every label of `samples`; a set that does not hold them apart is read whole, which finds what cannot be used."""
    if isinstance(samples, Arrays | Pictures):
        return samples.labels
    chunks = np.array_split(np.arange(len(samples)), -(-len(samples) // 256))
    batches = [(images.shape[1:], labels.numpy()) for images, labels in map(samples.batch, chunks)]
    if len(shapes := {tuple(shape) for shape, _ in batches}) > 1:
        raise DataError(
            f"the data set's images have the shapes {' and '.join(map(str, sorted(shapes)))}; "
            "expected one shape (c, h, w) for all; resize them in the data set"
        )
    return np.concatenate([labels for _, labels in batches])


def check_stable(samples: Samples) -> None:
    """Read some items of a user's data set again: with the same seeds they must be equal.

    Raises:
        DataError: they are not, so no search on them could be resumed.
    """
    if not isinstance(samples, Indexed) or len(samples) == 0:
        return
    some = np.unique(np.linspace(0, len(samples) - 1, 32).astype(np.int64))
    (first, labels), (again, others) = samples.batch(some), samples.batch(some)
    if first.shape != again.shape or not (torch.equal(first, again) and torch.equal(labels, others)):
        raise DataError(
            "the data set is not stable: an item read twice gave two different images or labels; expected draws from "
            "the global generators of random, numpy or torch, which are seeded, or none; draw from these, or leave "
            "augmentation out"
        )
    if not torch.equal(first, samples.batch(some, np.random.default_rng(0))[0]):
        log.warning(
            "the data set changes its images by chance: validation and scoring see each changed in one fixed way; "
            "leave augmentation out to judge by the images themselves"
        )

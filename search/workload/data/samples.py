"""Labelled images that can be indexed in batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.training import CLASSIFICATION, Samples, Task, parts, reads
from methods.training.recipe import WHOLE, Chance
from search.base import DataError
from search.workload.data.labels import EXPECTED, Form, read_label
from search.workload.data.pictures import Preparation, decode, decode_mask
from search.workload.usercode import blaming

T = TypeVar("T")


@dataclass(frozen=True)
class Arrays:
    """Images held in memory: `images` `(n, c, h, w)` of any real type, `labels` `(n, ...)` int64 or float32.

    A batch is `(images * scale - mean) / std`, in float32; augmented, it is also shifted by up to `shift` pixels per
    axis (zeros come in) and, if `mirror` is set, mirrored with probability one half.
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
        """Inputs `(n, c, h, w)` float32 and labels `(n, ...)` of these indices."""
        images = self.images[indices]
        if augment is not None:
            images = _augment(images, self.shift, mirror=self.mirror, chance=augment)
        inputs = torch.from_numpy(images[part]).float().mul_(self.scale).sub_(self.mean).div_(self.std)
        return inputs, torch.from_numpy(self.labels[indices[part]])


@dataclass(frozen=True)
class Pictures:
    """Image files read on demand and prepared for the network."""

    paths: tuple[str, ...]
    labels: np.ndarray
    prepare: Preparation

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Inputs `(n, 3, size, size)` float32 and labels `(n,)`; augmented ones are cropped and mirrored at random."""
        images = _in_threads(self._read_picture, indices, augment, part)
        return torch.stack(images), torch.from_numpy(self.labels[indices[part]])

    def _read_picture(self, index: int, draw: np.ndarray | None) -> Tensor:
        return self.prepare(torch.from_numpy(decode(self.paths[index])).permute(2, 0, 1), draw)


@dataclass(frozen=True)
class Masked:
    """Image files beside mask files, whose values are the classes of the pixels; both are prepared alike."""

    paths: tuple[str, ...]
    masks: tuple[str, ...]
    prepare: Preparation

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Inputs `(n, 3, size, size)` float32 and labels `(n, size, size)`, cropped and mirrored together."""
        images, masks = zip(*_in_threads(self._read_pair, indices, augment, part), strict=True)
        return torch.stack(images), torch.stack(masks)

    def _read_pair(self, index: int, draw: np.ndarray | None) -> tuple[Tensor, Tensor]:
        image, mask = decode(self.paths[index]), decode_mask(self.masks[index])
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"the mask {self.masks[index]} is {mask.shape} and its picture {image.shape[:2]}; expected one height "
                "and width; scale the mask, without smoothing"
            )
        shaped = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None]
        return self.prepare(shaped[0], draw), self.prepare.mask(shaped[1], draw)


def _in_threads(
    read: Callable[[int, np.ndarray | None], T], indices: np.ndarray, augment: Chance, part: slice
) -> list[T]:
    """Read the `part` of these indices, each with four draws of its own if a generator is given."""
    draws = [None if augment is None else augment.random(4) for _ in indices]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(read, indices[part], draws[part]))


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


def _augment(images: np.ndarray, shift: int, *, mirror: bool, chance: np.random.Generator) -> np.ndarray:
    """Shift and mirror each image by its own draw."""
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    top, left = chance.integers(0, 2 * shift + 1, (2, count))
    columns = np.arange(width) + np.zeros((count, 1), dtype=np.int64)
    if mirror:
        columns = np.where(chance.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    rows = top[:, None] + np.arange(height)
    picked: np.ndarray = padded.transpose(0, 2, 3, 1)[
        np.arange(count)[:, None, None], rows[:, :, None], (left[:, None] + columns)[:, None, :]
    ]
    return np.ascontiguousarray(picked.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class Indexed:
    """A map-style torch dataset of `(image, label)` pairs, read one by one; it does its own augmentation, if any.

    Labels have one `form`; without one its items may be images alone, and every label is 0.

    Python's, numpy's and torch's global generators are seeded for each item: by its index, or by a draw for an
    augmented batch. A data set that augments by chance so gives the same images to each search, and to each look.
    """

    source: Any
    form: Form | None = "class"

    def __len__(self) -> int:
        with blaming("the length of the data set", "the number of its items; mend its __len__", DataError):
            return len(self.source)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """The pairs of these indices, stacked; raises `DataError` if one is no such pair or holds NaN."""
        seeds = indices if augment is None else augment.integers(2**32, size=len(indices))
        with _global_generators_kept():
            pairs = [self._read_pair(int(i), int(seed)) for i, seed in zip(indices[part], seeds[part], strict=True)]
        images, labels = zip(*pairs, strict=True)
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"the data set's images have the shapes {' and '.join(map(str, sorted(shapes)))}; "
                "expected one shape (c, h, w) for all; resize them in the data set"
            )
        if len({label.shape for label in labels}) > 1:
            raise DataError("the data set's labels have several shapes; expected one for all; make them alike")
        return torch.stack(images), torch.stack(labels)

    def _read_pair(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        expected = (
            f"a pair of an image tensor (c, h, w) and {EXPECTED[self.form]}; mend the data set, or its length, or give "
            "data.labels: false if it has none"
            if self.form
            else "an image tensor (c, h, w), alone or before a label; mend the data set, or its length"
        )
        with blaming(f"item {index} of the data set", expected, DataError):
            image, label = self._parts(self.source[index])
            pixels = torch.as_tensor(image).detach().cpu().float()
            truth = read_label(label, self.form or "class", pixels)
        if pixels.ndim != 3 or not torch.isfinite(pixels).all():
            fault = f"has shape {tuple(pixels.shape)}" if pixels.ndim != 3 else "holds NaN or infinity"
            raise DataError(
                f"image {index} of the data set {fault}; expected finite pixels of shape (c, h, w); clean the data set"
            )
        return pixels, truth

    def _parts(self, item: Any) -> tuple[Any, Any]:
        """The image and the label of an item, 0 if labels are not read."""
        if self.form is None:
            return (item[0] if isinstance(item, tuple | list) else item), 0
        image, label = item
        return image, label


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Leave the global generators as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def unlabelled(samples: Arrays | Pictures | Indexed) -> Samples:
    """The same images without their labels: all are 0."""
    if isinstance(samples, Indexed):
        return replace(samples, form=None)
    return replace(samples, labels=np.zeros(len(samples), np.int64))


@dataclass(frozen=True)
class Answered:
    """The images of `source`; their labels are the answers of its `teacher`, which is asked at the first batch."""

    source: Samples
    teacher: nn.Module
    task: Task = CLASSIFICATION

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    @torch.no_grad()
    def labels(self) -> np.ndarray:
        """What the teacher, in eval mode, gives each image, `(n, ...)`, in the parts that `judge` takes."""
        device = next(self.teacher.parameters()).device
        batches = (self.source.batch(some)[0].to(device) for some in reads(self.source))
        found = [self.task.labels(self.teacher(part)).cpu() for images in batches for part in parts(images)]
        return torch.cat(found).numpy()

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """The source's inputs `(n, c, h, w)`, and the teacher's answers `(n, ...)`."""
        images, _ = self.source.batch(indices, augment, part)
        return images, torch.from_numpy(self.labels[indices[part]])


@dataclass(frozen=True)
class ResizedSamples:
    """The images of `source` resized to `shape` `(c, h, w)`; their mean stands for all channels if the number differs.

    The labels are the source's own and mean nothing to the teacher.
    """

    source: Samples
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Inputs `(n, c, h, w)` float32 and the source's labels `(n,)`."""
        images, labels = self.source.batch(indices, augment, part)
        channels, height, width = self.shape
        if images.shape[1] != channels:
            images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        if images.shape[2:] != (height, width):
            images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        return images.contiguous(), labels

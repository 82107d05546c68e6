"""Picture files: decoded to red, green and blue of 8 bits, whatever their mode, and prepared for the network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from search import cache
from search.base import DataError
from search.spec.schema import DataSpec
from search.workload.zoo import imported_timm

Interpolation: TypeAlias = Literal["nearest", "nearest-exact", "bilinear", "bicubic"]
TIMM = "timm:"
"""The beginning of a preset that is timm's."""

MASK_MODES = ("1", "L", "P")
"""Pillow's modes of one number of up to 8 bits per pixel."""

DEPTHS = {"PNG": 16, "PPM": 16}
"""Bits of the grey values that Pillow gives as 32-bit integers, by formats that say them."""


@dataclass(frozen=True)
class Preparation:
    """The shorter side is resized to `resize` (8/7 of `size` if None), the middle cropped to `size`, then normalised.

    The mean and deviation are of red, green and blue in [0, 1]; ImageNet's unless others are given.
    """

    size: int = 224
    resize: int | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"

    def __call__(self, image: Tensor, draw: np.ndarray | None) -> Tensor:
        """Prepare `image` `(3, h, w)` uint8; with four draws from [0, 1) it is cropped and mirrored by them."""
        from torchvision.transforms.v2 import functional as tv

        pixels = tv.to_dtype(self._shaped(image, draw, self.interpolation), torch.float32, scale=True)
        normalised: Tensor = tv.normalize(pixels, list(self.mean), list(self.std))
        return normalised

    def mask(self, mask: Tensor, draw: np.ndarray | None) -> Tensor:
        """Shape the classes of pixels `(1, h, w)` as their image is shaped: `(size, size)` int64."""
        return self._shaped(mask, draw, "nearest-exact")[0].long()

    def _shaped(self, image: Tensor, draw: np.ndarray | None, interpolation: Interpolation) -> Tensor:
        """Resize and crop `image` `(c, h, w)`, by the draws if there are any."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as tv

        way: dict[str, Any] = {"interpolation": InterpolationMode(interpolation), "antialias": True}
        if draw is None:
            image = tv.resize(image, [self.resize or self.size * 8 // 7], **way)
            middle: Tensor = tv.center_crop(image, [self.size, self.size])
            return middle
        height, width = image.shape[-2:]
        side = max(1, round((0.08 + 0.92 * draw[0]) ** 0.5 * min(height, width)))
        top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
        image = tv.resized_crop(image, top, left, side, side, [self.size, self.size], **way)
        mirrored: Tensor = tv.horizontal_flip(image) if draw[3] < 0.5 else image
        return mirrored


def preparation(settings: DataSpec) -> Preparation:
    """The preparation that a spec asks for: by its keys, or as torchvision or timm does it for a network's weights.

    Raises:
        DataError: there are no such weights, or they are no classifier's.
    """
    if settings.preset is not None:
        return _preset(settings.preset)
    keys = ("resize", "mean", "std", "interpolation")
    given = {key: value for key in keys if (value := getattr(settings, key)) is not None}
    return Preparation(settings.crop or settings.size, **given)


def _preset(name: str) -> Preparation:
    import torchvision

    if name.startswith(TIMM):
        return _timm_preset(name.removeprefix(TIMM))
    try:
        found = torchvision.models.get_weight(name).transforms()
        (size,), (resize,) = found.crop_size, found.resize_size
        return Preparation(size, resize, tuple(found.mean), tuple(found.std), found.interpolation.value)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"data.preset is {name!r}, which is no torchvision weights of a classifier: {error}; expected a name such "
            "as ResNet50_Weights.IMAGENET1K_V2 or timm:resnet50; correct it, or give mean, std, resize, crop and "
            "interpolation"
        ) from error


def _timm_preset(name: str) -> Preparation:
    """The preparation that timm evaluates its pretrained network of this name with."""
    try:
        found = imported_timm().get_pretrained_cfg(name)
        size = found.input_size[-1]
        if found.interpolation not in get_args(Interpolation):
            raise ValueError(f"its interpolation is {found.interpolation}")
        mean, std = tuple(found.mean), tuple(found.std)
        return Preparation(size, math.floor(size / found.crop_pct), mean, std, found.interpolation)
    except (ValueError, AttributeError, RuntimeError, TypeError) as error:
        raise DataError(
            f"data.preset is {TIMM + name!r}, which names no pretrained network of timm: {error}; expected a name such "
            "as timm:resnet50.a1_in1k; correct it, or give mean, std, resize, crop and interpolation"
        ) from error


def decode(path: str, *, roughly: bool = False) -> np.ndarray:
    """Read a picture as `(h, w, 3)` uint8; `roughly` reads a JPEG at an eighth of its size, to see whether it is whole.

    Transparency is dropped, as torchvision does.

    Raises:
        DataError: it cannot be read, or its values have no known range.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's words about its own conversions name no file
            with Image.open(path) as picture:
                if roughly:
                    picture.draft("RGB", (1, 1))
                return _to_rgb(picture)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"the picture {path} is too large: {error}; expected at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; "
            "make it smaller or remove it"
        ) from error
    except Exception as error:
        raise DataError(
            f"cannot read the picture {path}: {error}; expected a file such as JPEG or PNG; mend or remove it"
        ) from error


def decode_mask(path: str) -> np.ndarray:
    """Read a mask as `(h, w)` uint8: the values of its pixels, of a palette their numbers.

    Raises:
        DataError: it cannot be read, or its values are no classes.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.mode not in MASK_MODES:
                raise ValueError(f"its mode is {picture.mode!r}, of {', '.join(MASK_MODES)} that hold classes")
            return np.array(picture).astype(np.uint8)
    except Exception as error:
        raise DataError(
            f"cannot read the mask {path}: {error}; expected a PNG with one number per pixel, the class from 0, and "
            "255 where none counts; mend or remove it"
        ) from error


def _to_rgb(picture: Any) -> np.ndarray:
    """Return the pixels of an open picture; raises `ValueError` if the range of its values is not known."""
    mode = picture.mode
    if not (mode.startswith("I") or mode == "F"):
        return np.array((picture.convert("RGBA") if mode == "P" else picture).convert("RGB"))
    values = np.array(picture)
    low, high = values.min(), values.max()
    if mode.startswith("I;16") or (mode == "I" and picture.format in DEPTHS):
        grey = values.astype(np.int64) >> 8
    elif mode == "F" and low >= 0 and high <= 1:
        grey = np.round(values * 255)
    else:
        raise ValueError(
            f"its mode is {mode!r} with values from {low:g} to {high:g}, and only 8 or 16 bits, or floats from 0 to 1, "
            "have a known range"
        )
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def check_pictures(paths: Sequence[str], tell: Callable[[int, int], None]) -> None:
    """Decode every picture once, and remember in the cache that it was: a bad one must not end a search that runs.

    Raises:
        DataError: one cannot be used; the message names it.
    """
    stats = [(path, Path(path).stat()) for path in paths]
    key = cache.digest(*(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in stats))
    seen = cache.folder() / "pictures" / f"{key}.json"
    if seen.is_file():
        return
    with ThreadPoolExecutor(4) as pool:
        for done, _ in enumerate(pool.map(_look, paths), start=1):
            if done % 1000 == 0 or done == len(paths):
                tell(done, len(paths))
    cache.keep_json(seen, {"pictures": len(paths)})


def _look(path: str) -> None:
    decode(path, roughly=True)

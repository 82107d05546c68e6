"""What a label is: the number of a class, a map of them, or numbers of any shape, as the task of a search has it."""

from __future__ import annotations

import operator
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from methods.training.task import IGNORED
from search.base import DataError

Form: TypeAlias = Literal["class", "map", "numbers"]
"""`class`: an integer `()`; `map`: integers `(h, w)`, `IGNORED` where none counts; `numbers`: floats `(...)`."""

EXPECTED: dict[Form, str] = {
    "class": "an integer label",
    "map": "a map of integer labels (h, w) as large as the image",
    "numbers": "a tensor of numbers",
}
"""What an item of a data set is to have beside its image."""

ARRAYS: dict[Form, tuple[str, str]] = {
    "class": ("(n,)", "integers"),
    "map": ("(n, h, w)", "integers"),
    "numbers": ("(n, ...)", "real numbers"),
}
"""The shape and the type of an array of labels."""

OUTPUTS: dict[Form, str] = {
    "class": "logits (n, classes)", "map": "logits (n, classes, h, w)", "numbers": "a tensor (n, ...)",
}  # fmt: skip
"""The outputs of a network that is taught with such labels."""

OUTPUT_AXES: dict[Form, tuple[int, ...]] = {"class": (2,), "map": (4,), "numbers": (1, 2, 3, 4, 5)}
"""How many axes those may have."""


def read_label(label: Any, form: Form, image: Tensor) -> Tensor:
    """The label of an `image` `(c, h, w)` as a tensor: int64 unless it is numbers, which are float32.

    Raises:
        ValueError, TypeError: it is none.
    """
    if form == "class":
        return torch.tensor(operator.index(label))
    found = torch.as_tensor(label).detach().cpu()
    if form == "numbers":
        if not torch.isfinite(found := found.float()).all():
            raise ValueError("a label holds NaN or infinity")
        return found
    if found.is_floating_point() or found.is_complex() or found.shape != image.shape[1:]:
        raise ValueError(f"a label is {found.dtype} {tuple(found.shape)} beside an image {tuple(image.shape)}")
    return found.long()


def check_labels(images: np.ndarray, labels: np.ndarray, form: Form) -> np.ndarray:
    """The labels of `images` `(n, c, h, w)` that a data factory gave, as int64 or float32.

    Raises:
        DataError: they are not of this form.
    """
    shape, kind = ARRAYS[form]
    fits = {
        "class": labels.shape == images.shape[:1],
        "map": labels.shape == images.shape[:1] + images.shape[2:],
        "numbers": labels.shape[:1] == images.shape[:1],
    }
    if images.ndim != 4 or not fits[form]:
        raise DataError(
            f"the data factory gave images {images.shape} and labels {labels.shape}; expected (n, c, h, w) and {shape}"
            "; return arrays of these shapes"
        )
    if images.dtype.kind not in "buif" or labels.dtype.kind not in ("buif" if form == "numbers" else "bui"):
        raise DataError(
            f"the data factory gave images of {images.dtype} and labels of {labels.dtype}; expected real numbers and "
            f"{kind}; convert them"
        )
    if form == "numbers" and not np.isfinite(labels).all():
        raise DataError("a label from the data factory is NaN or infinite; expected finite values; clean the data")
    return labels.astype(np.float32 if form == "numbers" else np.int64)


def numbered(labels: np.ndarray, form: Form) -> np.ndarray:
    """The class numbers among labels `(n, ...)`, as one row; of maps those that count."""
    flat = labels.reshape(-1)
    return flat[flat != IGNORED] if form == "map" else flat

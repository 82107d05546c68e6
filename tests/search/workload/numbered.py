"""Images of one pixel that holds the number of the image, and their splits."""

from __future__ import annotations

from typing import Any

import numpy as np

from methods.training import Samples
from search.workload.data.samples import Arrays
from search.workload.data.splits import Splits, split


def numbered(count: int, *, classes: int = 3) -> Arrays:
    """Images of one pixel that holds the image's own number, so that a batch says which images it is made of."""
    return Arrays(np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1), np.arange(count) % classes)


def numbers(samples: Samples) -> list[int]:
    return [int(value) for value in samples.batch(np.arange(len(samples)))[0].flatten()]


def parted(pool: Samples, test: Samples | None = None, **changes: Any) -> Splits:
    return split(pool, test, **({"validation": 0.2, "calibration": 5, "seed": 0} | changes))

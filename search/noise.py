"""The noise of a top-1: how far it may lie from what more images would tell, alone and beside another's.

It is known where every image counts alone, as for top-1. A metric of the user's own tells nothing of single images.
"""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np

MOST_IMAGES = 40_000
"""The images of which it is kept whether each was classified right: as many as a tag of MLflow's holds."""


def packed(hits: np.ndarray) -> str:
    """Write `hits` `(n,)`, whether each image was classified right, as text: `n`, and bits in base64.

    >>> unpacked(packed(np.array([True, False, True])))
    array([ True, False,  True])
    """
    kept = np.asarray(hits[:MOST_IMAGES], dtype=bool)
    return f"{len(kept)}:{base64.b64encode(zlib.compress(np.packbits(kept).tobytes(), 9)).decode('ascii')}"


def unpacked(text: str) -> np.ndarray:
    """Read what `packed` wrote.

    Raises:
        ValueError: it did not write this.
    """
    count, _, code = text.partition(":")
    try:
        bits = np.frombuffer(zlib.decompress(base64.b64decode(code, validate=True)), np.uint8)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"{text[:40]!r} holds no images; expected what `packed` wrote") from error
    return np.unpackbits(bits, count=int(count)).astype(bool)


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of `values` `(n,)`, which may tell whether images were right.

    >>> round(standard_error(np.arange(100) < 90), 4)
    0.0302
    """
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def is_noise(best: str, other: str) -> bool:
    """Whether `best` lies above `other` by no more than one standard error of the difference.

    The difference is taken image by image: what both get wrong says nothing of which is better.
    Source: McNemar 1947, the pairs; the rule of one standard error: Breiman et al. 1984, section 3.4.3.
    """
    ours, theirs = unpacked(best), unpacked(other)
    if len(ours) != len(theirs):
        return False
    difference = ours.astype(float) - theirs.astype(float)
    return bool(difference.mean() <= standard_error(difference) * (1 + 1e-9))

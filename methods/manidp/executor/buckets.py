"""The decisions of an executor before it runs: channel sets worth keeping ready, and layers where cutting pays.

The masks of calibration images are clustered; the union of a cluster is a bucket, which serves every image whose active
channels it contains. Whether fewer channels are faster at all is measured, layer by layer: MACs do not tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from torch import Tensor

from methods.manidp.gates import CLAMP

REPEATS = 9
"""Timed calls per entry of the latency table, the fastest of which counts."""

SHARES = (0.25, 0.5, 0.75, 0.875)
"""Of a layer's channels, at which the latency table has its entries."""


Convolution: TypeAlias = Callable[[Tensor], Tensor]
"""A weight to the layer's output, or to the same weight in another layout."""


@dataclass(frozen=True)
class Entry:
    """Milliseconds of one convolution, batch 1: with all output channels, and with `channels` of them.

    `ready_ms` is with weights cut beforehand, `gathered_ms` with choosing the channels and cutting the weights on call.
    """

    channels: int
    dense_ms: float
    ready_ms: float
    gathered_ms: float


def round_up(count: int, multiple: int) -> int:
    """The next multiple.

    >>> [round_up(count, 16) for count in (1, 16, 17)]
    [16, 16, 32]
    """
    return -(-count // multiple) * multiple


def best_rows(saliency: Tensor, on: Tensor, count: int) -> Tensor:
    """The numbers `(count,)`, in no order, of all channels `on` `(c,)` and then of those of the largest saliency.

    >>> sorted(best_rows(torch.tensor([0.3, 9.0, 0.5, 0.1]), torch.tensor([False, False, True, False]), 2).tolist())
    [1, 2]
    """
    return (saliency + 2 * CLAMP * on).topk(count, sorted=False).indices


def unions(saliency: Tensor, on: Tensor, count: int, multiple: int) -> list[Tensor]:
    """At most `count` + 1 sets of channels, smallest first: the unions of the masks of similar images, and of all.

    Sets are filled with the next best channels up to a `multiple`; one that would hold every channel is left out.

    Args:
        saliency: `(n, c)`, of n images.
        on: their masks `(n, c)`.
        count: the number of clusters looked for.
        multiple: of the sizes.

    Source: none; the authors publish no executor. Clusters are of complete linkage, so that no member is far from
        another, by the share of channels in which two masks differ.
    """
    if count < 1 or len(on) < 2:
        return []
    labels = fcluster(linkage(pdist(on.numpy(), "hamming"), "complete"), count, "maxclust")
    clusters = [labels == label for label in np.unique(labels)] + [labels > 0]
    found = set()
    for members in map(torch.from_numpy, clusters):
        union = on[members].any(0)
        size = round_up(int(union.sum()), multiple)
        if size < on.shape[1]:
            found.add(tuple(sorted(best_rows(saliency[members].mean(0), union, size).tolist())))
    return [torch.tensor(rows) for rows in sorted(found, key=lambda rows: (len(rows), rows))]


@torch.no_grad()
def latency_table(weight: Tensor, multiple: int, conv: Convolution, packed: Convolution) -> list[Entry]:
    """Time a convolution with all rows of `weight` `(o, i, h, w)` and with some, on this machine, right now.

    The entries are at shares of `o`, rounded up to `multiple`; shares that leave nothing to skip have none.
    """
    saliency, nothing = torch.rand(len(weight)), torch.zeros(len(weight), dtype=torch.bool)
    sizes = sorted({round_up(int(share * len(weight)), multiple) for share in SHARES if share * len(weight) >= 1})
    whole = packed(weight)
    table = []
    for size in (size for size in sizes if size < len(weight)):
        ready = packed(weight[:size].clone())
        dense_ms, ready_ms, gathered_ms = _fastest(
            lambda: conv(whole),
            lambda ready=ready: conv(ready),  # type: ignore[misc]
            lambda size=size: conv(weight.index_select(0, best_rows(saliency, nothing, size))),  # type: ignore[misc]
        )
        table.append(Entry(size, dense_ms, ready_ms, gathered_ms))
    return table


def limits(table: Sequence[Entry]) -> tuple[int, int]:
    """The most channels of a bucket, and of a gathered set, that are faster than all; 0 if none are.

    >>> limits([Entry(16, 1.0, 0.5, 0.9), Entry(32, 1.0, 0.8, 1.1)])
    (32, 16)
    """
    ready = [entry.channels for entry in table if entry.ready_ms < entry.dense_ms]
    gathered = [entry.channels for entry in table if entry.gathered_ms < entry.dense_ms]
    return max(ready, default=0), max(gathered, default=0)


def _fastest(*calls: Callable[[], object]) -> list[float]:
    """The milliseconds of the fastest of some calls of each, taken in turn after a first one that is not timed."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS + 1):
        for times, call in zip(taken, calls, strict=True):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
    return [min(times[1:]) for times in taken]

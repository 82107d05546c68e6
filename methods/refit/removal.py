"""The order in which channels are best removed, and the error of every width: by elimination on real inputs.

A channel is worth what the layers that read it cannot make up for from the others. With M the second moments of all
that a layer reads, H its inverse, W the layer's weight and B the columns that a channel owns there, removing the
channel and fitting the other columns anew costs exactly tr(W[:,B] (H[B,B])^-1 W[:,B]') of the output's energy. What
costs least goes first; the rest is brought up to date, and so on to the last channel. One run gives an order and, as
running sums, the error of every width, so it serves every budget.

Source: Optimal Brain Surgeon (Hassibi and Stork 1993), by blocks of columns.
Differs: channels that several layers read, as those of a residual trunk, go by the sum of the layers' relative errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import ScoreError, Scores, Shard, SharedShard
from methods.network import ChannelGroup, Profile
from methods.network.cut import entries
from methods.network.groups import Member
from methods.refit.bundles import WORK_PER_SECOND, bundles
from methods.refit.moments import IMAGES, ROWS, ROWS_PER_COLUMN, second_moments

KIND = "removal"
"""The first item of these shards, which are the same for every method that cuts channels."""

NARROW, ROUNDS = 1 << 10, 64
"""Columns up to which channels go one by one; for wider readers, many at a time, in so many rounds."""

WIDEST = 1 << 13
"""Columns beyond which a reader is taken channel by channel, as if it could make up for none from the others."""

_Readers: TypeAlias = tuple[tuple[str, int, int], ...]
_Task: TypeAlias = tuple[str, int, int, _Readers]
"""A group's name, width and multiple; of each place that reads it, the layer, first entry and entries per channel."""


def removal_shards(profile: Profile, images: int) -> list[Shard]:
    """The work of all groups that may be cut, `(KIND, task, ...)`, the longest first."""
    tasks = [_weighed(group, profile, min(images, IMAGES)) for group in profile.groups if group.fixed is None]
    return [SharedShard(shard) for _, shard in bundles(KIND, tasks, macs=min(images, IMAGES) * profile.macs)]


def removal_keys(profile: Profile) -> list[str]:
    """The names of all scores, in the order of the groups."""
    names = [group.name for group in profile.groups if group.fixed is None]
    return [_key(name, part) for name in names for part in ("order", "errors")]


@torch.no_grad()
def score_removal(shard: Shard, teacher: nn.Module, calibration: Tensor) -> Scores:
    """Per group, `order` `(runs,)`: its runs of `multiple` channels as they go; and `errors` `(runs + 1,)`.

    `errors[k]` is the energy lost with the first k runs, as a share of each reader's, summed over the readers: 0 at
    first, and never falling.

    Raises:
        ScoreError: what a layer reads, or its weight, is not finite.
    """
    _, *tasks = shard
    layers = {reader[0]: teacher.get_submodule(reader[0]) for *_, readers in tasks for reader in readers}
    narrow = [name for name, layer in layers.items() if _columns(layer) <= WIDEST]
    moments = second_moments(teacher, narrow, calibration) if narrow else {}
    found: dict[str, np.ndarray] = {}
    for name, width, multiple, readers in tasks:
        parts = []
        for reader, places in _by_layer(readers).items():
            layer = layers[reader]
            runs = [_columns_of(layer, start, columns, width // multiple, multiple) for start, columns in places]
            if reader in moments:
                parts.append(_reader(layer, torch.cat(runs, 1), moments[reader]))
                continue
            for columns_of_run in runs:
                block = int(columns_of_run[0, 0]), *columns_of_run.shape
                own = second_moments(teacher, [reader], calibration, blocks={reader: block})
                parts.append(_reader(layer, columns_of_run, own[reader]))
        order, errors = _eliminated(parts, width // multiple)
        if not np.isfinite(errors).all():
            raise ScoreError(
                f"the errors of channel group {name!r} are not finite, expected numbers; check the teacher's weights"
            )
        found |= {_key(name, "order"): order, _key(name, "errors"): errors}
    return found


def kept_runs(scores: Scores, group: ChannelGroup, width: int) -> list[int]:
    """The channels, rising, that are left of a group at a width."""
    gone = (group.width - width) // group.multiple
    runs = np.sort(scores[_key(group.name, "order")][gone:])
    kept: list[int] = entries(Member("", "out", 0, group.multiple), runs).tolist()
    return kept


def errors_of(scores: Scores, group: ChannelGroup, widths: Sequence[int]) -> np.ndarray:
    """The error of each of `widths` of a group, float64."""
    gone = [(group.width - width) // group.multiple for width in widths]
    errors: np.ndarray = scores[_key(group.name, "errors")][gone]
    return errors


def _key(name: str, part: str) -> str:
    return f"{name}|{part}"


def _by_layer(readers: _Readers) -> dict[str, list[tuple[int, int]]]:
    """The first entries and entries per channel by layer: one that reads a group at several places is one reader."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, *place in readers:
        found.setdefault(name, []).append((place[0], place[1]))
    return found


def _weighed(group: ChannelGroup, profile: Profile, images: int) -> tuple[_Task, float, int]:
    """A group's task with its predicted seconds and the bytes that it takes."""
    inputs = [member for member in group.members if member.axis == "in"]
    task = group.name, group.width, group.multiple, tuple((m.module, m.start, m.columns) for m in inputs)
    work, size = 0, 0
    for member in inputs:
        layer = profile.layer(member.module)
        columns, outputs = prod(layer.weight_shape[1:]), layer.weight_shape[0]
        if columns <= WIDEST:
            positions = images * layer.macs // prod(layer.weight_shape)
            rows = min(positions, max(ROWS, ROWS_PER_COLUMN * columns))
            work += columns**2 * (rows + columns + group.width * member.columns + outputs)
            size += 16 * columns**2
    return task, work / WORK_PER_SECOND, size


def _columns(layer: nn.Module) -> int:
    assert isinstance(layer.weight, Tensor)
    return layer.weight[0].numel()


def _columns_of(layer: nn.Module, start: int, per_channel: int, runs: int, multiple: int) -> Tensor:
    """The columns `(runs, b)` of a layer's weight that each run of a group owns, from input `start` on."""
    assert isinstance(layer.weight, Tensor)
    per_entry = layer.weight[0, 0].numel()
    size = multiple * per_channel * per_entry
    return start * per_entry + torch.arange(runs * size, device=layer.weight.device).reshape(runs, size)


@dataclass
class _Reader:
    """A layer that reads a group: its weight `(f, n)`, the inverse `(n, n)` of its inputs' moments, its energy.

    `columns` `(runs, b)` are those of each run, and `place` `(n,)` tells where a column is by now, -1 if it is
    removed: whenever half of the columns are, they are taken out. Of a layer taken run by run, `moments` `(runs, b,
    b)` are the runs' own, and there is no inverse.
    """

    weight: Tensor
    inverse: Tensor | None
    moments: Tensor
    energy: float
    columns: Tensor
    place: Tensor

    def costs(self, runs: Tensor) -> Tensor:
        """The relative energy that each of `runs` `(r,)` costs to remove, float64 `(r,)`."""
        columns = self.place[self.columns[runs]]
        weights = self.weight[:, columns].transpose(0, 1)
        if self.inverse is None:
            lost = (weights @ self.moments[runs]) * weights
        else:
            own = self.inverse[columns[:, :, None], columns[:, None, :]]
            lost = weights * torch.linalg.solve(own, weights.mT).mT
        return lost.sum((1, 2)).clamp(min=0) / self.energy

    def remove(self, runs: Tensor) -> float:
        """Take `runs` out, all at once, and fit the rest anew; return the relative energy it cost."""
        gone = self.place[self.columns[runs]].flatten()
        if self.inverse is None:
            return float(self.costs(runs).sum())
        across = self.inverse[gone]
        solved = torch.linalg.solve(across[:, gone], torch.cat((self.weight[:, gone].mT, across), 1))
        lost = float((self.weight[:, gone] * solved[:, : len(self.weight)].mT).sum()) / self.energy
        solved = solved[:, len(self.weight) :]
        self.weight = self.weight - self.weight[:, gone] @ solved
        self.inverse.addmm_(across.mT, solved, alpha=-1)  # what is gone comes to zero
        self.place[self.columns[runs]] = -1
        held = self.place >= 0
        if 2 * int(held.sum()) <= len(self.inverse):
            stays = self.place[held]
            self.weight, self.inverse = self.weight[:, stays], self.inverse[stays][:, stays]
            self.place[held] = torch.arange(len(stays), device=gone.device)
        return max(0.0, lost)


def _reader(layer: nn.Module, columns: Tensor, moments: Tensor) -> _Reader:
    """A layer whose inputs have these moments: of all columns `(1, n, n)`, or of each run's own `(runs, b, b)`."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.double().flatten(1)
    place = torch.arange(weight.shape[1], device=weight.device)
    if weight.shape[1] > WIDEST:
        own = weight[:, columns].transpose(0, 1)
        energy, inverse = ((own @ moments) * own).sum(), None
    else:
        energy = ((weight @ moments[0]) * weight).sum()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[0]))
    return _Reader(weight, inverse, moments, max(float(energy), 1e-300), columns, place)


def _eliminated(readers: Sequence[_Reader], runs: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which `runs` runs go, and the running sums of what they cost."""
    at_once = 1
    if any(reader.inverse is not None and len(reader.inverse) > NARROW for reader in readers):
        at_once = -(-runs // ROUNDS)
    left = torch.arange(runs, device=readers[0].place.device)
    order, errors = list[int](), [0.0]
    while len(left):
        costs = torch.stack([reader.costs(left) for reader in readers]).sum(0)
        chosen = torch.argsort(costs, stable=True)[:at_once]
        shares = costs[chosen] / max(float(costs[chosen].sum()), 1e-300)
        lost = sum(reader.remove(left[chosen]) for reader in readers)
        for run, share in zip(left[chosen].tolist(), shares.tolist(), strict=True):
            order.append(run)
            errors.append(errors[-1] + share * lost)
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[chosen] = False
        left = left[stays]
    return np.array(order, dtype=np.int64), np.array(errors)

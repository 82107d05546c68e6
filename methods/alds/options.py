"""The options of a layer under ALDS: every affordable rank with its error and cost, and the best choice of them.

Also the predicted time of finding those errors, by which the scoring work is shared out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np

from methods.alds.knapsack import least_sum
from methods.alds.spectra import encoder_owns
from methods.alds.staircase import joint, lexi
from methods.alds.whitening import FITTED
from methods.base import Budget, Infeasible, grid_step
from methods.network import Layer, Profile
from methods.network.reach import UNITS, out_of_reach
from methods.refit.bundles import WORK_PER_SECOND
from methods.refit.moments import ROWS, ROWS_PER_COLUMN, WIDE

WORK_PER_CALL = 2e6
"""The fixed price of one small eigenvalue problem, in multiply-adds."""


class Option(NamedTuple):
    """One replacement of a layer, with its relative error and cost; rank 0 is the layer itself."""

    error: float
    macs: int
    params: int
    slices: int
    rank: int
    scheme: int

    def to_json(self, name: str) -> dict[str, Any]:
        return {"name": name, "slices": self.slices, "rank": self.rank, "scheme": self.scheme}


def options_of(layer: Layer, errors: np.ndarray, slices: int, scheme: int, channels: int) -> list[Option]:
    """The decompositions of every rank on the device's grid that cost no more than the layer and are not full rank."""
    macs, params = _unit_cost(layer, slices, scheme)
    full = min(_folded(layer, slices, scheme))
    step = grid_step(slices * full, channels)
    step //= gcd(step, slices)
    bias = layer.params - prod(layer.weight_shape)
    affordable = min(len(errors) - 1, full - 1, layer.macs // macs, (layer.params - bias) // params)
    return [
        Option(float(errors[rank]), rank * macs, rank * params + bias, slices, rank, scheme)
        for rank in range(step, affordable + 1, step)
    ]


def _unit_cost(layer: Layer, slices: int, scheme: int) -> tuple[int, int]:
    """MACs and params of one rank: those of the decoder's kernel over `slices`, and of the encoder's.

    The encoder strides over the axes it owns only, so its map lies between the layer's input and its output.
    """
    outputs, channels = layer.weight_shape[0], layer.weight_shape[1] * layer.groups
    kernel = layer.weight_shape[2:] or (1, 1)
    owns = encoder_owns(scheme)
    encoder = channels * prod(size for size, is_owned in zip(kernel, owns, strict=True) if is_owned)
    decoder = slices * outputs * prod(size for size, is_owned in zip(kernel, owns, strict=True) if not is_owned)
    positions = layer.macs // prod(layer.weight_shape)
    maps = positions // prod(layer.out_hw)
    sides = zip(layer.in_hw, layer.out_hw, owns, strict=True)
    encoded = maps * prod(after if is_owned else before for before, after, is_owned in sides) if scheme else positions
    return encoder * encoded + decoder * positions, encoder + decoder


def foldings(layer: Layer, schemes: Sequence[int]) -> list[int]:
    """Schemes that differ on this layer: an axis of size 1 is the encoder's, which strides early.

    A layer that runs several times keeps to scheme 0: the cost of the others needs the size of every map it reads.
    """
    kernel = layer.weight_shape[2:] or (1, 1)
    mask = 0 if layer.calls > 1 else (kernel[0] > 1) | (kernel[1] > 1) << 1
    return sorted({scheme & mask for scheme in schemes})


def _folded(layer: Layer, slices: int, scheme: int) -> tuple[int, int]:
    """Rows and columns of one slice's matrix, see `spectra.fold`."""
    outputs, channels = layer.weight_shape[0] // layer.groups, layer.weight_shape[1] // slices
    kernel = layer.weight_shape[2:] or (1, 1)
    rows = outputs * prod(size for size, owned in zip(kernel, encoder_owns(scheme), strict=True) if not owned)
    return rows, outputs * channels * prod(kernel) // rows


def spectrum_seconds(layer: Layer, slices: int, scheme: int) -> float:
    """Predicted time of one task's Gram matrices and eigenvalues."""
    small, large = sorted(_folded(layer, slices, scheme))
    return (layer.groups * slices * (small**2 * large + 4 / 3 * small**3) + WORK_PER_CALL) / WORK_PER_SECOND


def fitting_seconds(layer: Layer, counts: Sequence[int], images: int) -> float:
    """Predicted time of a layer's second moments and its fitted curves for these slice counts."""
    outputs, columns = layer.weight_shape[0] // layer.groups, prod(layer.weight_shape[1:])
    positions = images * layer.macs // prod(layer.weight_shape)
    rows = min(positions, max(ROWS, ROWS_PER_COLUMN * columns))
    work = columns**2 * rows // (4 if columns >= WIDE else 2) + outputs * columns**2
    for slices in counts:
        small = min(outputs, columns // slices)
        work += slices * (9 * small**3) + outputs * columns * (columns // slices + small)
        if slices > 1:
            encoded = min(outputs * columns // (slices * outputs + columns), small) * slices
            work += encoded * (columns * (columns + encoded) // slices + encoded * outputs + encoded**2) // 2
    return (layer.groups * work + len(counts) * WORK_PER_CALL) / WORK_PER_SECOND


def moment_bytes(layer: Layer) -> int:
    return 8 * layer.groups * prod(layer.weight_shape[1:]) ** 2


ADDITIVE = ("fro", *FITTED)
"""The measures whose squares add up over layers; the others are bounds, of which the largest counts."""


def solve(
    table: Sequence[Sequence[Option]], left: Mapping[str, int], measure: str
) -> tuple[list[Option], float, float]:
    """Choose one option per layer within the costs `left` for these layers; return the loss and a bound on it, too.

    The loss is the sum of the squared errors for measures that add up, else the largest error. Without a limit, layers
    stay as they are.

    Raises:
        Infeasible: no choice fits.
    """
    if not left:
        return [options[0] for options in table], 0.0, 0.0
    if measure in ADDITIVE:
        rows = [[(option.error**2, tuple(getattr(option, cost) for cost in left)) for option in row] for row in table]
        picks, loss, bound = least_sum(rows, list(left.values()))
    else:
        picks = _least_largest(table, left)
        loss = bound = max((options[pick].error for options, pick in zip(table, picks, strict=True)), default=0.0)
    return [options[pick] for options, pick in zip(table, picks, strict=True)], loss, bound


def _least_largest(table: Sequence[Sequence[Option]], left: Mapping[str, int]) -> list[int]:
    if len(left) == 2:
        both = [[(option.error, (option.macs, option.params)) for option in options] for options in table]
        return joint(both, (left["macs"], left["params"]))
    ((cost, limit),) = left.items()
    return lexi([[(option.error, getattr(option, cost)) for option in options] for options in table], limit)


def ranks_out_of_reach(
    table: Mapping[Layer, Sequence[Option]],
    profile: Profile,
    budget: Budget,
    fixed: Mapping[str, int],
    *,
    skips: bool,
) -> Infeasible:
    """Build the error for a budget that no options meet: it names the layers that would still cost most.

    `fixed` holds, by cost, the share of the layers outside `table` and of all that belongs to no layer. `skips` says
    whether the user protects layers.
    """
    least, why = {}, {}
    for cost in UNITS:
        floors = {layer.name: min(getattr(option, cost) for option in options) for layer, options in table.items()}
        floors["(all that is not decomposed)"] = fixed[cost]
        largest = sorted(floors, key=lambda name: -floors[name])[:5]
        least[cost] = sum(floors.values())
        why[cost] = "most of it in " + ", ".join(f"{name} {floors[name]:,}" for name in largest)
        whole = [f"{layer.name}: {layer.whole}" for layer in profile.layers if layer.whole]
        if whole:
            why[cost] += f"; {len(whole)} layers are kept whole ({'; '.join(whole[:3])})"
    advice = "raise it, skip fewer layers or try another method" if skips else "raise it or try another method"
    return out_of_reach("alds", budget, profile, least, why=why, advice=advice)

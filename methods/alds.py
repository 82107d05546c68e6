"""ALDS: every layer becomes a grouped, thinner layer and a 1x1 one, with slices and ranks chosen for all at once.

A layer's input channels are cut into slices and each slice's weight is truncated to a low rank: the encoder is the
grouped convolution of the slices, the decoder mixes them. The error of every (slices, rank, scheme) follows from
singular values alone, so no data is needed, and the choice for a budget is exact (`staircase`).

Source: Liebenwein, Maalouf, Gal, Feldman, Rus 2021, "Compressing Neural Networks: Towards Determining the Optimal
Layer-wise Decomposition" (arXiv 2107.11442).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from methods import training
from methods.base import (
    Budget,
    Choice,
    Infeasible,
    KnobValue,
    Plan,
    ScoreError,
    Scores,
    Shard,
    defaults,
    grid_step,
)
from methods.profile import Layer, Profile
from methods.spectra import MEASURES, SCHEMES, curves, encoder_owns, obstacle_of
from methods.spectra import decompose as decompose
from methods.spectra import relative_errors as relative_errors
from methods.staircase import joint, lexi
from methods.staircase import minimax as minimax

BUNDLE_SECONDS = 0.2
"""Spectra are bundled up to this predicted time: far above what it costs to send a task."""
WORK_PER_SECOND = 2e10
WORK_PER_CALL = 2e6
"""One core's rate in the units of `_work`, and the fixed price of one small eigenvalue problem."""
PAPER_SLICES = (3, 5, 7, 9)
LARGEST_POWER = 16


@dataclass(frozen=True)
class ALDS:
    """Low-rank decomposition of every convolution and linear layer, by the largest relative error of a layer.

    `slices` are the slice counts tried where they divide a layer's input channels (None: powers of two up to 16 and
    the paper's); one slice always is. `schemes` are the foldings tried. `skip` names layers to leave alone.

    Source: Liebenwein et al. 2021: ALDS (scheme 0, a search from random starts) and ALDS+ (all schemes).
    Differs: the global problem is solved exactly, for MACs, params or both, and what is left of a budget is spent on
    the next largest error. The default measure is `rss`, an upper bound that charges for slices; the authors'
    `group_max` is a lower bound and buys too many.
    """

    slices: tuple[int, ...] | None = None
    schemes: tuple[int, ...] = SCHEMES
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.schemes or not set(self.schemes) <= set(SCHEMES):
            raise ValueError(f"schemes are {self.schemes}, expected some of {SCHEMES}; scheme 0 is the paper's")
        if self.slices is not None and min(self.slices, default=0) < 1:
            raise ValueError(f"slices are {self.slices}, expected counts of at least 1; leave them out for the default")

    @property
    def name(self) -> str:
        return "alds"

    @property
    def knobs(self) -> Mapping[str, Choice]:
        schemes = ("0", "all") if 0 in self.schemes and len(self.schemes) > 1 else ("all",)
        return {"measure": Choice(tuple(MEASURES), "rss"), "schemes": Choice(schemes, "all")}

    def accepts(self, profile: Profile) -> str | None:
        unknown = sorted(set(self.skip) - {layer.name for layer in profile.layers})
        if unknown:
            return f"skip names {', '.join(unknown)}, expected layers of the network; correct the names"
        if not self._eligible(profile):
            return "no layer is left to decompose, expected a Conv2d that is not depthwise or a Linear; skip fewer"
        return None

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """Bundles of (layer, slices, scheme) of at least `BUNDLE_SECONDS` predicted, the longest first."""
        tasks = sorted(self._tasks(profile), key=lambda task: -task[1])
        bundles: list[tuple[float, Shard]] = []
        bundle: Shard = ()
        seconds = 0.0
        for task, work in tasks:
            bundle, seconds = (*bundle, task), seconds + work / WORK_PER_SECOND
            if seconds >= BUNDLE_SECONDS:
                bundles.append((seconds, bundle))
                bundle, seconds = (), 0.0
        bundles.append((seconds, bundle))
        return [bundle for _, bundle in sorted(bundles, key=lambda item: -item[0]) if bundle]

    @torch.no_grad()
    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """The curves `(3, rank)` of each (layer, slices, scheme), see `spectra.curves`; rank 0 where it cannot be cut.

        Raises:
            ScoreError: a weight is not finite.
        """
        scores = {}
        for name, slices, scheme in shard:
            module = teacher.get_submodule(name)
            if obstacle_of(module) or _is_shared(module, teacher):
                scores[_key(name, slices, scheme)] = np.zeros((3, 0))
                continue
            weight = module.weight
            assert isinstance(weight, Tensor)
            if not bool(torch.isfinite(weight).all()):
                raise ScoreError(f"the weight of {name!r} holds NaN or infinity, expected numbers; retrain the teacher")
            groups = getattr(module, "groups", 1)
            scores[_key(name, slices, scheme)] = curves(weight, groups=groups, slices=slices, scheme=scheme)
        return scores

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """All curves, in the network's order.

        Raises:
            ScoreError: a curve is missing, or two of the same layer differ.
        """
        merged: dict[str, np.ndarray] = {}
        for key, curve in (item for partial in partials for item in partial.items()):
            if not np.array_equal(merged.setdefault(key, curve), curve):
                raise ScoreError(f"two scores of {key!r} differ, expected equal ones; score it again on one device")
        expected = [_key(*task) for task, _ in self._tasks(profile)]
        if missing := [key for key in expected if key not in merged]:
            raise ScoreError(
                f"{len(missing)} scores are missing, first {missing[0]!r}; score every shard before merging"
            )
        return {key: merged[key] for key in expected}

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """The plan of the least largest relative error within every limit, then of the least second largest, and so on.

        `loss` is the largest, proven least. No layer's replacement costs more than the layer, in MACs or in params.

        Raises:
            Infeasible: no plan fits; the message names what every limit could reach and the layers that cost most.
        """
        knobs = {**defaults(self), **knobs}
        table = self._table(scores, profile, budget, knobs)
        fixed = {cost: getattr(profile, cost) - sum(getattr(layer, cost) for layer in table) for cost in _COSTS}
        binding = {cost: limit for cost, limit in budget.limits().items() if limit < getattr(profile, cost)}
        try:
            chosen = _solve(list(table.values()), {cost: limit - fixed[cost] for cost, limit in binding.items()})
        except Infeasible:
            raise _infeasible(table, profile, budget, fixed) from None
        loss = max((option.error for option in chosen), default=0.0)
        pairs = [(layer, option) for layer, option in zip(table, chosen, strict=True) if option.rank]
        return Plan(
            method=self.name,
            macs=fixed["macs"] + sum(option.macs for option in chosen),
            params=fixed["params"] + sum(option.params for option in chosen),
            choices={"measure": knobs["measure"], "layers": [option.to_json(layer.name) for layer, option in pairs]},
            loss=loss,
            bound=loss,
            notes=_notes(scores),
        )

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        student = copy.deepcopy(teacher)
        modules = dict(student.named_modules(remove_duplicate=False))
        for choice in plan.choices["layers"]:
            layer = modules[choice["name"]]
            pair = decompose(layer, slices=choice["slices"], rank=choice["rank"], scheme=choice["scheme"])
            for name in (name for name, module in modules.items() if module is layer):
                parent, _, attribute = name.rpartition(".")
                setattr(student.get_submodule(parent), attribute, pair)
        return student

    def settle(self, student: nn.Module, plan: Plan, calibration: Tensor) -> None:
        """Re-estimates the norms' statistics; see `methods.training.recalibrate`."""
        training.recalibrate(student, calibration)

    def recover(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: training.Samples,
        recipe: training.Recipe,
        seed: int,
    ) -> Iterator[int]:
        return training.recover(student, teacher, data, recipe, seed)

    def _eligible(self, profile: Profile) -> list[Layer]:
        """Layers to decompose: all but depthwise convolutions and what the user protects."""
        kept = {layer.name for layer in profile.layers if layer.groups > 1 and layer.weight_shape[1] == 1} | {
            *self.skip
        }
        return [layer for layer in profile.layers if layer.name not in kept]

    def _tasks(self, profile: Profile) -> list[tuple[tuple[str, int, int], float]]:
        """Every (layer, slices, scheme) with its work, in the network's order; ties are settled by this order."""
        return [
            ((layer.name, slices, scheme), _work(layer, slices, scheme))
            for layer in self._eligible(profile)
            for slices, scheme in product(self._slice_counts(layer), _foldings(layer, self.schemes))
        ]

    def _slice_counts(self, layer: Layer) -> list[int]:
        channels = layer.weight_shape[1]
        divisors = [count for count in range(1, channels + 1) if channels % count == 0]
        if self.slices is not None:
            return [count for count in divisors if count == 1 or count in self.slices]
        powers = {count for count in divisors if count <= LARGEST_POWER and count & (count - 1) == 0}
        snapped = {min(divisors, key=lambda count: (abs(count - target), -count)) for target in PAPER_SLICES}
        return sorted(powers | snapped)

    def _table(
        self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]
    ) -> dict[Layer, list[_Option]]:
        """Each layer's options: itself, then all decompositions that enlarge nothing, by slices, scheme and rank."""
        table = {
            layer: [_Option(0.0, layer.macs, layer.params, slices=1, rank=0, scheme=0)]
            for layer in self._eligible(profile)
        }
        for layer, options in table.items():
            for slices, scheme in product(self._slice_counts(layer), _foldings(layer, self.schemes)):
                if knobs["schemes"] == "all" or scheme == 0:
                    curve, whole = (scores[_key(layer.name, count, scheme)] for count in (slices, 1))
                    errors = MEASURES[str(knobs["measure"])](curve, whole, slices) if curve.size else np.zeros(0)
                    options += _options(layer, errors, slices, scheme, budget.channels)
        return table


_COSTS = {"macs": "MACs", "params": "params"}
"""The costs a budget may limit, and how a message calls them."""


class _Option(NamedTuple):
    """What one layer may become, with its relative error and cost; rank 0 is the layer itself."""

    error: float
    macs: int
    params: int
    slices: int
    rank: int
    scheme: int

    def to_json(self, name: str) -> dict[str, Any]:
        return {"name": name, "slices": self.slices, "rank": self.rank, "scheme": self.scheme}


def _key(name: str, slices: int, scheme: int) -> str:
    return f"{name}|{slices}|{scheme}"


def _options(layer: Layer, errors: np.ndarray, slices: int, scheme: int, channels: int) -> list[_Option]:
    """The decompositions of every rank on the device's grid that cost no more than the layer and are not full rank."""
    macs, params = _unit_cost(layer, slices, scheme)
    step = grid_step(slices * len(errors), channels)
    step //= gcd(step, slices)
    bias = layer.params - prod(layer.weight_shape)
    affordable = min(len(errors) - 1, layer.macs // macs, (layer.params - bias) // params)
    return [
        _Option(float(errors[rank]), rank * macs, rank * params + bias, slices, rank, scheme)
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
    sides = zip(layer.in_hw, layer.out_hw, owns, strict=True)
    encoded = prod(after if is_owned else before for before, after, is_owned in sides) if scheme else positions
    return encoder * encoded + decoder * positions, encoder + decoder


def _foldings(layer: Layer, schemes: Sequence[int]) -> list[int]:
    """Schemes that differ on this layer: an axis of size 1 is the encoder's, which strides early.

    A layer that runs several times keeps to scheme 0: the cost of the others needs the size of every map it reads.
    """
    kernel = layer.weight_shape[2:] or (1, 1)
    mask = 0 if layer.calls > 1 else (kernel[0] > 1) | (kernel[1] > 1) << 1
    return sorted({scheme & mask for scheme in schemes})


def _work(layer: Layer, slices: int, scheme: int) -> float:
    """Operations of one task's Gram matrices and eigenvalues, up to a constant."""
    outputs, channels = layer.weight_shape[0] // layer.groups, layer.weight_shape[1] // slices
    kernel = layer.weight_shape[2:] or (1, 1)
    rows = outputs * prod(size for size, owned in zip(kernel, encoder_owns(scheme), strict=True) if not owned)
    columns = outputs * channels * prod(kernel) // rows
    small, large = sorted((rows, columns))
    return layer.groups * slices * (small**2 * large + 4 / 3 * small**3) + WORK_PER_CALL


def _solve(table: Sequence[Sequence[_Option]], left: Mapping[str, int]) -> list[_Option]:
    """One option per layer within all that is `left` for these layers; without a limit, the layers themselves."""
    if not left:
        return [options[0] for options in table]
    if len(left) == 2:
        both = [[(option.error, (option.macs, option.params)) for option in options] for options in table]
        picks = joint(both, (left["macs"], left["params"]))
    else:
        ((cost, limit),) = left.items()
        picks = lexi([[(option.error, getattr(option, cost)) for option in options] for options in table], limit)
    return [options[pick] for options, pick in zip(table, picks, strict=True)]


def _infeasible(
    table: Mapping[Layer, Sequence[_Option]], profile: Profile, budget: Budget, fixed: Mapping[str, int]
) -> Infeasible:
    """What each limit asks, what it could reach alone, and what the layers that cost most would still cost."""
    limits, least, parts = budget.limits(), {}, {}
    for cost, limit in limits.items():
        floors = {layer.name: min(getattr(option, cost) for option in options) for layer, options in table.items()}
        floors["(all that is not decomposed)"] = fixed[cost]
        least[cost] = sum(floors.values())
        teacher = getattr(profile, cost)
        largest = ", ".join(f"{name} {floors[name]:,}" for name in sorted(floors, key=lambda name: -floors[name])[:5])
        parts[cost] = (
            f"{limit:,} {_COSTS[cost]} ({limit / teacher:.1%} of the teacher), but ALDS needs at least {least[cost]:,} "
            f"({least[cost] / teacher:.1%}), most of it in {largest}"
        )
    exceeded = [cost for cost in limits if least[cost] > limits[cost]]
    reason = " and ".join(parts[cost] for cost in exceeded or limits)
    both = "" if exceeded else "; each alone is within reach, both together are not"
    message = f"budget {budget.name!r} allows {reason}{both}; raise it, skip fewer layers or try another method"
    return Infeasible(message, least)


def _notes(scores: Scores) -> tuple[str, ...]:
    """Which layers stay because the network uses their weights in other ways too."""
    dense = sorted({key.split("|")[0] for key, curve in scores.items() if curve.shape[1] == 0})
    if not dense:
        return ()
    return (f"kept whole (a subclass, a shared or parametrized weight, or uneven 'same' padding): {', '.join(dense)}",)


def _is_shared(module: nn.Module, model: nn.Module) -> bool:
    """Whether another module of `model` reads the same weight tensor."""
    parameters = (parameter for other in model.modules() for parameter in other.parameters(recurse=False))
    return sum(parameter is module.weight for parameter in parameters) > 1

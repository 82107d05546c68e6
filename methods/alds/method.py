"""ALDS: every layer becomes a grouped, thinner layer and a 1x1 one, with slices and ranks chosen for all at once.

A layer's input channels are cut into slices and each slice's weight is truncated to a low rank: the encoder is the
grouped convolution of the slices, the decoder mixes them. The error of every (slices, rank, scheme) follows from the
singular values of the weight, or from the outputs on calibration images (`whitening`); the choice for a budget is exact
(`staircase` for the largest error, `knapsack` for the sum).

Source: Liebenwein, Maalouf, Gal, Feldman, Rus 2021, "Compressing Neural Networks: Towards Determining the Optimal
Layer-wise Decomposition" (arXiv 2107.11442).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from methods.alds.options import (
    Option,
    fitting_seconds,
    foldings,
    moment_bytes,
    options_of,
    ranks_out_of_reach,
    solve,
    spectrum_seconds,
)
from methods.alds.spectra import MEASURES, SCHEMES, curves, decompose, obstacle_of, paired
from methods.alds.whitening import FITTED, crossed_moments, fitted_curves, fitted_factors, fitting
from methods.base import Budget, Choice, Infeasible, KnobValue, Plan, ScoreError, Scores, Shard
from methods.network import Layer, Profile
from methods.network.graph import shares_weights
from methods.network.reach import UNITS
from methods.protocol import collected, defaults, recover_student, settle_norms
from methods.refit import refit
from methods.refit.bundles import bundles
from methods.refit.moments import IMAGES, second_moments

PAPER_SLICES = (3, 5, 7, 9)
LARGEST_POWER = 16


@dataclass(frozen=True)
class ALDS:
    """Low-rank decomposition of every convolution and linear layer, by the relative errors of the layers.

    Knobs: `measure` is the error. `refit` and `white` are energies of the outputs on calibration images, `fro` one of
    the weight: these add up, and the sum of their squares is made least. `rss`, `paper` and `group_max` bound the
    spectral norm: the largest is made least. `schemes` are the foldings an allocation may use; `refit` and `white`
    exist for scheme 0 only, so it does nothing there; without scheme 0 they are not offered.

    `slices` are the slice counts tried where they divide a layer's input channels (None: powers of two up to 16 and
    the paper's); one slice always is. `schemes` are the foldings tried. `skip` names layers to leave alone.

    Source: Liebenwein et al. 2021: ALDS (scheme 0, a search from random starts) and ALDS+ (all schemes).
    Differs: the global problem is solved exactly, for MACs, params or both, and the rest of a budget is spent on the
    next largest error. The default is `refit`, which the paper does not have. ResNet-20 on Fashion-MNIST (top-1
    0.945) at 20 % of its params, norms re-estimated, without training: 0.920 with `refit`, 0.877 with `rss` and all
    schemes, 0.618 with `group_max` and scheme 0, as in the authors' code.
    """

    is_last: ClassVar[bool] = False
    refits: ClassVar[bool] = True
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
        measures = Choice((*MEASURES, *FITTED), "refit") if 0 in self.schemes else Choice(tuple(MEASURES), "rss")
        return {"measure": measures, "schemes": Choice(schemes, "all")}

    def accepts(self, profile: Profile) -> str | None:
        unknown = sorted(set(self.skip) - {layer.name for layer in profile.layers})
        if unknown:
            return f"skip names {', '.join(unknown)}, expected layers of the network; correct the names"
        if not self._eligible(profile):
            whole = [f"{layer.name}: {layer.whole}" for layer in profile.layers if layer.whole][:3]
            reasons = f" ({'; '.join(whole)})" if whole else ""
            advice = "skip fewer" if self.skip else "try another method"
            return (
                f"no layer is left to decompose{reasons}, expected a Conv2d that is not depthwise or a Linear; {advice}"
            )
        return None

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """Bundles ("spectra", (layer, slices, scheme), ...) and ("fitted", (layer, slice counts), ...), longest first.

        A bundle of the second kind passes the calibration images through the network once, for all its layers.
        """
        spectra = bundles("spectra", [(task, seconds, 0) for task, seconds in self._tasks(profile)])
        images = min(len(calibration), IMAGES)
        weighed = [
            ((layer.name, counts), fitting_seconds(layer, counts, images), moment_bytes(layer))
            for layer, counts in self._fitted_tasks(profile)
        ]
        fitted = bundles("fitted", weighed, macs=images * profile.macs)
        return [shard for _, shard in sorted(spectra + fitted, key=lambda item: -item[0])]

    @torch.no_grad()
    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """Curves `(3, rank)`, see `spectra.curves`, or `(2, rank + 1)`, see `whitening.fitted_curves`.

        They are by (layer, slices, scheme) and (layer, slices); of rank 0 where a layer cannot be cut.

        Raises:
            ScoreError: a weight, or an input of a layer, is not finite.
        """
        kind, *tasks = shard
        weights = {name: _weight(teacher, name) for name, *_ in tasks}
        if kind == "spectra":
            groups = {name: getattr(teacher.get_submodule(name), "groups", 1) for name in weights}
            return {
                _key(name, slices, scheme): np.zeros((3, 0))
                if (weight := weights[name]) is None
                else curves(weight, groups=groups[name], slices=slices, scheme=scheme)
                for name, slices, scheme in tasks
            }
        moments = second_moments(teacher, [name for name in weights if weights[name] is not None], calibration)
        found: dict[str, np.ndarray] = {}
        for name, counts in tasks:
            if (weight := weights[name]) is None:
                found |= {_key(name, slices, "fitted"): np.zeros((2, 0)) for slices in counts}
                continue
            second = moments.pop(name)
            crossed = crossed_moments(weight, second)
            for slices in counts:
                found[_key(name, slices, "fitted")] = fitted_curves(weight, second, slices=slices, crossed=crossed)
        return found

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """All curves, in the network's order.

        Raises:
            ScoreError: a curve is missing, or two of the same layer differ.
        """
        fitted = [(layer.name, slices) for layer, counts in self._fitted_tasks(profile) for slices in counts]
        expected = [_key(*task) for task, _ in self._tasks(profile)] + [_key(*task, "fitted") for task in fitted]
        return collected(partials, lambda _: expected)

    def untouched(self, scores: Scores, profile: Profile) -> Mapping[str, str]:
        """The layers that are not eligible, or for which no decomposition is smaller."""
        table = self._table(scores, profile, Budget("whole"), defaults(self))
        options = {layer.name: len(found) for layer, found in table.items()}

        def reason(layer: Layer) -> str:
            if layer.name in options:
                return "no decomposition of it is smaller"
            return "skip names it" if layer.name in self.skip else layer.whole or "it is depthwise"

        return {layer.name: reason(layer) for layer in profile.layers if options.get(layer.name, 1) == 1}

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """The plan of the least error within every limit of the budget; no layer's replacement costs more than it does.

        For measures that add up (`refit`, `white`, `fro`), `loss` is the sum of the squared relative errors of the
        layers, proven least. For the others it is the largest of the errors, proven least; then the second largest is
        made least, and so on.

        Raises:
            Infeasible: no plan fits; the message names the least of every cost and the layers that cost most.
        """
        knobs = {**defaults(self), **knobs}
        table = self._table(scores, profile, budget, knobs)
        fixed = {cost: getattr(profile, cost) - sum(getattr(layer, cost) for layer in table) for cost in UNITS}
        binding = {cost: limit for cost, limit in budget.limits().items() if limit < getattr(profile, cost)}
        left = {cost: limit - fixed[cost] for cost, limit in binding.items()}
        try:
            chosen, loss, bound = solve(list(table.values()), left, str(knobs["measure"]))
        except Infeasible:
            raise ranks_out_of_reach(table, profile, budget, fixed, skips=bool(self.skip)) from None
        pairs = [(layer, option) for layer, option in zip(table, chosen, strict=True) if option.rank]
        return Plan(
            method=self.name,
            macs=fixed["macs"] + sum(option.macs for option in chosen),
            params=fixed["params"] + sum(option.params for option in chosen),
            choices={"measure": knobs["measure"], "layers": [option.to_json(layer.name) for layer, option in pairs]},
            loss=loss,
            bound=bound,
            notes=_notes(scores, profile),
        )

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """A copy of the teacher with the plan's pairs of layers.

        For `refit` and `white` the factors are those of the layers' outputs on the calibration images; with images,
        the layers left whole are then fitted to the student's own inputs, and for `refit` the pairs too: the weight
        that maps those best to the teacher's outputs is decomposed like any other. Without images they are the
        truncated weights, of the same shapes.
        """
        student = copy.deepcopy(teacher)
        measure, choices = plan.choices["measure"], {choice["name"]: choice for choice in plan.choices["layers"]}
        images = calibration if measure in FITTED and choices else None
        moments = {} if images is None else second_moments(teacher, list(choices), images)
        modules = dict(student.named_modules(remove_duplicate=False))
        for name, choice in choices.items():
            layer, slices, rank = modules[name], choice["slices"], choice["rank"]
            if name in moments:
                left, right = fitted_factors(layer.weight, moments[name], slices=slices, rank=rank, measure=measure)
                pair = paired(layer, left, right, scheme=0)
            else:
                pair = decompose(layer, slices=slices, rank=rank, scheme=choice["scheme"])
            for alias in (alias for alias, module in modules.items() if module is layer):
                parent, _, attribute = alias.rpartition(".")
                setattr(student.get_submodule(parent), attribute, pair)
        if calibration is not None and choices:
            fitted = choices.items() if measure == "refit" else ()
            pairs = {
                name: fitting(teacher.get_submodule(name), choice["slices"], choice["rank"]) for name, choice in fitted
            }
            refit(student, teacher, calibration, pairs=pairs)
        return student

    settle = settle_norms
    recover = recover_student

    def _eligible(self, profile: Profile) -> list[Layer]:
        """Layers to decompose: all but depthwise convolutions, what the user protects, and what must stay whole."""
        kept = {layer.name for layer in profile.layers if layer.groups > 1 and layer.weight_shape[1] == 1} | {
            *self.skip
        }
        return [layer for layer in profile.layers if layer.name not in kept and layer.whole is None]

    def _tasks(self, profile: Profile) -> list[tuple[tuple[str, int, int], float]]:
        """Every (layer, slices, scheme) with its seconds, in the network's order; ties are settled by this order."""
        return [
            ((layer.name, slices, scheme), spectrum_seconds(layer, slices, scheme))
            for layer in self._eligible(profile)
            for slices, scheme in product(self._slice_counts(layer), foldings(layer, self.schemes))
        ]

    def _fitted_tasks(self, profile: Profile) -> list[tuple[Layer, tuple[int, ...]]]:
        """Every layer with its slice counts, in the network's order; none without scheme 0."""
        return [(layer, tuple(self._slice_counts(layer))) for layer in self._eligible(profile) if 0 in self.schemes]

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
    ) -> dict[Layer, list[Option]]:
        """Each layer's options: itself, then all decompositions that enlarge nothing, by slices, scheme and rank."""
        table = {
            layer: [Option(0.0, layer.macs, layer.params, slices=1, rank=0, scheme=0)]
            for layer in self._eligible(profile)
        }
        measure = str(knobs["measure"])
        schemes = self.schemes if knobs["schemes"] == "all" and measure in MEASURES else (0,)
        for layer, options in table.items():
            for slices, scheme in product(self._slice_counts(layer), foldings(layer, schemes)):
                if measure in FITTED:
                    errors = scores[_key(layer.name, slices, "fitted")][FITTED.index(measure)]
                else:
                    curve, whole = (scores[_key(layer.name, count, scheme)] for count in (slices, 1))
                    errors = MEASURES[measure](curve, whole, slices) if curve.size else np.zeros(0)
                options += options_of(layer, errors, slices, scheme, budget.channels)
        return table


def _key(name: str, slices: int, kind: int | str) -> str:
    return f"{name}|{slices}|{kind}"


def _weight(model: nn.Module, name: str) -> Tensor | None:
    """The weight of a layer that can be cut; None for the others.

    Raises:
        ScoreError: it is not finite.
    """
    module = model.get_submodule(name)
    if obstacle_of(module) or shares_weights(model, module, by_name=False) or _is_read_directly(name, model):
        return None
    assert isinstance(module.weight, Tensor)
    if not bool(torch.isfinite(module.weight).all()):
        raise ScoreError(f"the weight of {name!r} holds NaN or infinity, expected numbers; retrain the teacher")
    return module.weight


def _notes(scores: Scores, profile: Profile) -> tuple[str, ...]:
    """The note on layers that stay because the network uses their weights in other ways too."""
    whole = {layer.name for layer in profile.layers if layer.whole is not None}
    dense = sorted(whole | {key.split("|")[0] for key, curve in scores.items() if curve.shape[1] == 0})
    if not dense:
        return ()
    reasons = "a subclass, a shared, parametrized or directly read weight, or uneven 'same' padding"
    return (f"kept whole ({reasons}): {', '.join(dense)}",)


def _is_read_directly(name: str, model: nn.Module) -> bool:
    """Whether the layer's parent gives its weight to a kernel of its own, as torch's encoder layer does in eval."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer)

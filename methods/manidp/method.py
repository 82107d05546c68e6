"""ManiDP: every image keeps its own channels, chosen by gates that training teaches to spend little on easy images.

No weight is removed, so static MACs and params grow by the gates; a budget is met in expected MACs, the mean over
images of the cost of their active channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import Budget, Knob, KnobValue, Plan, Range, Scores, Shard, Unsupported
from methods.manidp.gates import Gated, gated
from methods.manidp.objective import GatedObjective
from methods.manidp.settling import quieten, settle
from methods.manidp.sites import (
    NARROWEST,
    Site,
    find_sites,
    from_columns,
    gate_macs,
    gate_params,
    gated_macs,
    to_columns,
    trace,
    widths,
)
from methods.manidp.thresholds import least_macs
from methods.network import Layer, Profile, count_params
from methods.network.reach import out_of_reach
from methods.protocol import collected, defaults
from methods.training import Recipe, Samples, recover, train

SEED = 0
"""Of fresh gates, so that a plan decides its student."""

NO_PARAMETER = {"params": "because it removes no parameter"}


@dataclass(frozen=True)
class ManiDP:
    """Gates on the convolutions of a traced network, trained to meet a budget in expected MACs.

    `thresholds` is their rule in training, as the remain rate falls: `quantile` is a running mean of the quantile of
    each batch's saliencies, `mean_rank` the authors' rank of mean saliencies, renewed now and then. `squeeze` divides a
    gate's inner width.

    Knobs: `sparsity` (the paper's lambda) weighs the mean saliency of easy images, `similarity` (rho) how much images
    alike in features should be alike in saliency, `hold` is the last share of the steps, at the final remain rate.

    Source: Tang et al., CVPR 2021, and the authors' code, which alone was read.
    Differs: thresholds are quantiles and the final rate is held, because the authors set the last threshold after the
        last step, unseen by the weights; after training thresholds and norm statistics are calibrated to the budget; a
        depthwise convolution inherits the mask of its input. Losses include the teacher's outputs where recovery does.
    """

    thresholds: Literal["quantile", "mean_rank"] = "quantile"
    squeeze: int = 2
    name: ClassVar[str] = "manidp"
    is_last: ClassVar[bool] = True
    knobs: ClassVar[Mapping[str, Knob]] = MappingProxyType(
        {
            "sparsity": Range(1e-3, 0.2, default=0.02, log=True),
            "similarity": Range(0.1, 10.0, default=1.0, log=True),
            "hold": Range(0.3, 0.6, default=0.4),
        }
    )

    def __post_init__(self) -> None:
        if self.thresholds not in ("quantile", "mean_rank"):
            raise ValueError(f"thresholds are {self.thresholds!r}, expected 'quantile' or 'mean_rank'; choose one")
        if self.squeeze < 1:
            raise ValueError(f"squeeze is {self.squeeze}, expected a divisor of at least 1; 2 is the authors'")

    def accepts(self, profile: Profile) -> str | None:
        """`None`, or the reason why no convolution of this network can take a gate; `score` looks closer."""
        for layer in profile.layers:
            outputs, inputs = layer.weight_shape[:2]
            if layer.kind == "conv" and layer.groups == 1 and min(outputs, inputs) >= NARROWEST:
                return None
        return (
            f"manidp gates ungrouped convolutions of at least {NARROWEST} input and output channels, but the network "
            "has none; try another method"
        )

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """One shard: the network is traced as a whole."""
        return [("sites",)]

    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """The sites as columns (see `methods.manidp.sites.Site`), `params` of the traced network, and two texts.

        `refusal` `(0,)` or `(1,)` says why the network cannot be gated at all; `skipped` has a line per convolution
        without a gate.
        """
        example = calibration[:2]
        try:
            network = trace(teacher)
            _check_trace(network, teacher, example)
            sites, skipped = find_sites(network, example, self.squeeze)
            skipped |= _unseen(teacher, {*skipped, *(site.conv for site in sites)})
        except Unsupported as error:
            return to_columns(()) | _texts(refusal=[str(error)], skipped=[]) | {"params": np.array([0])}
        return (
            to_columns(sites)
            | _texts(refusal=[], skipped=[f"{name}: {reason}" for name, reason in skipped.items()])
            | {"params": np.array([count_params(network)])}
        )

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """The one partial score.

        Raises:
            ScoreError: there is none, or two differ.
        """
        columns = tuple(to_columns(()))
        return collected(partials, lambda _: (*columns, "refusal", "skipped", "params"))

    def untouched(self, scores: Scores, profile: Profile) -> Mapping[str, str]:
        """The layers whose outputs no mask covers, with the reasons."""
        gated = set(scores["conv"].tolist())
        skipped = dict(line.split(": ", 1) for line in scores["skipped"].tolist())
        refusal = "".join(scores["refusal"].tolist())

        def reason(layer: Layer) -> str:
            return refusal or skipped.get(layer.name, "it is no convolution" if layer.kind == "linear" else _UNSEEN)

        return {layer.name: reason(layer) for layer in profile.layers if layer.name not in gated}

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """All gates, with the budget's MACs as the target of the expected MACs, or no gate where the teacher fits.

        `loss` is the share of the teacher's MACs that is cut. Training, not the plan, decides where it is cut.

        Raises:
            Infeasible: no convolution can take a gate, or one channel per gate is too much, or the gates' params are.
        """
        target = budget.limits().get("macs", profile.macs)
        whole = {"macs": profile.macs, "params": profile.params}
        if target >= profile.macs:
            _check(budget, whole, profile, NO_PARAMETER)
            return Plan(self.name, profile.macs, profile.params, choices={}, loss=0.0)
        sites = from_columns(scores)
        if not sites:
            raise out_of_reach(self.name, budget, profile, whole, why={"macs": _no_sites(scores)} | NO_PARAMETER)
        ungated = profile.macs - int(gated_macs(sites, widths(sites)))
        macs, params = sum(map(gate_macs, sites)), sum(map(gate_params, sites))
        least = {"macs": least_macs(sites, ungated + macs), "params": int(scores["params"][0]) + params}
        why = {
            "macs": f"with one channel per gate{self._largest_ungated(scores, profile)}",
            "params": f"because its gates add parameters, {params:,} of them",
        }
        _check(budget, least, profile, why)
        settings = {"thresholds": self.thresholds, "squeeze": self.squeeze, "ungated_macs": ungated}
        columns = {name: column.tolist() for name, column in to_columns(sites).items()}
        return Plan(
            method=self.name,
            macs=profile.macs + macs,
            params=least["params"],
            choices={"sites": columns, **settings, **defaults(self), **knobs},
            loss=1 - target / profile.macs,
            notes=_notes(sites, scores),
            macs_expected=target,
        )

    def _largest_ungated(self, scores: Scores, profile: Profile) -> str:
        """Name the layer without a gate that needs most MACs, and say why it has none."""
        reasons = self.untouched(scores, profile)
        if not reasons:
            return ""
        name = max(reasons, key=lambda layer: profile.layer(layer).macs)
        return f" ({len(reasons)} layers have none, the largest of them {name}: {reasons[name]})"

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """The teacher with fresh gates that keep every channel, or a plain copy where the plan has no gates.

        With images, the gates' saliencies are brought closer to 1, see `settling.quieten`.

        Raises:
            Unsupported: the teacher cannot be traced.
        """
        if plan.macs_expected is None:
            return copy.deepcopy(teacher)
        sites = from_columns(plan.choices["sites"])
        student = gated(teacher, sites, plan.choices["ungated_macs"], seed=SEED, plan=plan)
        if calibration is not None:
            quieten(student, calibration)
        return student

    def settle(self, student: nn.Module, plan: Plan, calibration: Tensor) -> None:
        """Calibrate thresholds and norms together to the plan's expected MACs on `calibration`, see `settling`.

        A student without gates is its teacher, and stays as it is.
        """
        if isinstance(student, Gated) and plan.macs_expected is not None:
            settle(student, calibration, plan.macs_expected)

    def recover(
        self, student: nn.Module, teacher: nn.Module, data: Samples, recipe: Recipe, seed: int
    ) -> Iterator[int]:
        """Train weights and gates while the remain rate falls from 1; each step yielded is at the final remain rate.

        A student without gates is recovered as any other. Calibrate the thresholds again afterwards: see `settle`.
        """
        if not isinstance(student, Gated):
            yield from recover(student, teacher, data, recipe, seed)
            return
        objective = GatedObjective(student, teacher, recipe)
        undecayed = [parameter for gate in student.gates for parameter in gate.parameters()]
        for step in train(student, data, recipe, seed, teacher, objective=objective, undecayed=undecayed):
            with objective.at_the_final_rate():
                yield step


@torch.no_grad()
def _check_trace(network: nn.Module, teacher: nn.Module, example: Tensor) -> None:
    """Refuse a traced network that is not the teacher."""
    expected, again, found = (one(example.clone()) for one in (teacher, teacher, network))
    if not _is_close(expected, again):
        raise Unsupported(
            "the network answers the same images differently from call to call, so its trace cannot be proved; look "
            "in its forward for randomness, or use a method that does not gate"
        )
    if not _is_close(expected, found):
        raise Unsupported(
            "the traced network gives other outputs, expected the same; its forward depends on values: "
            "rewrite it, or use a method that does not gate"
        )


def _is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


_UNSEEN = "the traced forward does not call it"


def _unseen(teacher: nn.Module, seen: set[str]) -> dict[str, str]:
    """Say why the convolutions besides those `seen` are no calls of the traced network."""
    others = {name: one for name, one in teacher.named_modules() if isinstance(one, nn.Conv2d) and name not in seen}
    return {
        name: _UNSEEN if type(one) is nn.Conv2d else f"it is a {type(one).__name__}, a subclass that is traced through"
        for name, one in others.items()
    }


def _check(budget: Budget, least: Mapping[str, int], profile: Profile, why: Mapping[str, str]) -> None:
    """Refuse a budget that allows less than `least`; `why` explains each cost."""
    if any(limit < least[cost] for cost, limit in budget.limits().items()):
        raise out_of_reach(ManiDP.name, budget, profile, least, why=why)


def _no_sites(scores: Scores) -> str:
    reasons = [str(line) for line in (*scores["refusal"], *scores["skipped"][:3])]
    return f"because it found no convolution to gate ({'; '.join(reasons)})"


def _notes(sites: Sequence[Site], scores: Scores) -> tuple[str, ...]:
    gates = [site for site in sites if not site.is_depthwise]
    skipped = scores["skipped"]
    coverage = f"{len(gates)} of {len(sites) + len(skipped)} convolutions have a gate of their own"
    return (coverage, *(f"no gate at {line}" for line in skipped))


def _texts(**lines: Sequence[str]) -> dict[str, np.ndarray]:
    """Lines of text as arrays that need no pickle, empty or not."""
    return {name: np.array(found, dtype=None if found else "U1") for name, found in lines.items()}

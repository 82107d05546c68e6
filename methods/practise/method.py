"""PRACTISE: whole residual blocks are dropped, those first whose loss the rest of the network can make up for.

The part of the teacher's last feature map that is lost for good is measured on a few images without labels, for every
removable block and every two of them. The blocks to drop for a budget are then chosen exactly, for all its limits at
once.

Source: Wang, Zhou, Wu 2023, "Practical Network Acceleration with Tiny Sets" (arXiv 2202.07861).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import ClassVar, get_args

import numpy as np
from torch import Tensor, nn

from methods.base import Budget, Choice, Infeasible, Knob, KnobValue, Plan, Scores, Shard
from methods.network import Profile, count_macs, count_params
from methods.network.reach import out_of_reach
from methods.practise.blocks import Blocks, drop, find_blocks
from methods.practise.recoverability import Repair, observe, recoverability
from methods.practise.selection import pairwise_error, select_jointly
from methods.protocol import collected, defaults, recover_student, settle_norms
from methods.refit import refit

BUNDLE = 12
"""Recoverabilities in a shard: each shard passes the images through the teacher once, for all of them."""

MOST_PAIRS = 36
"""Pairs of blocks that are measured, each by about a pass of the calibration images; up to nine blocks that is all."""

MOST_IN_PAIRS = 60
"""With more removable blocks than this, no pair is measured: the choice of blocks would take too long."""

EXAMPLES = 2
"""Images on which `find_blocks` judges the blocks."""


@dataclass(frozen=True)
class PRACTISE:
    """Drops the removable blocks of least joint error that save enough; nothing else of the network changes.

    `repair` names the measure of `methods.practise.recoverability.recoverability`; `steps` are those of "adaptor_sgd".
    Knob `selector`: "pairwise" adds to the blocks' errors the loss of any two beyond their sum, "additive" does not, as
    the paper.

    Source: arXiv 2202.07861: the recoverability of a block and the student's tuning on the teacher's features.
    Differs: blocks are found in any network; their number follows from the budget; the default repair is in closed
    form; the selection is exact, and sees pairs because errors of neighbouring blocks add up to less than they cost.
    """

    repair: Repair = "sequential_ls"
    steps: int = 50

    name: ClassVar[str] = "practise"
    is_last: ClassVar[bool] = False
    refits: ClassVar[bool] = True
    knobs: ClassVar[Mapping[str, Knob]] = MappingProxyType({"selector": Choice(("pairwise", "additive"), "pairwise")})

    def __post_init__(self) -> None:
        if self.repair not in get_args(Repair):
            raise ValueError(f"repair is {self.repair!r}, expected one of {get_args(Repair)}; leave it out if in doubt")
        if self.steps < 1:
            raise ValueError(f"steps are {self.steps}, expected at least 1; the paper takes 2000, or use repair='drop'")

    def accepts(self, profile: Profile) -> str | None:
        """`None`, or the reason why no block of this network can be removable; only scoring finds those that are."""
        if any(layer.block is not None for layer in profile.layers):
            return None
        return (
            "practise drops blocks, but no module of the network keeps the shape of its input, as residual blocks do; "
            "expected one with children of its own; try itpruner, alds or uniform"
        )

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """Equal parts (part, parts) of all that is scored; a profile only bounds the number of blocks to be found."""
        bound = len({layer.block for layer in profile.layers} - {None})
        parts = max(1, -(-(bound + min(MOST_PAIRS, bound * (bound - 1) // 2)) // BUNDLE))
        return [(part, parts) for part in range(parts)]

    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """The blocks found, and the errors and savings of this shard's share of them.

        Raises:
            ScoreError: an error is not a number.
        """
        part, parts = shard
        blocks = find_blocks(teacher, calibration[:EXAMPLES])
        scores = _listed(blocks)
        items = _items(list(blocks.removable))[part::parts]
        if not items:
            return scores
        reference = observe(teacher, calibration, blocks.removable)
        whole = _cost(reference.teacher, calibration)
        for names in items:
            error = recoverability(reference, names, self.repair, steps=self.steps, seed=seed)
            scores[_key(names)] = np.array(error)
            if len(names) == 1:
                scores[_cost_key(*names)] = whole - _cost(reference.without(names), calibration)
        return scores

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """The removable blocks with their errors `(k,)`, joint errors `(k, k)`, savings `(k,)`, and the rejected ones.

        In `joint`, pairs that were not measured have the sum of their errors, as if one did not touch the other.

        Raises:
            ScoreError: a score is missing, or two of the same blocks differ.
        """
        merged = collected(partials, _expected)
        names = merged["blocks"].tolist()
        costs = np.array([merged[_cost_key(name)] for name in names], dtype=np.int64).reshape(-1, 2)
        return {
            **{key: merged[key] for key in ("blocks", "closings", "rejected")},
            "recoverability": np.array([merged[_key((name,))] for name in names], dtype=np.float64),
            "joint": _joint(names, merged),
            "macs": costs[:, 0],
            "params": costs[:, 1],
        }

    def untouched(self, scores: Scores, profile: Profile) -> Mapping[str, str]:
        """The layers outside all removable blocks, with the reason of the innermost module around each."""
        blocks = [f"{name}." for name in scores["blocks"].tolist()]
        rejected = dict(line.split(": ", 1) for line in scores["rejected"].tolist())

        def reason(layer: str) -> str:
            around = [name for name in rejected if layer.startswith(f"{name}.")]
            inner = max(around, key=len, default=None)
            return "no module around it has children" if inner is None else f"{inner}: {rejected[inner]}"

        names = [layer.name for layer in profile.layers if not layer.name.startswith(tuple(blocks))]
        return {name: reason(name) for name in names}

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """The plan of least error within every limit, proven least; `loss` is that error as the selector counts it.

        Raises:
            Infeasible: dropping every removable block is not enough, or there is none.
        """
        knobs = {**defaults(self), **knobs}
        beyond = interactions(scores, str(knobs["selector"]))
        targets = {cost: getattr(profile, cost) - limit for cost, limit in budget.limits().items()}
        if any(target > scores[cost].sum() for cost, target in targets.items()):
            raise _blocks_out_of_reach(scores, profile, budget)
        chosen = select_jointly(
            [scores[cost].tolist() for cost in targets],
            scores["recoverability"].tolist(),
            list(targets.values()),
            interactions=beyond,
        )
        loss = max(0.0, pairwise_error(chosen, scores["recoverability"].tolist(), beyond))
        return Plan(
            method=self.name,
            macs=profile.macs - int(scores["macs"][chosen].sum()),
            params=profile.params - int(scores["params"][chosen].sum()),
            choices={"blocks": {str(scores["blocks"][i]): str(scores["closings"][i]) for i in chosen}},
            loss=loss,
            bound=loss,
            notes=_left_out(len(scores["blocks"])) if knobs["selector"] == "pairwise" else (),
        )

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """A copy of the teacher without the plan's blocks; given images, what is left is refit to the teacher."""
        student = copy.deepcopy(teacher)
        drop(student, plan.choices["blocks"])
        if calibration is not None and plan.choices["blocks"]:
            refit(student, teacher, calibration)
        return student

    settle = settle_norms
    recover = recover_student


def _listed(blocks: Blocks) -> dict[str, np.ndarray]:
    return {
        "blocks": np.array(list(blocks.removable), dtype=np.str_),
        "closings": np.array(list(blocks.removable.values()), dtype=np.str_),
        "rejected": np.array([f"{name}: {reason}" for name, reason in blocks.rejected.items()], dtype=np.str_),
    }


def _items(names: Sequence[str]) -> list[tuple[str, ...]]:
    """List the sets of blocks to score: every block, then pairs of them."""
    return [(name,) for name in names] + [(names[one], names[two]) for one, two in _pairs(len(names))]


def _pairs(blocks: int) -> list[tuple[int, int]]:
    """List the pairs that are measured, near neighbours first: those interact most."""
    pairs = combinations(range(blocks), 2) if blocks <= MOST_IN_PAIRS else ()
    return sorted(pairs, key=lambda pair: (pair[1] - pair[0], pair))[:MOST_PAIRS]


def _left_out(blocks: int) -> tuple[str, ...]:
    """The note on pairs that were not measured."""
    measured, of_all = len(_pairs(blocks)), blocks * (blocks - 1) // 2
    if measured == of_all:
        return ()
    return (f"{measured} of {of_all} pairs of blocks were measured, neighbours first; the others' errors are added",)


def _expected(found: Scores) -> list[str]:
    """The names of all scores, from the blocks that were found."""
    names = found["blocks"].tolist() if "blocks" in found else []
    return ["blocks", "closings", "rejected", *map(_key, _items(names)), *map(_cost_key, names)]


def _key(names: Sequence[str]) -> str:
    return "error|" + "|".join(names)


def _cost_key(name: str) -> str:
    return f"cost|{name}"


def _cost(model: nn.Module, images: Tensor) -> np.ndarray:
    """MACs for one image and params, counted as the pipeline counts them."""
    return np.array([count_macs(model, images), count_params(model)], dtype=np.int64)


def _joint(names: Sequence[str], merged: Scores) -> np.ndarray:
    """The error of every two blocks, on the diagonal that of each; their sum where the pair was not measured."""
    alone = np.array([float(merged[_key((name,))]) for name in names])
    joint: np.ndarray = alone[:, None] + alone[None, :]
    np.fill_diagonal(joint, alone)
    for one, two in _pairs(len(names)):
        joint[one, two] = joint[two, one] = merged[_key((names[one], names[two]))]
    return joint


def interactions(scores: Scores, selector: str) -> np.ndarray:
    """The loss of every two blocks beyond the sum of their own errors, `(k, k)`, for the merged `scores`.

    It may be negative, as for blocks that destroy the same thing, but a block's negative entries never sum to more than
    its own error: they are scaled down to it. So no set gains from another block, however far pairs are extrapolated.
    For "additive", and for pairs that were not measured, they are 0.
    """
    alone = scores["recoverability"]
    if selector == "additive":
        return np.zeros((len(alone), len(alone)))
    beyond = scores["joint"] - (alone[:, None] + alone[None, :])
    np.fill_diagonal(beyond, 0)
    gains = np.maximum(-beyond, 0)
    total = gains.sum(1)
    share = np.divide(alone, total, out=np.ones_like(total), where=total > alone)
    damped: np.ndarray = np.maximum(beyond, 0) - gains * np.minimum(share[:, None], share[None, :])
    return damped


def _blocks_out_of_reach(scores: Scores, profile: Profile, budget: Budget) -> Infeasible:
    """Build the error for a budget that no set of dropped blocks meets."""
    limits = budget.limits()
    least = {cost: getattr(profile, cost) - int(scores[cost].sum()) for cost in limits}
    if count := len(scores["blocks"]):
        why = f"with all {count} removable blocks dropped"
        advice = "raise it or try a chain such as [practise, alds]"
    else:
        reasons = "; ".join(scores["rejected"][:3].tolist()) or "no module with weights has children"
        why, advice = f"because no block can be dropped ({reasons})", "try itpruner, alds or uniform"
    return out_of_reach(PRACTISE.name, budget, profile, least, why=dict.fromkeys(limits, why), advice=advice)

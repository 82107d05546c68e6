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

BUNDLE = 12
"""Recoverabilities in a shard: each shard passes the images through the teacher once, for all of them."""

MOST_IN_PAIRS = 60
"""With more removable blocks than this, two at a time would be too many to measure."""

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
        pairs = min(bound, MOST_IN_PAIRS)
        parts = max(1, -(-(bound + pairs * (pairs - 1) // 2) // BUNDLE))
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

        `joint` is `(0, 0)` with too many blocks for pairs.

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
        lacks_pairs = knobs["selector"] == "pairwise" and not scores["joint"].size and len(scores["blocks"])
        return Plan(
            method=self.name,
            macs=profile.macs - int(scores["macs"][chosen].sum()),
            params=profile.params - int(scores["params"][chosen].sum()),
            choices={"blocks": {str(scores["blocks"][i]): str(scores["closings"][i]) for i in chosen}},
            loss=loss,
            bound=loss,
            notes=(f"more than {MOST_IN_PAIRS} removable blocks: pairs were not scored",) if lacks_pairs else (),
        )

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """A copy of the teacher without the plan's blocks; all other weights are the teacher's."""
        student = copy.deepcopy(teacher)
        drop(student, plan.choices["blocks"])
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
    """List the sets of blocks to score: every block, then every two of them unless there are too many."""
    singles: list[tuple[str, ...]] = [(name,) for name in names]
    return singles + (list(combinations(names, 2)) if len(names) <= MOST_IN_PAIRS else [])


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
    """The error of every two blocks, on the diagonal that of each; `(0, 0)` where pairs were not scored."""
    if len(names) > MOST_IN_PAIRS:
        return np.zeros((0, 0))
    joint = np.diag([float(merged[_key((name,))]) for name in names])
    for (i, one), (j, two) in combinations(enumerate(names), 2):
        joint[i, j] = joint[j, i] = merged[_key((one, two))]
    return joint


def interactions(scores: Scores, selector: str) -> np.ndarray:
    """The loss of every two blocks beyond the sum of their own errors, `(k, k)`, for the merged `scores`.

    It may be negative, as for blocks that destroy the same thing, but a block's negative entries never sum to more than
    its own error: they are scaled down to it. So no set gains from another block, however far pairs are extrapolated.
    For "additive", and where pairs were not scored, all are 0.
    """
    alone = scores["recoverability"]
    if selector == "additive" or not scores["joint"].size:
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

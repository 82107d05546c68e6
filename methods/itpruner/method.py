"""ITPruner: channel widths by the redundancy of layers, bought under a cost budget in one allocation."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from methods.allocation.grid import Charge, Grid
from methods.allocation.path import Path, build_path, least_loss, relative
from methods.base import Budget, Choice, Knob, KnobValue, Plan, Range, ScoreError, Scores, Shard
from methods.hooks import hooked, only_input
from methods.itpruner.hsic import SMALLEST_BATCH, centred_gram, hsic, merge_batches, ratio
from methods.itpruner.relaxation import Objective, Worth, upper_bound
from methods.network import ChannelGroup, Profile
from methods.network.widths import WidthCost, levels, nothing_to_cut, uncut, width_costs, widths_out_of_reach
from methods.protocol import collected, recover_student, settle_norms
from methods.refit.narrow import CRITERION, narrowed, width_choices
from methods.refit.removal import KIND, removal_keys, removal_shards, score_removal

_log = logging.getLogger(__name__)

Readout: TypeAlias = tuple[str, tuple[tuple[str, int, int], ...]]
"""The places to read a group's activation: its name and, for each layer it enters, the first entry and their number."""


@dataclass(frozen=True)
class ITPruner:
    """Keep groups wide that no other layer repeats, and cut channels of every other group first.

    Per channel group, redundancy is the sum of its normalised HSIC with all others; importance falls with it; widths
    maximise importance-weighted worth within the budget's MACs and params, counted exactly. The activation of a group
    is the input of the first layer to run among those that consume it: after norm, activation and a depthwise layer,
    and for a residual trunk the output of the block before, so of the stage's first.

    Knobs: `objective` is the worth of a remain rate (see `Worth`), `beta_rel` the rate at which importance falls with
    redundancy (0 ignores the data), `floor` the remain rate that groups are kept from falling below, `criterion` the
    choice of channels that stay.

    Source: Zheng et al., arXiv 2108.08532, and its released code (which alone gives the formulas).
    Differs: coupled channels are one variable and costs are exact, where the code double-counts or omits some layers.
        HSIC is debiased, in eval mode, over batches. Worth is concave by default with a soft floor, because the linear
        one kills whole layers; importance is scaled so that the solver can see it: in the released code it lies
        below the solver's tolerance, so published widths do not depend on it.
    """

    batch: int = 64
    name: ClassVar[str] = "itpruner"
    is_last: ClassVar[bool] = False
    refits: ClassVar[bool] = True
    knobs: ClassVar[Mapping[str, Knob]] = MappingProxyType(
        {
            "objective": Choice(("quadratic", "linear", "log"), "quadratic"),
            "beta_rel": Range(0.0, 4.0, 1.0),
            "floor": Range(0.1, 0.4, 0.2),
            "criterion": CRITERION,
        }
    )

    def accepts(self, profile: Profile) -> str | None:
        """`None`, or the reason why this network cannot be handled."""
        if reason := nothing_to_cut(self.name, profile):
            return reason
        unread = [
            group.name for group in _prunable(profile) if not any(member.axis == "in" for member in group.members)
        ]
        return f"no convolution or linear layer reads channel group {unread[0]!r}" if unread else None

    def shards(self, profile: Profile, calibration: Tensor) -> list[Shard]:
        """One shard per full batch of `calibration` `(n, c, h, w)`, or one of all samples if they fill no batch.

        A shard is `(batch, batches, start, stop, readouts)`; those of the elimination of channels follow.

        Raises:
            ScoreError: fewer than 4 samples, too few for a debiased estimate.
        """
        samples = len(calibration)
        size = min(self.batch, samples)
        if size < SMALLEST_BATCH:
            raise ScoreError(
                f"ITPruner would score batches of {size} samples; it needs at least {SMALLEST_BATCH}: "
                "give a larger calibration set or batch"
            )
        readouts = tuple(_readout(group) for group in _prunable(profile))
        batches = samples // size
        own = [(batch, batches, batch * size, (batch + 1) * size, readouts) for batch in range(batches)]
        return [*own, *removal_shards(profile, samples)]

    def score(self, shard: Shard, teacher: nn.Module, calibration: Tensor, seed: int) -> Scores:
        """One batch's HSIC of every two groups, `hsic` `(L, L)`, with `batch` and `batches`; or see `score_removal`.

        Raises:
            ScoreError: a group's activation holds NaN or infinity, or its layers never run.
        """
        if shard[0] == KIND:
            return score_removal(shard, teacher, calibration)
        batch, batches, start, stop, readouts = shard
        model = copy.deepcopy(teacher).eval()
        images = calibration[start:stop]
        grams = _grams(model, readouts, images)
        for name, *_ in readouts:
            if name not in grams:
                raise ScoreError(
                    f"no layer that reads channel group {name!r} ran; expected one; drop it from the model"
                )
            if not grams[name].isfinite().all():
                raise ScoreError(
                    f"the activation of channel group {name!r} is not finite in batch {batch}; "
                    "expected finite values: check the teacher and the calibration set"
                )
        if len({len(gram) for gram in grams.values()}) > 1:
            grams = _grams_of_images(model, readouts, images)
        joint = hsic([grams[name] for name, *_ in readouts]).cpu().numpy()
        return {"batch": np.array(batch), "batches": np.array(batches), "hsic": joint}

    def merge(self, partials: Sequence[Scores], profile: Profile) -> Scores:
        """Normalised HSIC over all batches, `nhsic` `(L, L)`, 0 on the diagonal for groups that never vary; all orders.

        Raises:
            ScoreError: a batch is missing or there twice, or an order is missing.
        """
        batches = [partial for partial in partials if "hsic" in partial]
        removal = collected([one for one in partials if "hsic" not in one], lambda _: removal_keys(profile))
        scores = {"nhsic": ratio(torch.from_numpy(merge_batches(batches))).numpy(), **removal}
        for name in _dead(scores, profile):
            _log.warning("channel group %r does not vary on the calibration set: taken as the most redundant", name)
        return scores

    def untouched(self, scores: Scores, profile: Profile) -> Mapping[str, str]:
        """The layers whose channel groups are all fixed, with the reasons."""
        return uncut(profile)

    def allocate(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """The best plan within every limit, out of one path of candidates for all budgets (see `build_path`).

        `loss` is the worth that the widths lose against the teacher's. `choices` also hold the lower `bounds` on it,
        from cvxpy and from prices, and the `gap` to the better one as a share of the loss of the smallest widths.

        Raises:
            Infeasible: not even the smallest widths fit.
        """
        objective, beta_rel = str(knobs["objective"]), float(knobs["beta_rel"])
        weights = importance(torch.from_numpy(scores["nhsic"]), beta_rel=beta_rel).tolist()
        worth = Worth(cast(Objective, objective), tuple(weights), float(knobs["floor"]))
        problem = _problem(profile, budget.channels, worth)
        chosen = problem.path.select(budget.limits())
        if chosen is None:
            raise widths_out_of_reach(self.name, budget, profile, problem.path.least())
        widths = problem.path.widths[chosen]
        loss, bounds = problem.loss(widths), problem.bounds(budget.limits())
        bound = min(loss, max(bounds.values()))
        macs, params = (problem.costs[name](widths) for name in ("macs", "params"))
        return Plan(
            method=self.name,
            macs=macs,
            params=params,
            choices=width_choices(problem.groups, widths, str(knobs["criterion"]), scores)
            | {"objective": objective, "beta_rel": beta_rel, "floor": worth.floor}
            | {"bounds": bounds, "gap": (loss - bound) / (problem.loss(problem.smallest) or 1.0)},
            loss=loss,
            bound=bound,
            notes=tuple(f"channel group {name!r} does not vary" for name in _dead(scores, profile)),
        )

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """A copy of `teacher` cut to the plan's widths and refit; groups keep their best channels by the criterion."""
        return narrowed(teacher, plan.choices, calibration)

    settle = settle_norms
    recover = recover_student


def redundancy(nhsic: Tensor) -> Tensor:
    """Each group's share t of all redundancy, `(L,)` float64, summing to 1, from normalised HSIC `(L, L)`.

    Negative estimates count as 0. A group that never varies (0 on the diagonal) is as redundant as the most redundant
    other; groups that share nothing are equally redundant.

    Raises:
        ScoreError: a value is not finite.

    >>> redundancy(torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.5], [0.1, 0.5, 1.0]]))
    tensor([0.2727, 0.4545, 0.2727], dtype=torch.float64)
    """
    if not nhsic.isfinite().all():
        group = int((~nhsic.isfinite()).any(1).nonzero()[0])
        raise ScoreError(f"the HSIC of channel group {group} is not finite; expected finite scores: score it again")
    nhsic = nhsic.double()
    shared = (nhsic - torch.diag(nhsic.diagonal())).clamp(min=0).sum(1)
    shared = torch.where(nhsic.diagonal() == 0, shared.max(), shared)
    return shared / shared.sum() if shared.sum() > 0 else torch.full_like(shared, 1 / len(shared))


def importance(nhsic: Tensor, *, beta_rel: float) -> Tensor:
    """The weight of each group's channels, `(L,)` float64, mean 1: `exp(-beta_rel (L t - 1))`, t the redundancy.

    Redundancy is rounded to 1e-9 of its mean first, so that scores of other hardware give the same plans.

    Source: ITPruner's released code, `exp(-beta t)`.
    Differs: `beta_rel = beta / L` means the same for any number of groups, and the mean is 1 for any beta.
    """
    relative = (redundancy(nhsic) * len(nhsic)).round(decimals=9)
    weights = torch.exp(-beta_rel * (relative - 1))
    return weights / weights.mean()


@dataclass(frozen=True)
class _Problem:
    """The inputs of `allocate` besides a budget, built once per network, grid, scores and knobs."""

    groups: tuple[ChannelGroup, ...]
    costs: Mapping[str, WidthCost]
    worth: Worth
    grid: Grid
    path: Path

    @property
    def smallest(self) -> np.ndarray:
        return np.array([widths[0] for widths in self.grid.widths])

    def loss(self, widths: np.ndarray) -> float:
        """The worth that `widths` `(L,)` lose against the base widths."""
        base = self.grid.pick(self.grid.top)
        terms = [self.worth(g, np.array([1.0, w / b])) for g, (w, b) in enumerate(zip(widths, base, strict=True))]
        return math.fsum(float(whole - kept) for whole, kept in terms)

    def bounds(self, limits: Mapping[str, int]) -> dict[str, float]:
        """Lower bounds on the loss of any plan within `limits`, from cvxpy and from prices on the grid."""
        charges, left = relative(self.grid, self.costs, limits)
        if not left:
            return {"cvxpy": 0.0, "prices": 0.0}
        base = self.grid.pick(self.grid.top)
        rates = {name: Charge(c.linear * base, c.pairs * np.outer(base, base)) for name, c in charges.items()}
        convex = float(self.grid.gain(self.grid.top)) - upper_bound(self.worth, rates, left, self.smallest / base)
        return {"cvxpy": max(0.0, float(convex)), "prices": least_loss(self.grid, self.costs, limits)}


@lru_cache(maxsize=8)
def _problem(profile: Profile, channels: int, worth: Worth) -> _Problem:
    costs, groups = width_costs(profile)
    widths = tuple(np.array(levels(group, channels)) for group in groups)
    grid = Grid(widths, tuple(worth(g, options / options[-1]) for g, options in enumerate(widths)))
    return _Problem(groups, costs, worth, grid, build_path(grid, costs))


def _prunable(profile: Profile) -> list[ChannelGroup]:
    return [group for group in profile.groups if group.fixed is None]


def _dead(scores: Scores, profile: Profile) -> list[str]:
    """Names of the groups that never vary."""
    return [g.name for g, own in zip(_prunable(profile), np.diag(scores["nhsic"]), strict=True) if own == 0]


def _readout(group: ChannelGroup) -> Readout:
    inputs = [member for member in group.members if member.axis == "in"]
    return group.name, tuple((m.module, m.start, group.width * m.columns) for m in inputs)


def _grams_of_images(model: nn.Module, readouts: Sequence[Readout], images: Tensor) -> dict[str, Tensor]:
    """Compare images where some layers read several maps of each, as windows of attention: all maps of one are one.

    That needs them to follow each other, so that images in the opposite order give the same matrices the other way.

    Raises:
        ScoreError: they do not.
    """
    grams, turned = (_grams(model, readouts, batch, fold=True) for batch in (images, images.flip(0)))
    for name, gram in grams.items():
        again = turned[name].flip(0, 1)
        if len(gram) != len(images) or not torch.allclose(again, gram, rtol=0, atol=1e-3 * float(gram.abs().max())):
            raise ScoreError(
                f"channel group {name!r} is read for other maps than the {len(images)} images, in no order of theirs, "
                "but ITPruner compares groups image by image; try uniform or alds"
            )
    return grams


@torch.no_grad()
def _grams(model: nn.Module, readouts: Sequence[Readout], images: Tensor, *, fold: bool = False) -> dict[str, Tensor]:
    cudnn = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with _reading(model, readouts, len(images) if fold else None) as grams, cudnn:
        model(images.clone())
    return grams


@contextmanager
def _reading(model: nn.Module, readouts: Sequence[Readout], images: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect each group's centred Gram matrix where it is read first, and let go of the activation at once.

    Given the number of `images`, all that is read for one of them is one sample.
    """
    grams: dict[str, Tensor] = {}

    def reader(name: str, start: int, length: int) -> Callable[..., None]:
        def read(module: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> None:
            given = only_input(inputs, named)
            if given is not None and name not in grams:
                axis = 1 if isinstance(module, nn.Conv2d) else -1
                maps = given.narrow(axis, start, length)
                is_folded = images is not None and len(maps) % images == 0
                grams[name] = centred_gram(maps.reshape(images or len(maps), -1) if is_folded else maps)

        return read

    hooks = (
        model.get_submodule(module).register_forward_pre_hook(reader(name, start, length), with_kwargs=True)
        for name, places in readouts
        for module, start, length in places
    )
    with hooked(hooks):
        yield grams

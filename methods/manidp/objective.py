"""The loss of one step of a gated network's training, and the thresholds that fall with the remain rate meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from methods.manidp.gates import Gated, mask_inputs
from methods.manidp.losses import (
    instance_weights,
    mean_rank_threshold,
    quantile_threshold,
    remain_rate,
    similarity_loss,
    sparsity_loss,
)
from methods.manidp.thresholds import set_quantiles, uniform_rate
from methods.training import Recipe
from methods.training.distributed import joined
from methods.training.objective import instance_losses

EASY = 0.5
"""The paper's t: images of a loss below this share of the mean are pushed to use few channels."""

GAMMA = 1.0
"""The exponent of the instance weights."""

FRESH = 0.1
"""Weight of the present step in the running means of thresholds and of the loss, in a long training."""

ROUNDS = 20
"""Renewals of the thresholds of mean ranks in one training. In a short one it also quickens the running means."""

DEAD = 1e-4
"""A gate whose mean saliency is below this is brought back."""

REVIVAL = 0.1
"""The amount that each step adds to the output biases of a gate that is brought back."""


class GatedObjective:
    """The loss of a step, to be called once per step in order; `student.plan` holds the target and the knobs.

    The thresholds of a step come from the steps before it: the first keeps every channel.

    Source: ManiDP, the authors' code. Differs: with `quantile` thresholds move every step; the mean loss is a running
    one, from the first step's on; the loss per image may hold the teacher's outputs; a gate that gives no saliency any
    more, and so no gradient, gets it back.
    """

    def __init__(self, student: Gated, teacher: nn.Module, recipe: Recipe) -> None:
        plan = student.plan
        assert plan is not None
        assert plan.macs_expected is not None
        self.student, self.teacher, self.recipe, self.choices = student, teacher, recipe, plan.choices
        self.final = uniform_rate(student.sites, student.fixed_macs, plan.macs_expected)
        self.fresh = min(1.0, max(FRESH, ROUNDS / max(1, recipe.steps)))
        self.step = 0
        self.rate = 1.0
        self.mean_loss = 0.0
        self.latest: list[Tensor] = []
        self.sums: list[Tensor] = []
        for mask in student.masks:
            mask.threshold.zero_()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.step += 1
        count = len(labels)
        target = None
        if self.recipe.distill > 0 or not self.recipe.labels:
            with torch.no_grad():
                target = joined(self.teacher(images.clone()), count)
        with mask_inputs(self.student) as found:
            output = joined(self.student(images), count)
        losses = instance_losses(output, labels, target, self.recipe)
        weights = instance_weights(losses, self._mean_before(losses), t=EASY, gamma=GAMMA)
        pairs = [
            (joined(features.float().mean((2, 3)), count), joined(saliency, count))
            for features, saliency in (found[gate] for gate in range(len(found)))
        ]
        loss = losses.mean()
        for features, saliency in pairs:
            loss = loss + self.choices["sparsity"] * sparsity_loss(saliency, weights)
            loss = loss + self.choices["similarity"] * similarity_loss(saliency, features)
        self._move([saliency.detach() for _, saliency in pairs])
        return loss

    @contextmanager
    def at_the_final_rate(self) -> Iterator[None]:
        """Set the thresholds to the final remain rate within the block, so that the network costs what is planned."""
        before = [mask.threshold.clone() for mask in self.student.masks]
        if self.rate > self.final:
            set_quantiles(self.student, self.latest, self.final)
        try:
            yield
        finally:
            for mask, threshold in zip(self.student.masks, before, strict=True):
                mask.threshold.copy_(threshold)

    def _mean_before(self, losses: Tensor) -> float:
        """The running mean of the loss before this step; at the first step, its own loss."""
        now = float(losses.detach().mean())
        before = now if self.step == 1 else self.mean_loss
        self.mean_loss = before + self.fresh * (now - before)
        return before

    @torch.no_grad()
    def _move(self, saliencies: list[Tensor]) -> None:
        """Set the next step's thresholds, and bring dead gates back."""
        self.latest = saliencies
        self.rate = remain_rate(self.step / self.recipe.steps, self.final, self.choices["hold"])
        if self.choices["thresholds"] == "quantile":
            self._follow_quantiles(saliencies)
        else:
            self._follow_mean_ranks(saliencies)
        for gate, saliency in zip(self.student.gates, saliencies, strict=True):
            if float(saliency.mean()) < DEAD:
                gate.expand.bias += REVIVAL

    def _follow_quantiles(self, saliencies: Sequence[Tensor]) -> None:
        share = 1.0 if self.step == 1 else self.fresh
        for mask, saliency in zip(self.student.masks, saliencies, strict=True):
            mask.threshold.lerp_(quantile_threshold(saliency, self.rate), share)

    def _follow_mean_ranks(self, saliencies: Sequence[Tensor]) -> None:
        """Renew the thresholds at the end of a round, from the means over all images of the round."""
        means = [saliency.mean(0) for saliency in saliencies]
        self.sums = [old + new for old, new in zip(self.sums, means, strict=True)] if self.sums else means
        length = max(1, self.recipe.steps // ROUNDS)
        if self.step % length == 0:
            for mask, total in zip(self.student.masks, self.sums, strict=True):
                mask.threshold.fill_(mean_rank_threshold(total / length, self.rate))
            self.sums = []

"""A chain: one method made of methods. Each link cuts the student of the one before and takes a share of the cut.

A link's scores belong to the network it cuts, so they are asked for while the chain is planned, link by link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeAlias

from torch import Tensor, nn

from methods.base import Budget, Choice, Infeasible, Knob, KnobValue, Plan, Scores
from methods.names import check_chain
from methods.network import Profile
from methods.protocol import Method
from methods.refit.fit import too_wide
from methods.training import Recipe, Samples

Scored: TypeAlias = Callable[[Method, Sequence[Plan]], tuple[Scores, Profile]]
"""A method's scores of the student that the plans of the links before it lead to, and that student's profile."""

AUTO = "auto"
"""The share of a link that is found by trying, where the planner can; elsewhere it is one half."""

SHARE = Choice((AUTO, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), AUTO)


def share_knob(link: Method) -> str:
    """Return the name of the knob that is a link's share."""
    return f"share.{link.name}"


@dataclass(frozen=True)
class Chain:
    """Methods applied one after the other, `first+second` by name.

    Knobs: `share.LINK` is the part of the cut still to be made that a link takes, for all but the last, which takes
    what is left: a number, or `auto`. `LINK.KNOB` is a link's own. A link that cannot take its share takes as much as
    it can.

    Raises:
        ValueError: fewer than two links, one of them twice, or a gated one before the last: its student's cost depends
            on the input, so no later link could plan for it.
    """

    links: tuple[Method, ...]

    def __post_init__(self) -> None:
        check_chain([link.name for link in self.links], [link.name for link in self.links if link.is_last])

    @property
    def name(self) -> str:
        return "+".join(link.name for link in self.links)

    @property
    def knobs(self) -> Mapping[str, Knob]:
        shares = {share_knob(link): SHARE for link in self.links[:-1]}
        return shares | {f"{link.name}.{name}": knob for link in self.links for name, knob in link.knobs.items()}

    def accepts(self, profile: Profile) -> str | None:
        """Return `None`, or why the first link cannot handle this network; the others judge their own student."""
        return self.links[0].accepts(profile)

    def plan(self, scored: Scored, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        """Plan link by link; `loss` is the sum of the links', `choices["links"]` holds the `Plan.to_json` of each.

        Raises:
            Infeasible: a link cannot handle its student, or the last one cannot make the rest of the cut.
        """
        plans: list[Plan] = []
        notes: tuple[str, ...] = ()
        for link in self.links:
            scores, profile = scored(link, tuple(plans))
            notes = notes if plans else too_wide(profile)
            if reason := link.accepts(profile):
                message = f"budget {budget.name!r}: {link.name} cannot go on from {self.name}'s student: {reason}"
                raise Infeasible(f"{message}; try its methods alone", {"macs": profile.macs, "params": profile.params})
            own = {name: knobs[f"{link.name}.{name}"] for name in link.knobs}
            if link is self.links[-1]:
                plans.append(self._last(scores, profile, budget, own))
            else:
                share = knobs[share_knob(link)]
                stage = _stage(budget, profile, 0.5 if share == AUTO else float(share))
                plans.append(_as_far_as_possible(link, scores, profile, stage, own))
        return Plan(
            method=self.name,
            macs=plans[-1].macs,
            params=plans[-1].params,
            choices={"links": [plan.to_json() for plan in plans]},
            loss=sum(plan.loss for plan in plans),
            notes=(*(note for plan in plans for note in plan.notes), *notes),
            macs_expected=plans[-1].macs_expected,
        )

    def _last(self, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
        try:
            return self.links[-1].allocate(scores, profile, budget, knobs)
        except Infeasible as error:
            size = f"which it gives {profile.macs:,} MACs and {profile.params:,} params"
            raise Infeasible(f"at the last link of {self.name}, {size}: {error}", error.least) from error

    def apply(self, teacher: nn.Module, plan: Plan, calibration: Tensor | None = None) -> nn.Module:
        """Build the student of all links; with calibration images every link starts from a settled student."""
        plans = link_plans(plan)
        before = student_of(teacher, list(zip(self.links, plans[:-1], strict=False)), calibration)
        return self.links[-1].apply(before, plans[-1], calibration)

    def settle(self, student: nn.Module, plan: Plan, calibration: Tensor) -> None:
        """Settle the student as its last link does."""
        self.links[-1].settle(student, link_plans(plan)[-1], calibration)

    def recover(
        self, student: nn.Module, teacher: nn.Module, data: Samples, recipe: Recipe, seed: int
    ) -> Iterator[int]:
        """Train the student once, after all cuts, as its last link does."""
        return self.links[-1].recover(student, teacher, data, recipe, seed)


AnyMethod: TypeAlias = Method | Chain


def links_of(method: AnyMethod) -> tuple[Method, ...]:
    """Return the links of a chain, or the method itself."""
    return method.links if isinstance(method, Chain) else (method,)


def plan_of(method: AnyMethod, scored: Scored, budget: Budget, knobs: Mapping[str, KnobValue]) -> Plan:
    """Plan a method or a chain for a budget; the notes name the layers that are not refit.

    Raises:
        Infeasible: no plan fits.
    """
    if isinstance(method, Chain):
        return method.plan(scored, budget, knobs)
    scores, profile = scored(method, ())
    plan = method.allocate(scores, profile, budget, knobs)
    return plan if method.is_last else replace(plan, notes=(*plan.notes, *too_wide(profile)))


def student_of(
    teacher: nn.Module, steps: Sequence[tuple[Method, Plan]], calibration: Tensor | None, *, refit: bool = True
) -> nn.Module:
    """Build the student that `steps` lead to, one after the other; without steps it is the teacher itself.

    With calibration images `(n, c, h, w)` each step's student is settled before the next one, if anything was cut;
    unless it is `refit` to them, its weights are its teacher's.
    """
    student = teacher
    for method, plan in steps:
        student = method.apply(student, plan, calibration if refit else None)
        if calibration is not None and plan.loss > 0 and needs_settling(method, refit=refit):
            method.settle(student, plan, calibration)
    return student


def needs_settling(method: AnyMethod, *, refit: bool) -> bool:
    """Whether `apply` leaves something to settle: not if it was to refit and the class says that it `refits`."""
    return not (refit and getattr(links_of(method)[-1], "refits", False))


def link_plans(plan: Plan) -> list[Plan]:
    """Return the plans of a chain's links."""
    return [Plan.from_json(values) for values in plan.choices["links"]]


def _stage(budget: Budget, profile: Profile, share: float) -> Budget:
    """Return the limits of a link that takes `share` of the cut from `profile` down to `budget`."""

    def limit(cost: str, final: int) -> int:
        have = int(getattr(profile, cost))
        return final if have <= final else ceil(have - share * (have - final))

    limits = {cost: limit(cost, final) for cost, final in budget.limits().items()}
    return Budget(budget.name, limits.get("macs"), limits.get("params"), budget.channels)


def _as_far_as_possible(
    link: Method, scores: Scores, profile: Profile, budget: Budget, knobs: Mapping[str, KnobValue]
) -> Plan:
    """Plan the link for `budget`, or for the least it can reach if that is more; else it cuts nothing.

    It cuts nothing if it reaches the least of each of two costs, but not of both together.
    """
    try:
        return link.allocate(scores, profile, budget, knobs)
    except Infeasible as error:
        raised = {cost: max(limit, int(error.least[cost])) for cost, limit in budget.limits().items()}
    try:
        within_reach = Budget(budget.name, raised.get("macs"), raised.get("params"), budget.channels)
        return link.allocate(scores, profile, within_reach, knobs)
    except Infeasible:
        whole = Budget(budget.name, profile.macs, profile.params, budget.channels)
        return link.allocate(scores, profile, whole, knobs)

"""The trial cut: a channel group may only be cut where a cut network does what its rows say, in outputs and in costs.

The graph of `methods.network.coupling` is guessed from a trace. It can be wrong about reshapes, attention and unknown
modules without saying so, and it cannot see sizes that the network's own code computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import Tell, untold
from methods.hooks import hooked
from methods.network.attention.heads import counted_heads, drafts
from methods.network.counting import count_params, counted, macs_by_module
from methods.network.coupling import FAILURES
from methods.network.cut import cut_to, entries, kept_channels
from methods.network.groups import ChannelGroup
from methods.network.rows import Profile
from methods.network.widths import WidthCost, width_costs

MOST_PER_GROUP, MOST_AT_LEAST = 8, 256
"""The most trial cuts that are made: so many for each group, or in all."""

AWAKE = 1.5
"""The deviation of queries, keys and values where heads are tried. Where they are small, as before training, attention
weighs all tokens alike, and a wrong scale of its products would not show."""


def proved(model: nn.Module, found: Profile, example: Tensor, tell: Tell = untold) -> tuple[ChannelGroup, ...]:
    """Return the groups of `found`, those fixed that fail a trial cut of `model` (in eval mode), with the reason.

    Half of every group goes at once, then of every second one, and so on: any two groups are told apart in one of the
    trials, so that a size which the network's code derives from another shows. `example` is `(n, c, h, w)`.
    Groups that are not proved within the trials that are made are fixed too. `tell` hears of every trial. Where single
    channels cannot go, heads of attention may.
    """
    teacher = _Teacher(model, example[:1])
    found = _with_heads(teacher, found, tell)
    reasons: dict[str, str] = {}
    trial = _Trial(teacher, found, tell)
    while left := [group for group in trial.groups if group.name not in reasons]:
        fresh: dict[str, str] = {}
        for part in _parts(left):
            fresh |= trial.faults([group for group in part if group.name not in fresh])
        if not fresh:
            break
        reasons |= fresh
    return tuple(replace(g, fixed=reasons[g.name]) if g.name in reasons else g for g in found.groups)


def _with_heads(teacher: _Teacher, found: Profile, tell: Tell) -> Profile:
    """Put groups of whole heads in the place of those whose channels cannot go one by one, if the heads can."""
    heads = {group: name for group in found.groups if (name := counted_heads(teacher.model, group, found))}
    if not heads:
        return found
    macs = macs_by_module(teacher.model, teacher.example)
    teacher = _Teacher(_awake(teacher.model, teacher.example, heads), teacher.example)
    for number, (group, name) in enumerate(heads.items(), 1):
        tell(number, len(heads), "trial cuts of heads")
        fault = group.fixed or _fault_of(teacher, found, group)
        for draft in drafts(teacher.model, group, name, found, macs) if fault else ():
            tried = _replaced(found, draft)
            if (fault := _fault_of(teacher, tried, draft)) is None:
                found = tried
                break
        if fault and group.fixed is None:
            reason = f"{fault}, nor without half of the heads ({name}); keep the width of a head in the module itself"
            found = _replaced(found, replace(group, fixed=reason))
    return found


@torch.no_grad()
def _awake(model: nn.Module, example: Tensor, groups: Iterable[ChannelGroup]) -> nn.Module:
    """Copy `model`, with layers that produce `groups` scaled until their outputs have the deviation `AWAKE`."""
    model = copy.deepcopy(model)

    def wake(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        factor = AWAKE / max(float(output.std()), 1e-6)
        for parameter in layer.parameters(recurse=False):
            parameter.mul_(factor)
        return output * factor

    names = {member.module for group in groups for member in group.members if member.axis == "out"}
    with hooked(model.get_submodule(name).register_forward_hook(wake) for name in names):
        model(example.clone())
    return model


def _replaced(found: Profile, group: ChannelGroup) -> Profile:
    """Put a group in the place of that of its name."""
    return replace(found, groups=tuple(group if one.name == group.name else one for one in found.groups))


def _fault_of(teacher: _Teacher, found: Profile, group: ChannelGroup) -> str | None:
    """Say why a single group cannot be cut."""
    return _Trial(teacher, found).faults([group]).get(group.name)


def _parts(groups: Sequence[ChannelGroup]) -> Iterator[list[ChannelGroup]]:
    """Yield all groups, then for each binary digit of their places those where it is 1."""
    yield list(groups)
    for digit in range((len(groups) - 1).bit_length()):
        yield [group for place, group in enumerate(groups) if place >> digit & 1]


@dataclass
class _Trial:
    """Cuts half of some groups of the teacher and compares; `made` counts the trials."""

    teacher: _Teacher
    found: Profile
    tell: Tell = untold
    made: int = 0

    @cached_property
    def _costs(self) -> tuple[dict[str, WidthCost], tuple[ChannelGroup, ...]]:
        return width_costs(self.found)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups that are not fixed."""
        return self._costs[1]

    def faults(self, part: Sequence[ChannelGroup]) -> dict[str, str]:
        """Return by name why groups of `part` cannot be cut: tried all at once, then by halves where that fails."""
        if not part:
            return {}
        if not self.teacher.is_steady:
            return {group.name: "the network answers the same image differently from call to call" for group in part}
        most = max(MOST_AT_LEAST, MOST_PER_GROUP * len(self.groups))
        if self.made >= most:
            return {group.name: f"{most} trial cuts did not tell which channels can be cut" for group in part}
        self.made += 1
        self.tell(self.made, most, "trial cuts, at most")
        reason = self._fault(part)
        if reason is None:
            return {}
        middle = len(part) // 2
        halves = self.faults(part[:middle]) | self.faults(part[middle:]) if middle else {}
        return halves or {part[0].name: reason}

    def _fault(self, part: Sequence[ChannelGroup]) -> str | None:
        """Say why half of every group of `part` cannot go.

        The cut network must cost what its widths say, and match the one whose readers ignore that half. A wrong
        coupling changes the output about as much as the cut does, rounding (TF32 included) far less.
        """
        kept = self.teacher.halves(part)
        student = cut_to(self.teacher.model, part, kept, shares=True)
        try:
            found, macs = counted(student, self.teacher.example)
        except FAILURES as error:
            return f"the network does not run without these channels ({type(error).__name__})"
        vector = np.array([len(kept.get(group.name, range(group.width))) for group in self.groups])
        for cost, actual in (("macs", macs), ("params", count_params(student))):
            if (planned := self._costs[0][cost](vector)) != actual:
                return (
                    f"without these channels the network needs {actual:,} {cost}, but its layers alone {planned:,}: "
                    "another step of its forward shrinks with them"
                )
        whole, expected = self.teacher.whole, self.teacher.ignoring(part, kept)
        slack = 1e-2 * (expected - whole).abs().max() + 1e-6 * whole.abs().max()
        if found.shape == expected.shape and bool((found - expected).abs().max() <= slack):
            return None
        return "the network without these channels differs from one in which nothing reads them"


@dataclass
class _Teacher:
    """The whole network and its outputs for `example`, `(1, c, h, w)`."""

    model: nn.Module
    example: Tensor

    def halves(self, groups: Sequence[ChannelGroup]) -> dict[str, np.ndarray]:
        """Choose half of the channels of every group."""
        halves = {group.name: max(group.width // group.multiple // 2, 1) * group.multiple for group in groups}
        return kept_channels(self.model, groups, halves, "l1")

    @cached_property
    def whole(self) -> Tensor:
        """The outputs."""
        with torch.no_grad():
            return cast(Tensor, self.model(self.example.clone()))

    @cached_property
    def is_steady(self) -> bool:
        """Whether a second call gives the same outputs."""
        with torch.no_grad():
            again = self.model(self.example.clone())
        return torch.allclose(self.whole, again, rtol=1e-3, atol=1e-5, equal_nan=True)

    @torch.no_grad()
    def ignoring(self, part: Sequence[ChannelGroup], kept: dict[str, np.ndarray]) -> Tensor:
        """Return the output where nothing reads the channels that are not `kept`; the weights are restored."""
        before: list[tuple[Tensor, Tensor, Tensor]] = []
        for group in part:
            gone = np.setdiff1d(np.arange(group.width), kept[group.name])
            for member in group.members:
                if member.axis == "in":
                    weight = self.model.get_submodule(member.module).weight
                    assert isinstance(weight, Tensor)
                    columns = torch.from_numpy(entries(member, gone)).to(weight.device)
                    before.append((weight, columns, weight[:, columns].clone()))
                    weight[:, columns] = 0
        output = self.model(self.example.clone())
        for weight, columns, values in reversed(before):
            weight[:, columns] = values
        return cast(Tensor, output)

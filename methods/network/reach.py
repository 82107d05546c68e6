"""Say that a method cannot meet a budget: the same words, units and figures for every method."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from methods.base import Budget, Infeasible
from methods.network.rows import Profile

UNITS: Mapping[str, str] = MappingProxyType({"macs": "MACs", "params": "params"})
"""The costs that a budget may limit, and their names in messages."""


def out_of_reach(
    method: str,
    budget: Budget,
    profile: Profile,
    least: Mapping[str, int],
    *,
    why: Mapping[str, str],
    advice: str = "raise it or try another method",
) -> Infeasible:
    """Build the error for a budget that `method` cannot meet, ready to be raised.

    Only the limits below `least` are named. Where each limit is within reach alone but both together are not, both are
    named.

    Args:
        profile: the network that is cut, whose costs are those of the teacher.
        least: by cost, the least value that the method reaches.
        why: by cost, a clause that follows the least value.
        advice: what the user can do.
    """
    limits = budget.limits()
    missed = [cost for cost in limits if least[cost] > limits[cost]]

    def named(cost: str) -> str:
        teacher = getattr(profile, cost)
        return (
            f"allows {limits[cost]:,} {UNITS[cost]} ({limits[cost] / teacher:.1%} of the teacher), but {method} "
            f"reaches no less than {least[cost]:,} ({least[cost] / teacher:.1%}), {why[cost]}"
        )

    parts = "; it also ".join(named(cost) for cost in missed or limits)
    together = "" if missed else " (each limit is within reach alone, both together are not)"
    message = f"budget {budget.name!r} {parts}{together}; {advice}"
    return Infeasible(message, {cost: least[cost] for cost in limits})

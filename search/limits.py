"""Costs by name, and the limits of a budget: the one place that says whether a network fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

AXES: tuple[str, ...] = ("macs", "macs_expected", "params")
"""The costs a frontier is drawn over, beside each device's latency. MACs and expected MACs are two axes: a masked
channel is not a saved one."""

TOP1_DROP = "top1_drop"
"""The cost that is a loss: validation top-1 of the teacher minus the student's."""

_LATENCY = "latency_ms/"

Costs: TypeAlias = Mapping[str, float]
"""The costs of a network by name: `AXES`, `size_bytes`, `TOP1_DROP` and a `latency_on` each device. A cost that was not
measured is missing."""


def latency_on(device: str) -> str:
    """The name of the cost that is the median latency on a device, in milliseconds."""
    return _LATENCY + device


def device_of(cost: str) -> str | None:
    """The device whose latency a cost is, or None.

    >>> device_of(latency_on("nano")), device_of("macs")
    ('nano', None)
    """
    return cost.removeprefix(_LATENCY) if cost.startswith(_LATENCY) else None


def latencies_in(costs: Iterable[str]) -> list[str]:
    """Those costs that are latencies, each once, in order."""
    return [cost for cost in dict.fromkeys(costs) if device_of(cost) is not None]


class Limits(dict[str, float]):
    """Upper limits of a budget in absolute units, by the name of the cost; all are to be met at once.

    >>> limits = Limits(macs=100, top1_drop=0.02)
    >>> limits.met_by({"macs": 90, "top1_drop": 0.03}), limits.met_by({"macs": 90})
    (False, False)
    >>> limits.excess({"macs": 150, "top1_drop": 0.0})
    {'macs': 0.5, 'top1_drop': -0.02}
    """

    def met_by(self, costs: Costs) -> bool:
        """Whether no cost lies above its limit; a missing one does."""
        return not self.exceeded(costs)

    def exceeded(self, costs: Costs) -> list[str]:
        """The costs above their limits."""
        return [cost for cost, limit in self.items() if not costs.get(cost, math.inf) <= limit]

    def fill(self, costs: Costs) -> float:
        """Return how full the fullest limit on a cost is, as a share of it; the MACs where none is limited.

        >>> Limits(macs=100, params=10).fill({"macs": 50, "params": 8})
        0.8
        """
        shares = [costs.get(cost, math.inf) / limit for cost, limit in self.items() if cost != TOP1_DROP and limit > 0]
        return max(shares) if shares else costs["macs"]

    def excess(self, costs: Costs) -> dict[str, float]:
        """Return each cost's excess over its limit, as a share of it: negative if there is room, infinite if missing.

        The loss of top-1 counts as it is, since it may be limited to nothing.
        """
        return {
            cost: found - limit if cost == TOP1_DROP else found / limit - 1
            for cost, limit in self.items()
            for found in (costs.get(cost, math.inf),)
        }

"""A budget as the search sees it: its limits in absolute units, and the part of them that allocators meet."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Budget
from search.limits import Limits, latency_on


@dataclass(frozen=True)
class Target:
    """One budget's limits, all to be met at once, and the device whose latency and channel multiple it means."""

    name: str
    limits: Limits
    device: str
    channels: int = 1

    @property
    def budget(self) -> Budget:
        """The limits that a plan meets by construction; the others are measured."""
        planned = {cost: int(self.limits[cost]) for cost in ("macs", "macs_expected", "params") if cost in self.limits}
        return Budget(self.name, channels=self.channels, **planned)

    @property
    def size_bytes(self) -> int | None:
        """The limit on the stored weights."""
        return int(self.limits["size_bytes"]) if "size_bytes" in self.limits else None

    @property
    def latency_ms(self) -> float | None:
        """The limit on the median latency on the device."""
        return self.limits.get(latency_on(self.device))

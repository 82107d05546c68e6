"""A budget as the search sees it: limits that allocators meet by construction, and limits on measured costs."""

from __future__ import annotations

from dataclasses import dataclass

from methods.base import Budget
from search.trials import LATENCY


@dataclass(frozen=True)
class Target:
    """One budget's limits in absolute units, all to be met at once.

    `budget` holds those that a plan meets by construction. `size_bytes` are those of the stored weights, `latency_ms`
    is the median on `device`, and `top1_drop` is the validation top-1 that may be lost to the teacher.
    """

    budget: Budget
    device: str
    size_bytes: int | None = None
    latency_ms: float | None = None
    top1_drop: float | None = None

    @property
    def name(self) -> str:
        """The budget's name."""
        return self.budget.name

    def declared(self) -> dict[str, float]:
        """Every limit by the name of its cost, as `search.trials.cost_of` knows it."""
        measured = {
            "size_bytes": self.size_bytes,
            f"{LATENCY}{self.device}": self.latency_ms,
            "top1_drop": self.top1_drop,
        }
        return self.budget.declared() | {cost: limit for cost, limit in measured.items() if limit is not None}

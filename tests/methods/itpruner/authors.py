"""The authors' own width solver, which returns the published channel lists: a yardstick for the path.

Its importance lies many orders below the solver's tolerance, so what it returns is in effect the nearest point of the
cost surface by Newton steps from full width: the published lists come out, integer for integer, with importance 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize

from methods.allocation.grid import Charge, Grid
from methods.network.widths import WidthCost

_MILLION = 1e6


def reference_rates(charges: Sequence[tuple[Charge, float]], importance: np.ndarray) -> np.ndarray:
    """Remain rates `(L,)` in `[0, 1]` that SLSQP finds for `max importance @ x`, each charge within its limit.

    Starts outside the limits, at full width; constraint gradients by finite differences; default tolerances.

    Source: ITPruner's released code (arXiv 2108.08532, one commit).
    """
    rules = [{"type": "ineq", "fun": lambda x, c=charge, b=limit: b - float(c(x))} for charge, limit in charges]
    count = len(importance)
    found = minimize(
        lambda x: -float(importance @ x), np.ones(count), method="SLSQP", bounds=[(0, 1)] * count, constraints=rules
    )
    rates: np.ndarray = np.clip(found.x, 0, 1)
    return rates


def reference_widths(
    grid: Grid, costs: Mapping[str, WidthCost], importance: Sequence[float], limits: Mapping[str, int]
) -> np.ndarray:
    """Widths `(L,)` on the grid near the reference's rates on exact costs, shrunk together until they fit `limits`.

    The smallest widths of the grid must fit.

    Differs: the released code rounds to single channels and does not check the budget again.
    """
    base = grid.pick(grid.top)
    charges = [
        (
            Charge(costs[name].linear * base / _MILLION, costs[name].pairs * np.outer(base, base) / _MILLION),
            (limit - costs[name].constant) / _MILLION,
        )
        for name, limit in limits.items()
    ]
    rates = reference_rates(charges, np.array(importance))
    for shrink in np.linspace(1, 0, 401):
        wanted = rates * base * shrink
        widths = np.array(
            [w[max(0, np.searchsorted(w, x, "right") - 1)] for w, x in zip(grid.widths, wanted, strict=True)]
        )
        if all(costs[name](widths) <= limit for name, limit in limits.items()):
            break
    return widths

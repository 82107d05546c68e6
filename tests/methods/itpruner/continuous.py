"""The best remain rates when widths need not be whole channels, beside a proven bound: a yardstick for plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from methods.allocation.grid import Charge
from methods.itpruner.relaxation import Worth, upper_bound

_RANDOM_STARTS = 8
_SLACK = 2e-6
"""Relative distance to the bound that is the solver's accuracy and not worth another start."""


@dataclass(frozen=True)
class Continuous:
    """Remain rates `(L,)`, their worth, and a proven upper bound on the worth of any."""

    rates: np.ndarray
    value: float
    bound: float


def continuous(worth: Worth, charges: Mapping[str, Charge], limits: Mapping[str, float], low: np.ndarray) -> Continuous:
    """The best rates found in `[low, 1]` `(L,)` whose charges are within the limits: `low` is a hard floor.

    Sequential quadratic programming from full width, equal rates and eight seeded random points, until one result
    meets the bound. Each result is pulled towards `low` until it truly fits.

    Args:
        worth: the objective; its own soft floor applies too.
        charges: by name, what rates cost (not widths), without the constant part, as a share of the whole.
        limits: by name, what may be spent of each; keys among those of `charges`.
        low: the least rate of each group, above 0.

    Raises:
        ValueError: `low` itself exceeds a limit.

    Source: ITPruner (arXiv 2108.08532) solves the same program, with SLSQP from full width.
    Differs: exact gradients and a scaled problem, several starts, and a bound.
    """
    limited = [(charges[name], limit) for name, limit in limits.items()]
    if any(charge(low) > limit for charge, limit in limited):
        raise ValueError(f"rates {low.min():.3g} and up exceed the limits {dict(limits)}; lower the floor")
    bound = upper_bound(worth, charges, limits, low)
    best = Continuous(low, worth.total(low), bound)
    for start in _starts(low):
        rates = _fitted(_solve(worth, limited, low, start), limited, low)
        if (value := worth.total(rates)) > best.value:
            best = Continuous(rates, value, bound)
        if best.value >= bound - _SLACK * (1 + abs(bound)):
            break
    return best


def _starts(low: np.ndarray) -> Iterator[np.ndarray]:
    yield np.ones_like(low)
    yield low + (1 - low) / 2
    random = np.random.default_rng(0)
    for _ in range(_RANDOM_STARTS):
        yield low + (1 - low) * random.random(len(low))


def _solve(worth: Worth, limited: list[tuple[Charge, float]], low: np.ndarray, start: np.ndarray) -> np.ndarray:
    rules = [
        {
            "type": "ineq",
            "fun": lambda x, charge=charge, limit=limit: 1 - float(charge(x)) / limit,
            "jac": lambda x, charge=charge, limit=limit: -charge.gradient(x) / limit,
        }
        for charge, limit in limited
    ]
    found = minimize(
        lambda x: -worth.total(x),
        start,
        jac=lambda x: -worth.gradient(x),
        method="SLSQP",
        bounds=list(zip(low, np.ones_like(low), strict=True)),
        constraints=rules,
        options={"ftol": 1e-10, "maxiter": 300},
    )
    rates: np.ndarray = np.clip(found.x, low, 1)
    return rates


def _fitted(rates: np.ndarray, limited: list[tuple[Charge, float]], low: np.ndarray) -> np.ndarray:
    """The point nearest to `rates` on the way to `low` that is within every limit, to 50 halvings."""
    near, far = 0.0, 1.0
    if all(charge(rates) <= limit for charge, limit in limited):
        return rates
    for _ in range(50):
        middle = (near + far) / 2
        fits = all(charge(low + middle * (rates - low)) <= limit for charge, limit in limited)
        near, far = (middle, far) if fits else (near, middle)
    fitted: np.ndarray = low + near * (rates - low)
    return fitted

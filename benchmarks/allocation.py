"""The exact ALDS allocation beside the published heuristic: same error tables, same budgets, one run.

    python benchmarks/allocation.py

An error table holds `group_max` of every layer (scheme 0), slice count (all divisors of the input channels) and rank.
A budget is a share of all conv and linear weights; staying dense is always an option, at error 0. Both sides get the
finished table and answer one budget at a time. Seconds are CPU seconds, medians of `REPEATS` calls: on a busy machine
a wall clock would charge the interruptions to the longer calls alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import nn

from methods.alds import minimax
from methods.alds.spectra import MEASURES, curves
from methods.alds.staircase import Options
from search.workload import zoo

TRAINED = Path(__file__).parents[1] / "examples" / "fashion_mnist_resnet20.safetensors"
HEADS = ("net", "budget", "heuristic max error", "exact max error", "gap %", "heuristic CPU s", "exact CPU s", "ratio")
SHARES = (0.5, 0.3, 0.2, 0.1, 0.05)
REPEATS = 21
SEED = 0
STARTS, FIXED_SLICES = 15, (3, 5, 7, 9)
ALTERNATIONS = 4
HALVINGS = 30  # root finding ends at an error interval of 2^-30


@dataclass(frozen=True)
class Tables:
    """Errors `(layers, counts, ranks)`, the price of one rank `(layers, counts)` and of the dense layer `(layers,)`.

    Column j of the last axis is rank j; ranks a layer does not have hold 0. `slices` lists each layer's slice counts;
    counts it does not have cost more than the dense layer.
    """

    errors: np.ndarray
    prices: np.ndarray
    dense: np.ndarray
    slices: list[np.ndarray]


def main() -> None:
    """Measure both networks and print the table."""
    torch.set_num_threads(1)
    rows = [row for name, model in networks().items() for row in compare(name, model)]
    widths = [max(map(len, column)) for column in zip(HEADS, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for name, *numbers in (HEADS, rule, *rows):
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        print(f"| {' | '.join([name.ljust(widths[0]), *aligned])} |")


def networks() -> dict[str, nn.Module]:
    """The two networks by name; ResNet-20 with its trained weights if they lie in the examples."""
    small = zoo.build("resnet20", channels=1, classes=10, seed=SEED)
    if TRAINED.is_file():
        small.load_state_dict(safetensors.torch.load_file(TRAINED))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        large = torchvision.models.resnet18(weights=None)
    return {f"resnet20 ({'trained' if TRAINED.is_file() else 'random'})": small, "resnet18 (random)": large}


def compare(name: str, model: nn.Module) -> list[list[str]]:
    """One row of cells per budget."""
    start = process_time()
    tables = read(model)
    print(f"{name}: error table in {process_time() - start:.2f} s", end=", ")
    options = as_options(tables)
    print(f"{len(options)} layers, {sum(map(len, options)):,} options")
    rows = []
    for share in SHARES:
        budget = int(share * tables.dense.sum())
        calls = (partial(exact, options, budget), partial(heuristic, tables, budget, SEED))
        (least, fast), (found, slow) = timed(*calls)
        errors = [f"{found:.4f}", f"{least:.4f}", f"{100 * (found / least - 1):.1f}"]
        rows.append([name, f"{share:.0%}", *errors, f"{slow:.4f}", f"{fast:.4f}", f"{slow / fast:.0f}"])
    return rows


def timed(*calls: Callable[[], float]) -> list[tuple[float, float]]:
    """The result of each call and the median of its seconds; the calls take turns, so the machine's moods meet all."""
    seconds: list[list[float]] = [[] for _ in calls]
    results = [call() for call in calls]
    for _ in range(REPEATS):
        for taken, call in zip(seconds, calls, strict=True):
            start = process_time()
            call()
            taken.append(process_time() - start)
    return [(result, median(taken)) for result, taken in zip(results, seconds, strict=True)]


@torch.no_grad()
def read(model: nn.Module) -> Tables:
    """The tables of every conv and linear layer of `model`, none of which is grouped."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    slices = [np.array([k for k in range(1, w.shape[1] + 1) if w.shape[1] % k == 0]) for w in weights]
    dense = np.array([weight.numel() for weight in weights])
    counts, ranks = max(map(len, slices)), max(map(len, weights)) + 1
    errors = np.zeros((len(weights), counts, ranks))
    prices = np.repeat(dense[:, None] + 1, counts, axis=1)
    for layer, weight in enumerate(weights):
        found = [curves(weight, groups=1, slices=int(count), scheme=0) for count in slices[layer]]
        for at, (count, curve) in enumerate(zip(slices[layer], found, strict=True)):
            errors[layer, at, : curve.shape[1]] = MEASURES["group_max"](curve, found[0], int(count))
        prices[layer, : len(found)] = slices[layer] * len(weight) + weight[0].numel()
    return Tables(errors, prices, dense, slices)


def as_options(tables: Tables) -> list[Options]:
    """Each layer's (error, params): the layer itself, then every slice count and rank that costs less."""
    options: list[Options] = []
    for errors, prices, dense in zip(tables.errors, tables.prices.tolist(), tables.dense.tolist(), strict=True):
        cheaper = [
            (error, rank * price)
            for curve, price in zip(errors.tolist(), prices, strict=True)
            for rank, error in enumerate(curve[: (dense - 1) // price + 1])
            if rank
        ]
        options.append([(0.0, dense), *cheaper])
    return options


def exact(options: Sequence[Options], budget: int) -> float:
    """The least largest error of all."""
    return max(layer[at][0] for layer, at in zip(options, minimax(options, budget), strict=True))


def heuristic(tables: Tables, budget: int, seed: int) -> float:
    """The least largest error of `STARTS` starts, each with `ALTERNATIONS` of the two steps.

    Where the description leaves room, in the heuristic's favour: a layer stays dense where that is no dearer, the best
    step of all counts, and its error is the one reached, not the root finder's argument. `budget` must be in reach and
    always holds; a start over it halves its slice counts until it fits.

    Source: Liebenwein et al. 2021 (arXiv 2107.11442), the global step, with the starts of the authors' code.
    """
    generator = np.random.default_rng(seed)
    best = np.inf
    for start in range(STARTS):
        picks = generator.integers([len(counts) for counts in tables.slices])
        if start < len(FIXED_SLICES):
            picks = np.array([nearest(counts, FIXED_SLICES[start]) for counts in tables.slices])
        while costs_at(tables, picks, 1.0).sum() > budget:
            picks = np.array([halved(counts, at) for counts, at in zip(tables.slices, picks, strict=True)])
        for _ in range(ALTERNATIONS):
            errors, picks = best_slices(tables, common_threshold(tables, picks, budget))
            best = min(best, errors.max())
    return float(best)


def common_threshold(tables: Tables, picks: np.ndarray, budget: int) -> np.ndarray:
    """The cost of every layer `(layers,)` at the least common error threshold that keeps the budget, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if costs_at(tables, picks, middle).sum() <= budget else (middle, high)
    return costs_at(tables, picks, high)


def costs_at(tables: Tables, picks: np.ndarray, threshold: float) -> np.ndarray:
    """The cost of every layer `(layers,)` at the least rank, from 1, of an error within `threshold`."""
    own = (np.arange(len(picks)), picks)
    ranks = (tables.errors[own] > threshold).sum(1).clip(1)
    return np.asarray(np.minimum(ranks * tables.prices[own], tables.dense))


def best_slices(tables: Tables, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least error `(layers,)` each layer reaches at no more than its present cost, and the slice count for it."""
    ranks = costs[:, None] // tables.prices
    errors = np.take_along_axis(tables.errors, ranks[:, :, None], axis=2)[:, :, 0]
    errors = np.where(ranks > 0, errors, np.inf)
    return np.where(costs == tables.dense, 0.0, errors.min(1)), errors.argmin(1)


def nearest(counts: np.ndarray, wanted: int) -> int:
    """The position of the count nearest to `wanted`, the larger of two."""
    return min(range(len(counts)), key=lambda at: (abs(counts[at] - wanted), -counts[at]))


def halved(counts: np.ndarray, at: int) -> int:
    """The position of the largest count of at most half the one at `at`, or of the smallest."""
    return max(int(np.searchsorted(counts, counts[at] / 2, side="right")) - 1, 0)


if __name__ == "__main__":
    main()

"""Published channel lists of ITPruner and the cost tables its released code constrains, as data.

A table holds one base width per variable, and what each variable and pair of variables cost in the code's own count
("FLOPs": multiply-accumulates and a few per output entry). Where it errs, the table errs with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from methods.allocation.grid import Charge


@dataclass
class Table:
    """A cost under construction: `base` widths, and coefficients by variable and by pair of variables."""

    base: list[int]
    linear: dict[int, float] = field(default_factory=dict)
    pairs: dict[tuple[int, int], float] = field(default_factory=dict)

    def add(self, *variables: int, cost: float) -> None:
        """Add `cost` per channel of each of one or two variables."""
        full = cost * np.prod([self.base[v] for v in variables])
        if len(variables) == 1:
            self.linear[variables[0]] = self.linear.get(variables[0], 0.0) + full
        else:
            key = (min(variables), max(variables))
            self.pairs[key] = self.pairs.get(key, 0.0) + full

    def charge(self) -> Charge:
        """The cost of remain rates, in millions."""
        linear, pairs = np.zeros(len(self.base)), np.zeros((len(self.base),) * 2)
        for variable, value in self.linear.items():
            linear[variable] = value / 1e6
        for pair, value in self.pairs.items():
            pairs[pair] = value / 1e6
        return Charge(linear, pairs)


def vgg() -> Table:
    table = Table([64, 64, 128, 128, *[256] * 3, *[512] * 6])
    side = 32
    table.add(0, cost=27 * side**2)
    for i in range(13):
        if i:
            table.add(i - 1, i, cost=9 * side**2)
        table.add(i, cost=5 * side**2)
        if i in (1, 3, 6, 9):
            side //= 2
            table.add(i, cost=2 * side**2)
    table.add(12, cost=1031)
    return table


def mobilenet() -> Table:
    table = Table([32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024])
    side = 112
    table.add(0, cost=27 * side**2)
    for i in range(1, 14):
        side //= 2 if i in (2, 4, 6, 12) else 1
        table.add(i - 1, cost=9 * side**2)
        table.add(i - 1, i, cost=side**2)
    table.add(13, cost=2000)
    return table


def mobilenetv2() -> Table:
    table = Table([32, 16, 24, 32, 64, 96, 160, 320])
    side = 112
    table.add(0, cost=36 * side**2)
    table.add(0, 1, cost=side**2)
    for stage, (stride, repeats) in enumerate(zip((2, 2, 2, 1, 2, 1), (1, 2, 3, 2, 2, 0), strict=True), start=1):
        table.add(stage, stage, cost=6 * side**2)
        side //= stride
        table.add(stage, cost=54 * side**2)
        table.add(stage, stage + 1, cost=6 * side**2)
        for _ in range(repeats):
            table.add(stage + 1, stage + 1, cost=12 * side**2)
            table.add(stage + 1, cost=54 * side**2)
    table.add(7, cost=1280 * side**2)
    return table


def cifar_resnet(blocks: int) -> Table:
    table = Table([width for width in (16, 32, 64) for _ in range(blocks)])
    for i, width in enumerate(table.base):
        side = 512 // width
        table.add(i, cost=8 * side**2)
        table.add(i, i, cost=9 * side**2)
        if i == 0:
            table.add(0, cost=144 * side**2)
        else:
            table.add(i - 1, i, cost=(9 if table.base[i - 1] == width else 10) * side**2)
    table.add(len(table.base) - 1, cost=20)
    return table


def resnet50() -> Table:
    table = Table([64])
    table.add(0, cost=152 * 112**2 + 9 * 56**2)
    previous = 0
    for blocks, width, side in zip((3, 4, 6, 3), (64, 128, 256, 512), (56, 28, 14, 7), strict=True):
        first = len(table.base)
        one, two, trunk = first, first + 1, first + 2
        table.base += [width, width, 4 * width, *[width] * (2 * (blocks - 1))]
        table.add(previous, trunk, cost=side**2)
        table.add(trunk, cost=5 * side**2)
        for block in range(blocks):
            if block:
                one, two = trunk + 2 * block - 1, trunk + 2 * block
            source, entry = (trunk, side) if block else (previous, 2 * side)
            table.add(source, one, cost=entry**2)
            table.add(one, cost=5 * entry**2)
            table.add(one, two, cost=9 * side**2)
            table.add(two, cost=5 * side**2)
            table.add(two, trunk, cost=side**2)
            table.add(trunk, cost=5 * side**2)
        previous = trunk
    table.add(two, cost=2000)
    return table


@dataclass(frozen=True)
class Vector:
    """A published list for a target in millions of the code's FLOPs, and the list's cost by its table."""

    table: Callable[[], Table]
    target: float
    constrained: float
    widths: list[int]


VECTORS = {
    "vgg_100m": Vector(vgg, 100, 100.55, [44, 35, 71, 71, 145, 104, 145, 290, 205, 325, 432, 429, 469]),
    "resnet20_20m": Vector(lambda: cifar_resnet(3), 20, 20.16, [11, 11, 11, 22, 21, 22, 45, 43, 48]),
    "mobilenet_50m": Vector(mobilenet, 50, 50.05, [18, 31, 30, 38, 71, 76, 173, 52, 78, 78, 51, 178, 250, 522]),
    "mobilenet_150m": Vector(
        mobilenet, 150, 149.28, [23, 42, 63, 67, 132, 134, 275, 194, 202, 202, 194, 277, 522, 687]
    ),
    "mobilenetv2_150m": Vector(mobilenetv2, 150, 147.42, [29, 12, 16, 24, 43, 50, 98, 273]),
    "mobilenetv2_220m": Vector(mobilenetv2, 220, 217.90, [31, 14, 20, 28, 54, 74, 130, 298]),
    "resnet50_1800m": Vector(
        resnet50,
        1800,
        1796.80,
        [
            48,
            52,
            52,
            110,
            *[52] * 4,
            98,
            105,
            142,
            *[105] * 6,
            197,
            211,
            48,
            *[211] * 10,
            397,
            420,
            1264,
            *[419] * 3,
            418,
        ],
    ),
    "resnet50_2000m": Vector(
        resnet50,
        2000,
        2002.08,
        [
            50,
            53,
            54,
            125,
            *[54] * 4,
            101,
            108,
            179,
            *[107] * 6,
            203,
            216,
            148,
            *[215] * 10,
            407,
            429,
            1341,
            *[429] * 3,
            428,
        ],
    ),
    "resnet50_2300m": Vector(
        resnet50,
        2300,
        2300.46,
        [52, 55, 55, 146, *[55] * 4, 105, 111, 232, *[111] * 6, 211, 222, 290, *[222] * 10, 423, 442, 1453, *[442] * 4],
    ),
}
"""The nine lists that the released solver returns with importance 0; ResNet-50: per stage mid, mid, trunk, mids."""

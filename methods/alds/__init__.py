"""ALDS: layers decomposed into slices of low rank, ranks of all layers chosen at once.

Read `method` first, then `options` (the replacements of a layer), `spectra` (their errors), `moments` and `whitening`
(errors weighted by data), `staircase` (the paper's minimax) and `knapsack` (the exact choice).
"""

from methods.alds.method import ALDS
from methods.alds.spectra import decompose, relative_errors
from methods.alds.staircase import minimax

__all__ = ["ALDS", "decompose", "minimax", "relative_errors"]

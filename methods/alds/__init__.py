"""ALDS: layers decomposed into slices of low rank, ranks of all layers chosen at once.

Read `method` first, then `options` (what a layer can become), `spectra` (its error), `moments` and `whitening` (errors
weighted by data), `staircase` (the paper's minimax) and `knapsack` (the exact choice).
"""

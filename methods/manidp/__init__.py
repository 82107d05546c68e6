"""ManiDP: channels gated anew for every input.

Read `method` first, then `sites` (the places for gates), `gates`, `losses` (the paper's regularisers), `objective`
(what they are trained on), `thresholds` (which meet a budget) and `settling` (thresholds and norms together). The room
`executor` is for Python users only.
"""

from methods.manidp.losses import instance_weights, mean_rank_threshold, similarity_loss
from methods.manidp.method import ManiDP

__all__ = ["ManiDP", "instance_weights", "mean_rank_threshold", "similarity_loss"]

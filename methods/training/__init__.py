"""The one training loop of every method.

Read `recipe` first (the words), then `objective` (losses), `evaluation` (top-1, batch norms), `loop` and `distributed`
(a step that processes share).
"""

from methods.training.evaluation import evaluate, recalibrate, top1
from methods.training.loop import recover, train
from methods.training.recipe import Metric, Recipe, Samples

__all__ = ["Metric", "Recipe", "Samples", "evaluate", "recalibrate", "recover", "top1", "train"]

"""The one training loop of every method.

Read `task` first (what outputs mean) and `recipe` (the words), then `objective` (losses), `evaluation` (metrics, batch
norms), `loop` and `distributed` (a step that processes share).
"""

from methods.training.evaluation import Judgement, evaluate, judge, parts, reads, recalibrate
from methods.training.loop import recover, train
from methods.training.recipe import Metric, Recipe, Samples
from methods.training.task import CLASSIFICATION, Classification, Regression, Segmentation, Task, top1

__all__ = [
    "CLASSIFICATION",
    "Classification",
    "Judgement",
    "Metric",
    "Recipe",
    "Regression",
    "Samples",
    "Segmentation",
    "Task",
    "evaluate",
    "judge",
    "parts",
    "reads",
    "recalibrate",
    "recover",
    "top1",
    "train",
]

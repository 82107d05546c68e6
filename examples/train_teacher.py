"""Train the zoo teacher that a spec names, and write its weights to the file that `model.weights` names.

python examples/train_teacher.py examples/fashion_mnist.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

from methods.training import evaluate, top1
from search.spec import reading
from search.workload import loading, zoo
from search.workload.teacher import fit_teacher, save_weights, teacher_recipe


def main() -> None:
    """Train, test once, write."""
    path = Path(sys.argv[1])
    wanted = reading.load(path)
    assert wanted.model.weights is not None
    splits = loading.read_splits(wanted)
    teacher = zoo.build(wanted.model.name, splits.calibration.shape[1], splits.classes, wanted.data.seed)
    recipe = teacher_recipe(len(splits.train), wanted.recovery.precision)
    fit_teacher(teacher, splits, recipe, lambda _, done, total, note: print(f"{done}/{total} {note}", flush=True))
    print(f"test top-1 {evaluate(teacher, splits.test, top1):.4f}")
    save_weights(teacher, path.parent / wanted.model.weights)


if __name__ == "__main__":
    main()

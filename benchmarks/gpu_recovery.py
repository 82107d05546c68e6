"""The methods on ResNet-56 with a long recovery, which a GPU makes quick: one table per budget.

    python benchmarks/gpu_recovery.py --root FOLDER_OF_FASHION_MNIST

The teacher is trained first, by the zoo's recipe. Every row is one `paredown compress`, on the GPU if there is one;
`--network resnet14 --data digits --steps 20` shows in two minutes of CPU that it runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from comparison import figures, table

ROWS = ("uniform", "itpruner", "practise", "alds", "manidp", "practise+alds")
BUDGETS = {"half": "50%", "third": "35%"}

SPEC = """
name: gpu-recovery
model: {{source: zoo, name: {network}, weights: train}}
data: {{source: {data}{root}}}
methods: [itpruner, practise, alds, manidp, [practise, alds]]
budgets: [{budgets}]
recovery: {{steps: {steps}, precision: bf16}}
"""


def main() -> None:
    """Run every row for every budget and print the tables."""
    parser = argparse.ArgumentParser(description="The methods on a deeper network with a long recovery.")
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--root", type=Path, help="the folder with the data's files")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("paredown.gpu"), help="where models and figures are kept")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    spec = given.out / f"{given.network}.yaml"
    root = f", root: {given.root.resolve()}" if given.root else ""
    budgets = ", ".join(f"{{name: {name}, macs: {share}}}" for name, share in BUDGETS.items())
    spec.write_text(SPEC.format(network=given.network, data=given.data, root=root, budgets=budgets, steps=given.steps))
    for budget, share in BUDGETS.items():
        found = {row: figures(spec, budget, row, given.out / budget / row) for row in ROWS}
        print(f"\n{given.network}, {share} of the MACs, {given.steps} steps\n\n{table(found)}")


if __name__ == "__main__":
    main()

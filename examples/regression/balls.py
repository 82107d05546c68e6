"""Pictures of a ball with its place and size, and a network that reads them off.

    python examples/regression/balls.py

trains the network and writes `teacher.safetensors` beside this file, in about twenty seconds on one core.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

SIDE = 32


def images() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A training and a test set: pictures `(n, 1, 32, 32)`, and row, column and radius `(n, 3)` in pixels."""
    return drawn(3000, np.random.default_rng(0)), drawn(600, np.random.default_rng(1))


def network() -> nn.Module:
    """Six convolutions with batch norms and two linear layers."""
    layers: list[nn.Module] = []
    for before, after, stride in [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]:
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 3))


def drawn(count: int, chance: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw balls of any grey before noise."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    radius = chance.uniform(3, 8, count)
    place = chance.uniform(radius, SIDE - radius, (2, count))
    distance = np.hypot(rows - place[0][:, None, None], columns - place[1][:, None, None])
    grey = chance.uniform(0.5, 1.5, (count, 1, 1)) * chance.choice([-1, 1], (count, 1, 1))
    pictures = grey * (distance < radius[:, None, None]) + chance.normal(0, 0.5, (count, SIDE, SIDE))
    return {"images": pictures[:, None].astype(np.float32), "labels": np.stack([*place, radius], 1).astype(np.float32)}


def train(steps: int = 600, batch: int = 64) -> nn.Module:
    """Train the network from scratch, on pictures that are drawn anew for every step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found, chance = network(), np.random.default_rng(2)
    optimizer = torch.optim.AdamW(found.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        data = drawn(batch, chance)
        loss = (found(torch.from_numpy(data["images"])) - torch.from_numpy(data["labels"])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"the last squared error is {loss.item():.3f} pixels")
    return found


if __name__ == "__main__":
    place = Path(__file__).with_name("teacher.safetensors")
    save_file(train().state_dict(), place)
    print(f"wrote {place.name}, beside balls.yaml")

"""Pictures of shapes with their masks, and a segmenter of torchvision's for them.

    python examples/segmentation/shapes.py

trains the segmenter and writes `teacher.safetensors` beside this file, in about a minute on one core.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v3_small
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import LRASPP

SIDE = 64
CLASSES = 4
"""Background, disc, square and triangle."""


def images(count: int = 1200, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A training and a test set: pictures `(n, 3, 64, 64)` of up to four shapes in noise, masks `(n, 64, 64)`."""
    return _drawn(count, np.random.default_rng((seed, 0))), _drawn(count // 4, np.random.default_rng((seed, 1)))


def segmenter() -> nn.Module:
    """LRASPP on MobileNetV3-small, 1.1 million parameters; it returns a dict, whose logits are called `out`."""
    layers = mobilenet_v3_small(weights=None, dilated=True, norm_layer=partial(nn.BatchNorm2d, momentum=0.1)).features
    backbone = IntermediateLayerGetter(layers, return_layers={"1": "low", "12": "high"})
    return LRASPP(backbone, low_channels=16, high_channels=576, num_classes=CLASSES)


def _drawn(count: int, chance: np.random.Generator) -> dict[str, np.ndarray]:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pictures = chance.normal(0, 0.3, (count, 3, SIDE, SIDE))
    masks = np.zeros((count, SIDE, SIDE), np.uint8)
    for picture, mask in zip(pictures, masks, strict=True):
        for _ in range(chance.integers(1, 5)):
            kind, size = chance.integers(1, CLASSES), chance.integers(6, 16)
            top, left = chance.integers(size, SIDE - size, 2)
            down, right = rows - top, columns - left
            inside = [
                down**2 + right**2 < size**2,
                np.maximum(abs(down), abs(right)) < size,
                (abs(right) < (down + size) / 2) & (down < size),
            ][kind - 1]
            mask[inside] = kind
            color = chance.uniform(0.7, 2, 3) * chance.choice([-1, 1], 3)
            picture[:, inside] = color[:, None] + chance.normal(0, 0.3, (3, int(inside.sum())))
    return {"images": pictures.astype(np.float32), "labels": masks}


def train(steps: int = 500, batch: int = 32) -> nn.Module:
    """Train the segmenter from scratch, on pictures that are drawn anew for every step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, chance = segmenter(), np.random.default_rng(1)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(1, steps + 1):
        data = _drawn(batch, chance)
        logits = network(torch.from_numpy(data["images"]))["out"]
        loss = F.cross_entropy(logits, torch.from_numpy(data["labels"]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return network


if __name__ == "__main__":
    place = Path(__file__).with_name("teacher.safetensors")
    save_file(train().state_dict(), place)
    print(f"wrote {place.name}, beside segmentation.yaml")

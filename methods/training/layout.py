"""The layout of maps in memory that a network runs fastest in."""

from __future__ import annotations

import torch
from torch import nn


def running_layout(model: nn.Module) -> torch.memory_format:
    """Return channels last, in which oneDNN's grouped convolutions run twice as fast; not for maps of three axes."""
    has_volumes = any(value.ndim == 5 for value in model.state_dict().values() if isinstance(value, torch.Tensor))
    return torch.contiguous_format if has_volumes else torch.channels_last


def training_layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return the layout that `model` runs fastest in, unless training in it corrupts memory.

    On CPUs the backward pass of a strided 1x1 convolution of few input channels, as cut projections have them, writes
    past its workspace (oneDNN issue 6035, in torch 2.15): a block of channels there is 8 wide with AVX2, 16 with
    AVX-512.
    """
    is_exposed = device.type == "cpu" and any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 16
        for m in model.modules()
    )
    return torch.contiguous_format if is_exposed else running_layout(model)

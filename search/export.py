"""Export a network: as a program of torch (pt2), or as ONNX."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """`model` as a program for any batch size, which `torch.export.load` reads without this project."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))

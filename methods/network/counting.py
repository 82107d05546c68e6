"""Count a network's costs the way a trial counts its student's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_params(model: nn.Module) -> int:
    """Count all parameters of `model`, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-accumulates of a pass on `example[:1]` by `torch.utils.flop_counter` (FLOPs = 2 x MACs).

    Attention's fused fast path is switched off meanwhile, because the counter does not see into it.
    """
    return counted(model, example)[1]


def macs_by_module(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Count the multiply-accumulates of each module of `model`, those inside it included, for `example[:1]`."""
    with _counting(model) as counter:
        model(example[:1].clone())
    found = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    root = type(model).__name__
    return {name: found.get(f"{root}.{name}" if name else root, 0) for name, _ in model.named_modules()}


def counted(model: nn.Module, example: Tensor) -> tuple[Tensor, int]:
    """Return the output for `example[:1]`, which is left as it is, and the multiply-accumulates of the pass."""
    with _counting(model) as counter:
        output = model(example[:1].clone())
    return output, int(counter.get_total_flops()) // 2


@contextmanager
def _counting(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Count the FLOPs of passes of `model`, none of whose parameters needs a gradient meanwhile.

    torch's counter fails at a view of one that does where no gradients are recorded, such as a token given to a layer.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with fastpath_off(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        for parameter in learning:
            parameter.requires_grad_()


@contextmanager
def fastpath_off() -> Iterator[None]:
    """Keep attention from its fused kernels, which read weights past their layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

"""One row per layer: the costs of a network and the channels that must go together.

The profile is plain data (names and integers), so a plan can be computed, checked and shown without the network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from methods.base import Unsupported
from methods.hooks import hooked
from methods.network.coupling import find_groups
from methods.network.groups import ChannelGroup


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    `macs` are for one input and all `calls` together; `params` are weight and bias. `in_hw` and `out_hw` are the map
    sides the layer reads and writes in one call; a linear layer has `(rows, 1)` for both, rows being 1 or tokens.
    `group` names the channel group its outputs belong to, `block` the innermost enclosing module that keeps the shape
    of its input.
    """

    name: str
    kind: Literal["conv", "linear"]
    weight_shape: tuple[int, ...]
    groups: int
    macs: int
    params: int
    calls: int
    in_hw: tuple[int, int]
    out_hw: tuple[int, int]
    group: str | None
    block: str | None


@dataclass(frozen=True)
class Profile:
    """A network's rows, channel groups and totals, for one input of `input_shape` `(c, h, w)`.

    `macs` and `params` are of the whole network: `macs` half of what `torch.utils.flop_counter` counts, so they include
    attention products that belong to no layer; `params` include norms and free parameters.
    """

    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    macs: int
    params: int
    input_shape: tuple[int, ...]

    def layer(self, name: str) -> Layer:
        """Return the row of that name."""
        return next(layer for layer in self.layers if layer.name == name)


def count_params(model: nn.Module) -> int:
    """Count all parameters of `model`, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-accumulates of a pass on `example[:1]` by `torch.utils.flop_counter` (FLOPs = 2 x MACs).

    Attention's fused fast path is switched off meanwhile, because the counter does not see into it.
    """
    with _fastpath_off(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example[:1])
    return int(counter.get_total_flops()) // 2


def profile(model: nn.Module, example: Tensor) -> Profile:
    """Profile `model` (left untouched) on `example`, `(n, c, h, w)` with n >= 1.

    Raises:
        Unsupported: the model has no convolution or linear layer, or its output is not `(n, classes)`.
    """
    model = copy.deepcopy(model).eval()
    calls, blocks = _trace(model, example[:1])
    if not calls:
        raise Unsupported("the network runs no Conv2d and no Linear layer, so there is nothing to compress")
    groups = find_groups(model, example[:1])
    group_of = {m.module: group.name for group in groups for m in group.members if m.axis == "out"}
    layers = tuple(
        _row(name, module, calls[name], group_of.get(name), _innermost(name, blocks))
        for name, module in model.named_modules()
        if name in calls
    )
    return Profile(layers, groups, count_macs(model, example), count_params(model), tuple(example.shape[1:]))


_Call: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def _trace(model: nn.Module, example: Tensor) -> tuple[dict[str, list[_Call]], list[str]]:
    """Return the shapes of every call of a conv or linear, and the names of modules that keep their input's shape."""
    calls: dict[str, list[_Call]] = {}
    blocks: list[str] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def record(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                return
            if isinstance(module, nn.Conv2d | nn.Linear):
                calls.setdefault(name, []).append((tuple(inputs[0].shape), tuple(output.shape)))
            elif any(True for _ in module.children()) and inputs[0].shape == output.shape:
                blocks.append(name)

        return record

    hooks = (module.register_forward_hook(recorder(name)) for name, module in model.named_modules() if name)
    with hooked(hooks), _fastpath_off(), torch.no_grad():
        output = model(example)
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise Unsupported(f"the network must return logits of shape (n, classes), but it returned {shape}")
    return calls, blocks


def _row(name: str, module: nn.Module, calls: list[_Call], group: str | None, block: str | None) -> Layer:
    source, target = calls[0]
    weight = module.weight
    assert isinstance(weight, Tensor)
    is_conv = isinstance(module, nn.Conv2d)
    positions = [(out[-2] * out[-1] if is_conv else _rows(out)) for _, out in calls]
    return Layer(
        name=name,
        kind="conv" if is_conv else "linear",
        weight_shape=tuple(weight.shape),
        groups=module.groups if isinstance(module, nn.Conv2d) else 1,
        macs=sum(positions) * weight.numel(),
        params=weight.numel() + (module.bias.numel() if isinstance(module.bias, Tensor) else 0),
        calls=len(calls),
        in_hw=(source[-2], source[-1]) if is_conv else (_rows(source), 1),
        out_hw=(target[-2], target[-1]) if is_conv else (_rows(target), 1),
        group=group,
        block=block,
    )


def _rows(shape: tuple[int, ...]) -> int:
    """Count the rows a linear layer sees for one input: the product of the axes between batch and features."""
    return int(torch.Size(shape[1:-1]).numel())


def _innermost(name: str, blocks: list[str]) -> str | None:
    return max((block for block in blocks if name.startswith(f"{block}.")), key=len, default=None)


@contextmanager
def _fastpath_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

"""A network as plain data: a row per layer, the channel groups, the totals. `methods.network.profile` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from methods.network.groups import ChannelGroup


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    `macs` are for one input and all `calls` together, with all maps that the network makes of it; `params` are weight
    and bias. `in_hw` and `out_hw` are the sides of one map the layer reads and writes in one call; a linear layer has
    `(rows, 1)` for both, rows being 1 or tokens. `group` names the channel group its outputs belong to, `block` the
    innermost enclosing module that keeps the shape of its input. `whole` says why nothing may take the layer's place.
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
    whole: str | None = None


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

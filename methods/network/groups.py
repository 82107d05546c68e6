"""Coupled channel groups as plain data: channels that can only be cut together.

`methods.network.coupling` finds the groups of a network, `methods.network.widths` lists their legal widths with costs,
and `methods.network.cut` cuts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Axis: TypeAlias = Literal["out", "in", "norm", "count"] | int


@dataclass(frozen=True)
class Member:
    """One axis of one module, or of what a module holds itself, that shrinks with a group.

    Channel `c` of the group owns the entries from `start + c * columns` to `start + (c + 1) * columns - 1` of that
    axis: `columns` exceeds 1 where a map is flattened into a linear layer, `start` is not 0 behind a concatenation. An
    axis that holds the channels more than once, as behind a concatenation of a map with itself, has as many members.
    `axis` is "out" or "in" for a conv or linear (a depthwise or grouped conv is "out" only: its inputs follow), "norm"
    for a per-channel norm or PReLU, which holds `params` trainable numbers per entry (0 for a conv or linear, whose
    row in the profile says it).

    Where the channels are heads of attention, `columns` are a head's, and `module` may also be the dotted name of what
    a module holds: a parameter or buffer with an entry per head on `axis`, then a number, or an integer that its code
    reads ("count"), such as `attn.num_heads`. `macs` are multiply-accumulates per channel outside of all layers.
    """

    module: str
    axis: Axis
    start: int
    columns: int
    params: int = 0
    macs: int = 0


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are cut together, named after the first layer that produces them.

    `fixed` says why the group may not be cut (None: it may). Channels leave in whole runs of `multiple`, so it divides
    every allowed width: it exceeds 1 where a grouped convolution, as in ResNeXt, loses whole convolution groups. Of
    attention, a channel is a whole head: `width` counts heads.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    multiple: int = 1
    fixed: str | None = None

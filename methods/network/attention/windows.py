"""Attention in shifted windows, as torchvision's Swin has it, whose layers are called and whose heads may go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

UNSEEN = -100.0
"""Added to the logits of two tokens that share a window only because the map was shifted."""


class ShiftedWindowAttention(nn.Module):
    """The layers, the table and the sizes of torchvision's class of that name.

    torchvision hands the weights of the layers to a function, which takes the width of a head from the map. Here each
    layer is called, and `head_dim` is kept. The state has the same names, and the module looks the same when printed,
    so a search that began with torchvision's goes on.

    Source: Liu et al., Swin Transformer (arXiv 2103.14030), section 3.2, as in torchvision.
    """

    relative_position_index: Tensor

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.window_size, self.shift_size = list(given.window_size), list(given.shift_size)
        self.num_heads, self.head_dim = given.num_heads, given.qkv.out_features // 3 // given.num_heads
        self.attention_dropout, self.dropout = given.attention_dropout, given.dropout
        self.qkv, self.proj = given.qkv, given.proj
        self.relative_position_bias_table = given.relative_position_bias_table
        self.register_buffer("relative_position_index", given.relative_position_index)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of every window of a map, `(n, h, w, c)`."""
        height, width = x.shape[1], x.shape[2]
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        _, down, right, _ = x.shape
        steps = self.shift_size[0] if rows < down else 0, self.shift_size[1] if columns < right else 0
        if not any(steps):
            return self._windowed(x, None)[:, :height, :width].contiguous()
        x = torch.roll(x, (-steps[0], -steps[1]), (1, 2))
        x = self._windowed(x, self._unseen(x, steps))
        return torch.roll(x, steps, (1, 2))[:, :height, :width].contiguous()

    def _windowed(self, x: Tensor, unseen: Tensor | None) -> Tensor:
        """Mix the tokens of every window of a map that holds whole ones, `(n, h, w, c)`."""
        shape = x.shape
        x = self._mixed(self._split(x), unseen)
        rows, columns = self.window_size
        x = x.view(shape[0], shape[1] // rows, shape[2] // columns, rows, columns, -1).transpose(2, 3)
        return x.reshape(shape)

    def _split(self, x: Tensor) -> Tensor:
        """Turn a map `(n, h, w, c)` into the tokens of its windows, `(n * windows, tokens, c)`."""
        rows, columns = self.window_size
        images, down, right, channels = x.shape
        x = x.view(images, down // rows, rows, right // columns, columns, channels).transpose(2, 3)
        return x.reshape(-1, rows * columns, channels)

    def _mixed(self, x: Tensor, unseen: Tensor | None) -> Tensor:
        """Attend within windows, `(n * windows, tokens, c)`; `unseen` `(windows, tokens, tokens)` is added."""
        tokens = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        table = self.relative_position_bias_table[self.relative_position_index]
        logits = logits + table.view(tokens, tokens, -1).permute(2, 0, 1)
        if unseen is not None:
            logits = logits.unflatten(0, (-1, len(unseen))) + unseen[:, None]
            logits = logits.flatten(0, 1)
        weights = F.dropout(logits.softmax(-1), self.attention_dropout, self.training)
        mixed = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return F.dropout(mixed, self.dropout, self.training)

    def _unseen(self, x: Tensor, steps: tuple[int, int]) -> Tensor:
        """Tell which tokens of a window come from apart, by `UNSEEN`: `(windows, tokens, tokens)`."""
        area = x.new_zeros(1, x.shape[1], x.shape[2], 1)
        sides = zip(self.window_size, steps, strict=True)
        parts = [(slice(0, -size), slice(-size, -step), slice(-step, None)) for size, step in sides]
        for number, (down, right) in enumerate((one, other) for one in parts[0] for other in parts[1]):
            area[:, down, right] = number
        area = self._split(area).squeeze(-1)
        return torch.where(area[:, None] == area[:, :, None], 0.0, UNSEEN).to(x.dtype)

"""Small vision transformers whose attention is written in several ways; each reads `(n, 3, 16, 16)`, in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.odd_networks import seeded


class Fused(nn.Module):
    """One layer for queries, keys and values; heads, their width and that of all are kept, as in timm's ViT."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim, self.attn_dim = dim, heads, dim // heads, dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, dim = x.shape
        assert dim == self.dim
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return cast(Tensor, self.proj(mixed.reshape(images, tokens, self.attn_dim)))


class Normed(Fused):
    """Norms the queries and keys of each head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2)
        return cast(Tensor, self.proj(mixed.reshape(*x.shape[:2], -1)))


class Separate(nn.Module):
    """A layer each for queries, keys and values, products by hand, the names of the transformers library."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, dim // heads, dim
        self.query, self.key, self.value, self.dense = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = (q @ k.transpose(-1, -2) * self.attention_head_size**-0.5).softmax(-1) @ v
        return cast(Tensor, self.dense(mixed.transpose(1, 2).reshape(*x.shape[:2], self.all_head_size)))


class Biased(nn.Module):
    """A bias per head and pair of tokens, as in Swin; the width of a head is what is left of the layer's."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.num_heads, self.scale = dim, heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn(31, heads))
        self.register_buffer("temperature", torch.rand(heads, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        apart = torch.arange(tokens)[:, None] - torch.arange(tokens) + 15
        logits = self.scale * q @ k.transpose(-1, -2) * cast(Tensor, self.temperature)
        mixed = (logits + self.table[apart].permute(2, 0, 1)).softmax(-1) @ v
        return cast(Tensor, self.proj(mixed.transpose(1, 2).reshape(images, tokens, -1)))


class FromInput(nn.Module):
    """Takes the width of a head from its input, so that none can go."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return cast(Tensor, self.proj(mixed.reshape(images, tokens, dim)))


class ScaledByInput(Biased):
    """Takes the scale of its products from the width of its input, so that it would change with the heads."""

    def forward(self, x: Tensor) -> Tensor:
        self.scale = (x.shape[-1] // self.num_heads) ** -0.5
        return super().forward(x)


class Block(nn.Module):
    """Attention and two layers behind norms, each added to what it reads."""

    def __init__(self, dim: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), attention, nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Sixteen patches through a block of four heads and one of three."""

    def __init__(self, attention: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.num_heads = 4  # for nobody
        self.patches, self.place = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.randn(16, 24))
        self.blocks = nn.Sequential(*(Block(24, attention(24, heads)) for heads in (4, 3)))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return cast(Tensor, self.head(self.norm(self.blocks(tokens)).mean(1)))


def transformer(attention: Callable[[int, int], nn.Module]) -> nn.Module:
    """Build one with weights of a fixed seed."""
    return seeded(partial(Transformer, attention))

"""Self-attention as torch's `MultiheadAttention` has it, whose layers are called and whose heads may go."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """The weights of an `nn.MultiheadAttention` in plain layers, for calls with one map for queries, keys and values.

    torch's own holds one matrix in place of layers, and as many channels as its input has.

    Source: Vaswani et al., Attention is all you need (arXiv 1706.03762), section 3.2.2, as in torch.
    """

    def __init__(self, given: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = given.num_heads, given.head_dim
        self.batch_first, self.dropout = given.batch_first, given.dropout
        weight, bias = given.in_proj_weight, given.in_proj_bias
        self.qkv = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
        self.qkv.weight, self.qkv.bias = weight, bias
        self.out_proj = nn.Linear(weight.shape[1], weight.shape[1], bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = given.out_proj.weight, given.out_proj.bias

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, **others: object
    ) -> tuple[Tensor, None]:
        """Mix the tokens, `(n, tokens, c)` or, unless `batch_first`, `(tokens, n, c)`; there are no weights to return.

        Raises:
            ValueError: the three maps are not one, or more is asked for than to mix them.
        """
        asked = [name for name, value in others.items() if value is not None and value is not False]
        if key is not query or value is not query or query.ndim != 3 or {*asked} - {"average_attn_weights"}:
            raise ValueError(f"this attention mixes one map (n, tokens, c) with itself, without {asked or 'another'}")
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


def is_plain(module: nn.Module) -> bool:
    """Whether a module is torch's attention of one map with itself, as far as its weights tell."""
    if type(module) is not nn.MultiheadAttention or not module._qkv_same_embed_dim:
        return False
    return module.bias_k is None and not module.add_zero_attn

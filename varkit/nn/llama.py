"""Llama blocks: RMS norm and a gated feed-forward, no biases (arXiv 2302.13971), as LlamaGen uses them.

Legend: N rows, L slots, C width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from varkit.nn.adaln import drop_path
from varkit.nn.attention import NoNorm, Rotation, SelfAttention, Window
from varkit.nn.linear import Linear


class SwiGLU(nn.Module):
    """silu(gate(x)) * up(x), projected down; (N, L, C) -> (N, L, C)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def llama_hidden(width: int, multiple_of: int = 256) -> int:
    """Two thirds of 4 C, rounded up to a multiple."""
    return -(-int(2 * 4 * width / 3) // multiple_of) * multiple_of


class LlamaBlock(nn.Module):
    """x += Attn(RMS(x)); x += SwiGLU(RMS(x)), with dropout on both branches."""

    compilable = ("forward",)

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention = SelfAttention(width, heads, NoNorm(), kv_heads=kv_heads, bias="none", out_bias=False)
        self.ffn = SwiGLU(width, hidden)
        self.dropout, self.drop_path_rate = nn.Dropout(dropout), drop_path

    def forward(
        self, x: Tensor, window: Window, layer: int, rotate: Rotation | None = None, port=None
    ) -> Tensor:
        mixed = self.dropout(self.attention(self.norm1(x), window, layer, rotate))
        if port is not None:
            mixed = port(mixed)
        x = x + drop_path(mixed, self.drop_path_rate, self.training)
        return x + drop_path(self.dropout(self.ffn(self.norm2(x))), self.drop_path_rate, self.training)

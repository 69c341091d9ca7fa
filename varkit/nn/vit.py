"""The plain transformer block of a ViT (arXiv 2010.11929), pre-norm with biases everywhere, as MAE and MAR use it.

Legend: N rows, L slots, C width.
"""

from torch import Tensor, nn

from varkit.nn.adaln import FeedForward
from varkit.nn.attention import NoNorm, SelfAttention, Window


class ViTBlock(nn.Module):
    """x += Attn(LN(x)); x += FFN(LN(x)); x (N, L, C). `attention_dropout` is that of the probabilities."""

    compilable = ("forward",)

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads, NoNorm(), bias="qkv", dropout=attention_dropout)
        self.ffn = FeedForward(width, round(width * mlp_ratio), approximate="none", dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, window: Window, layer: int, port=None) -> Tensor:
        """`port` sees the attention's output."""
        mixed = self.dropout(self.attention(self.norm1(x), window, layer))
        if port is not None:
            mixed = port(mixed)
        x = x + mixed
        return x + self.dropout(self.ffn(self.norm2(x)))

"""Transformer blocks steered by a condition vector (AdaLN, DiT arXiv 2212.09748; VAR's order of the six vectors).

Legend: N rows, L slots, C width, D condition width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.nn.attention import CosineNorm, CrossAttention, NoNorm, Rotation, SelfAttention, Window
from varkit.nn.linear import Linear


class FeedForward(nn.Module):
    """Linear, GELU (in its tanh form, or with "none" exact), dropout, Linear; (N, L, C) -> (N, L, C).

    outputs: channels that come out, if not as many as go in.
    """

    def __init__(
        self, width: int, hidden: int, approximate: str = "tanh", dropout: float = 0.0, outputs: int = 0,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.up = Linear(width, hidden, bias=bias)
        self.down = Linear(hidden, outputs or width, bias=bias)
        self.approximate, self.dropout = approximate, dropout

    def forward(self, x: Tensor) -> Tensor:
        h = self.up.gelu(x, self.approximate)
        return self.down(F.dropout(h, self.dropout, self.training) if self.dropout else h)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, times (1 + scale), plus shift; scale and shift (N, 1, C)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero whole samples of a residual branch with probability `rate`, scaling the rest up."""
    if rate == 0.0 or not training:
        return x
    keep = torch.rand(x.shape[0], *([1] * (x.ndim - 1)), device=x.device, dtype=x.dtype) >= rate
    return x * keep / (1 - rate)


@dataclass(frozen=True)
class BlockConfig:
    """One AdaLN block. `memory_width` > 0 adds cross-attention to a prompt between attention and feed-forward."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    cosine: bool = True
    shared_modulation: bool = False
    memory_width: int = 0
    norm_eps: float = 1e-6

    def build(self, condition_width: int, drop_path_rate: float = 0.0) -> "AdaLNBlock":
        """Make the block."""
        return AdaLNBlock(self, condition_width, drop_path_rate)


class AdaLNBlock(nn.Module):
    """x += g1 * Attn(LN(x) (1 + s1) + b1); [x += Cross(LN(x))]; x += g2 * FFN(LN(x) (1 + s2) + b2).

    The six vectors (g1, g2, s1, s2, b1, b2) come from a linear of the condition in each block, or from one shared by
    all blocks plus a learned offset of the block's own. Blocks of more branches have three vectors for each.
    """

    compilable = ("forward",)
    branches = 2

    def __init__(self, config: BlockConfig, condition_width: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        width = config.width
        self.drop_path_rate, self.eps = drop_path_rate, config.norm_eps
        norm = CosineNorm(config.heads) if config.cosine else NoNorm(0.25 / (width // config.heads) ** 0.5)
        self.attention = SelfAttention(width, config.heads, norm)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        if config.shared_modulation:
            self.modulation_offset = nn.Parameter(torch.randn(3 * self.branches, width) / width**0.5)
        else:
            self.modulation = Linear(condition_width, 3 * self.branches * width)
        self.shared = config.shared_modulation
        if config.memory_width:
            self.cross_norm = nn.LayerNorm(width, eps=config.norm_eps)
            self.cross = CrossAttention(width, config.heads, config.memory_width)

    def vectors(self, condition: Tensor, shared: Tensor | None) -> Tensor:
        """The block's vectors, (N, 6, C), from the condition (N, D) or the shared ones (N, 6, C)."""
        if self.shared:
            assert shared is not None
            return shared + self.modulation_offset
        return self.modulation(F.silu(condition)).unflatten(-1, (3 * self.branches, -1))

    def forward(
        self,
        x: Tensor,
        vectors: Tensor,
        window: Window,
        layer: int,
        memory: tuple[Tensor, Tensor, Tensor | None] | None = None,
        rotate: Rotation | None = None,
        port=None,
    ) -> Tensor:
        """x (N, L, C), vectors (N, 6, C), memory = keys, values, mask of the prompt; `port` sees the attention's
        output.
        """
        mixed = self.attention(self._modulated(x, vectors, 0), window, layer, rotate)
        if port is not None:
            mixed = port(mixed)
        x = self._added(x, vectors, 0, mixed)
        if memory is not None:
            x = x + drop_path(self.cross(self.cross_norm(x), *memory), self.drop_path_rate, self.training)
        x = self._between(x, vectors, window, layer)
        last = self.branches - 1
        return self._added(x, vectors, last, self.ffn(self._modulated(x, vectors, last)))

    def _between(self, x: Tensor, vectors: Tensor, window: Window, layer: int) -> Tensor:
        """Branches that a kind of block has between attention and feed-forward."""
        return x

    def _modulated(self, x: Tensor, vectors: Tensor, branch: int) -> Tensor:
        """What goes into a branch."""
        scale, shift = self.branches + branch, 2 * self.branches + branch
        return modulate(x, vectors[:, scale : scale + 1], vectors[:, shift : shift + 1], self.eps)

    def _added(self, x: Tensor, vectors: Tensor, branch: int, y: Tensor) -> Tensor:
        """x and, gated, what comes out of a branch."""
        gate = drop_path(vectors[:, branch : branch + 1], self.drop_path_rate, self.training)
        return torch.addcmul(x, gate, y)

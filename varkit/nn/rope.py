"""Rotary position embeddings from coordinates of any dimension (RoFormer arXiv 2104.09864; 2-D form of LlamaGen).

The head's pairs (2i, 2i + 1) are divided among the axes, each axis with the frequencies base^(-2i / (E / axes)).
Legend: N rows, H heads, L slots, E head width, A axes.
"""

import torch
from torch import Tensor


def rotary_angles(coords: Tensor, head_width: int, base: float = 10000.0) -> Tensor:
    """coords (..., L, A) -> angles (..., L, E / 2) float32, axis after axis."""
    axes = coords.shape[-1]
    per_axis = head_width // axes
    assert per_axis % 2 == 0, f"head width {head_width} does not divide into pairs for {axes} axes"
    frequency = base ** (-torch.arange(0, per_axis, 2, device=coords.device) / per_axis)
    return (coords.float()[..., None] * frequency).flatten(-2)


class Rotary:
    """Rotates q or k (N, H, L, E) by angles; slots marked `blank` come out as zeros.

    Published LlamaGen has zero rows for its condition prefix, so prefix queries and keys vanish; that is `blank`.
    """

    def __init__(self, angles: Tensor, blank: Tensor | None = None) -> None:
        self.cos, self.sin = angles.cos(), angles.sin()
        if blank is not None:
            self.cos = self.cos.masked_fill(blank[..., None], 0.0)
            self.sin = self.sin.masked_fill(blank[..., None], 0.0)
        if self.cos.ndim == 3:  # per sample: broadcast over heads
            self.cos, self.sin = self.cos[:, None], self.sin[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], dim=-1)
        return turned.flatten(-2).to(x.dtype)

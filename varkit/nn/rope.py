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
    A pair is multiplied as one complex number, in a third of the passes over x; compilers, which do not fuse complex
    numbers, are given the plain form.
    """

    def __init__(self, angles: Tensor, blank: Tensor | None = None) -> None:
        cos, sin = angles.cos(), angles.sin()
        if blank is not None:
            cos, sin = (t.masked_fill(blank[..., None], 0.0) for t in (cos, sin))
        if cos.ndim == 3:  # per sample: broadcast over heads
            cos, sin = cos[:, None], sin[:, None]
        self.cos, self.sin, self.turn = cos, sin, torch.complex(cos, sin)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.plainly(x)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turn).flatten(-2).to(x.dtype)

    def plainly(self, x: Tensor) -> Tensor:
        """The same by its definition, in real numbers."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], dim=-1)
        return turned.flatten(-2).to(x.dtype)

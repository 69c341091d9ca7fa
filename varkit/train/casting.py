"""Parameters in a compute dtype, with gradients that come back to them: hundreds of casts in one, on an accelerator.

A call costs an accelerator's host twenty times what the small cast itself takes. A CPU gains nothing by it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ALIGNED = 8
"""Numbers that begin where a fast matrix product may read: 16 bytes of bfloat16."""


def in_dtype(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each parameter in `dtype`, differentiably."""
    together = [n for n, p in parameters.items() if p.device.type != "cpu" and p.numel() % ALIGNED == 0]
    cast = (
        dict(zip(together, Together.apply(dtype, *(parameters[n] for n in together)), strict=True))
        if together
        else {}
    )
    return {name: cast[name] if name in cast else p.to(dtype) for name, p in parameters.items()}


class Together(torch.autograd.Function):
    """Tensors cast as one: what comes out are parts of one tensor."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.before, ctx.shapes = tensors[0].dtype, [t.shape for t in tensors]
        return _parts(torch.cat([t.flatten() for t in tensors]).to(dtype), ctx.shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([g.flatten() for g in gradients]).to(ctx.before)
        return None, *_parts(flat, ctx.shapes)


def _parts(flat: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    parts = flat.split([shape.numel() for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

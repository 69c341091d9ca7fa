"""Parameters in a compute dtype, with gradients that come back to them: hundreds of casts in one, on an accelerator.

There a call takes the host some twenty microseconds, however small the tensor (docs/log.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 8
"""Numbers that begin where a fast matrix product may read: 16 bytes of bfloat16."""


def in_dtype(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each parameter in `dtype`, differentiably."""
    cast = {name: p.to(dtype) for name, p in parameters.items() if not _together(p)}
    rest = [name for name in parameters if name not in cast]
    if rest:
        cast |= zip(rest, Together.apply(dtype, *(parameters[name] for name in rest)), strict=True)
    return cast


def _together(p: Tensor) -> bool:
    return p.device.type != "cpu" and p.requires_grad and p.numel() % ALIGNED == 0


class Together(torch.autograd.Function):
    """Tensors cast as one: what comes out are parts of one tensor. What no loss reaches is left without a gradient."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.before = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return _at_once(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = iter(_at_once([g for g in gradients if g is not None], ctx.before))
        return None, *(None if g is None else next(there) for g in gradients)


def _at_once(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Each of some tensors in `dtype`, by a single cast."""
    parts = torch.cat([t.flatten() for t in tensors]).to(dtype).split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))

"""FlexAttention against a dense mask on a device, forward and backward, for the masks that plans have."""

import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from device_clock import warm
from torch import Tensor

from varkit.nn.attention import View, attend
from varkit.nn.neighbourhood import Tiles
from varkit.plans.visibility import Neighbourhood, own_mask

WINDOW = 7
"""Of the neighbourhoods (arXiv 2505.12742)."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def packed_scales(device: torch.device, smoke: bool) -> dict[str, Any]:
    """VAR's training sequence at 256 pixels: 680 tokens, each seeing its own scale and the coarser ones."""
    sides = (1, 2, 4) if smoke else (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    level = torch.cat([torch.full((n * n,), i) for i, n in enumerate(sides)]).to(device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return level[q] >= level[k]

    mask = level[:, None] >= level
    return flex_against_dense(mask, sees, 2 if smoke else 32, 16, 64, device, {})


def neighbourhoods(side: int, device: torch.device, smoke: bool) -> dict[str, Any]:
    """A grid in which each token sees the 7 x 7 around it."""
    side = 16 if smoke else side
    area = Neighbourhood((side, side), WINDOW)
    mask, tiles = own_mask(area, side * side), Tiles.of(area).to(device)
    assert mask is not None

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        y = (q // side - WINDOW // 2).clamp(0, side - WINDOW)
        x = (q % side - WINDOW // 2).clamp(0, side - WINDOW)
        ky, kx = k // side, k % side
        return (ky >= y) & (ky < y + WINDOW) & (kx >= x) & (kx < x + WINDOW)

    def by_tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, [View(k, v, tiles)])

    batch = 2 if smoke else max(1, 2**15 // side**2)
    return flex_against_dense(mask.to(device), sees, batch, 16, 64, device, {"tiles": by_tiles})


def flex_against_dense(
    mask: Tensor, sees: Callable[..., Tensor], batch: int, heads: int, width: int, device: torch.device,
    others: dict[str, Attention],
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds forward, and with backward, of each way, and how far its output lies from the dense one's."""
    length = len(mask)
    shape = batch, heads, length, width
    q, k, v, grad = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    ways: dict[str, Attention] = {
        "dense": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "unmasked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    } | others
    told: dict[str, Any] = {"batch": batch, "heads": heads, "tokens": length, "width": width}
    told["visible"] = mask.float().mean().item()
    if device.type == "cuda":
        start = time.perf_counter()
        try:
            ways["flex"] = _flex(sees, length, device)
            ways["flex"](q, k, v)
        except Exception as error:
            traceback.print_exc()
            told["flex_failed"] = f"{type(error).__name__}: {error}"[:300]
            ways.pop("flex", None)
        told["compiling"] = time.perf_counter() - start
    leaves = [t.requires_grad_() for t in (q, k, v)]
    expected = ways["dense"](*leaves).detach()
    for name, way in ways.items():
        with torch.no_grad():
            forward = warm(partial(way, q, k, v), device)
            gap = (way(q, k, v) - expected).float().norm() / expected.float().norm()
        both = warm(partial(_trained, way, leaves, grad), device)
        told[name] = {"forward_ms": 1e3 * forward, "training_ms": 1e3 * both, "gap": gap.item()}
    return told


def _trained(way: Attention, leaves: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(way(*leaves), leaves, grad)


def _flex(sees: Callable[..., Tensor], length: int, device: torch.device) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(sees, None, None, length, length, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)  # type: ignore[return-value]


MASKS: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    "packed scales": packed_scales,
    "7 x 7 of 32 x 32": partial(neighbourhoods, 32),
    "7 x 7 of 64 x 64": partial(neighbourhoods, 64),
}

"""The matrix work of a run: operations and bytes of every product, convolution and attention, by part.

Bytes are what the operands and the result hold: each is read or written at least once, from memory where they do not
fit the caches. All else (normalisations, activations, sampling) counts as nothing: it could be fused, or is small.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten
ONEDNN_LINEAR = "mkldnn._linear_pointwise"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """One operation on matrices: `op` with operands of `shapes`; flops counts a multiply-add as two."""

    op: str
    shapes: tuple[Shape, ...]
    flops: int
    bytes: int


class Work(TorchDispatchMode):
    """Records what runs under it: `products[part][product]` is how often."""

    def __init__(self, part: Callable[[], str]) -> None:
        super().__init__()
        self.part = part
        self.products: dict[str, Counter[Product]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        flops = _flops(packet, args, kwargs, out)
        if flops:
            tensors = [t for t in (*args, *kwargs.values(), *_listed(out)) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            shapes = tuple(tuple(t.shape) for t in args if isinstance(t, Tensor))
            product = Product(str(packet).removeprefix("aten."), shapes, flops, size)
            self.products.setdefault(self.part(), Counter())[product] += 1
        return out


def _flops(packet: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(t.shape for t in args[:3]))
    if str(packet) == ONEDNN_LINEAR:
        x, weight = args[:2]
        return 2 * x.numel() * weight.shape[0]
    count = flop_registry.get(packet)
    return 0 if count is None else count(*args, **kwargs, out_val=out)


def _listed(out: Any) -> tuple:
    return out if isinstance(out, tuple) else (out,)

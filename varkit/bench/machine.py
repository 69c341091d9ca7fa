"""What this machine can do: operations a second at the work's own shapes, and bytes a second from memory.

The limit of a product is the longer of both times (a roofline, Williams et al. 2009).
Legend: N rows, I inputs, O outputs.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.bench.work import ONEDNN_LINEAR, Product, Shape
from varkit.nn.linear import onednn_linear

LARGEST = 4
"""Shapes of each kind, those with most operations, whose kernels are timed."""

READ = 2**28
"""Bytes read to find the memory's rate, many times what caches hold."""


@dataclass(frozen=True)
class Limits:
    """flops and bytes a second."""

    flops: float
    bytes: float

    def seconds(self, product: Product) -> float:
        """The least time for a product."""
        return max(product.flops / self.flops, product.bytes / self.bytes)


@torch.inference_mode()
def limits(products: Iterable[Product], dtype: torch.dtype, rounds: int = 5) -> Limits:
    """The best rate that any kernel here reaches at any of the work's largest products, and the memory's."""
    rates = [
        product.flops / _best(run, rounds)
        for product in _largest(products)
        for run in _kernels(product, dtype)
    ]
    table = torch.ones(READ // 4)
    matrix = table.view(-1, 4096)
    vector = torch.ones(4096)
    read = min(_best(table.sum, rounds), _best(lambda: matrix @ vector, rounds))
    return Limits(max(rates), READ / read)


def _largest(products: Iterable[Product]) -> Iterator[Product]:
    kinds: dict[str, list[Product]] = {}
    for product in set(products):
        kinds.setdefault(_kind(product), []).append(product)
    for kind, found in kinds.items():
        if kind != "other":
            yield from sorted(found, key=lambda product: -product.flops)[:LARGEST]


def _kind(product: Product) -> str:
    if product.op in ("mm", "addmm", ONEDNN_LINEAR):
        return "linear"
    return "convolution" if product.op in ("convolution", "_convolution") else "other"


def _kernels(product: Product, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    """The same amount of work by each kernel that there is for it."""
    if _kind(product) == "linear":
        yield from _linears(*_as_linear(product), dtype)
        return
    image, filters = product.shapes[:2]
    rows, inputs = _unfolded(image, filters)
    if filters[2:] == (1, 1):
        yield from _linears(rows, inputs, filters[0], dtype)
        return
    x, w = torch.randn(image, dtype=dtype), torch.randn(filters, dtype=dtype)
    padding = filters[2] // 2
    yield lambda: F.conv2d(x, w, padding=padding)
    last_x, last_w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    yield lambda: F.conv2d(last_x, last_w, padding=padding)


def _as_linear(product: Product) -> tuple[int, int, int]:
    """Rows, inputs and outputs."""
    if product.op == ONEDNN_LINEAR:
        x, weight = product.shapes[:2]
        return math.prod(x[:-1]), x[-1], weight[0]
    (rows, inputs), (_, outputs) = product.shapes[-2:]
    return rows, inputs, outputs


def _unfolded(image: Shape, filters: Shape) -> tuple[int, int]:
    """Rows and inputs of the product that a convolution is, at stride 1."""
    return image[0] * image[2] * image[3], filters[1] * filters[2] * filters[3]


def _linears(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    x, w = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    yield lambda: F.linear(x, w)
    yield lambda: convolution_linear(x, w)
    if dtype != torch.float64:
        yield lambda: onednn_linear(x, w, None)


def convolution_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear as a 1 x 1 convolution on a (1, I, rows, 1) channels-last view: another way to oneDNN's kernels."""
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _best(run: Callable[[], object], rounds: int) -> float:
    """The shortest time of several, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)

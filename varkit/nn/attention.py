"""The one attention of the library: queries against views that a window hands out.

A window is what a layer may look at during one step: the packed training sequence, or a cache policy's keys and values.
Modules give it q, k, v and receive views, one for each group of heads, so that policies may keep different slots for
different heads without the block knowing. Legend: N = branches x samples, H heads, L queries, S keys, E head width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.devices import sent
from varkit.nn.linear import Linear
from varkit.nn.neighbourhood import Strips, Tiles, fastest
from varkit.plans.step import Step
from varkit.plans.visibility import Apart, Neighbourhood, Own, own_mask

Mask = Tensor | Strips | Tiles | None


@dataclass(frozen=True)
class View:
    """Keys and values that a group of heads, or a run of queries, attends to.

    k, v: (N, Hkv, S, E). mask: bool, broadcastable to (N, H, L, S), True = visible, or strips or tiles to attend by;
    None sees all. heads: the query heads it serves, as a slice or their numbers; None = all. queries: how many it
    serves, behind those of the views before it, with all heads; None = all.
    """

    k: Tensor
    v: Tensor
    mask: Mask = None
    heads: slice | Tensor | None = None
    queries: int | None = None


Carry = dict[str, Tensor]
"""What a layer carries from step to step: tensors of constant size, (N, ...) each, by name. Zeros stand for nothing."""


class Scan(Protocol):
    """A layer that runs over slots in the order they are fed, and carries on what it has to know of them."""

    def __call__(self, x: Tensor, carried: Carry | None, lengths: Tensor | None) -> tuple[Tensor, Carry]:
        """x (N, L, C), what was carried so far (None at the beginning), and how many slots of each row count, (N,) or
        None for all -> (N, L, C), and what is carried on.
        """
        ...


class Window(Protocol):
    """What the layers may see during one step."""

    def views(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Sequence[View]:
        """Take a layer's q (N, H, L, E), k and v (N, Hkv, L, E), return what the queries attend to."""
        ...

    def carry(self, layer: int, x: Tensor, scan: Scan) -> Tensor:
        """Run a layer's scan over x (N, L, C), from what it carried out of earlier steps -> (N, L, C)."""
        ...

    def narrow(self, hidden: Tensor, ids: Tensor) -> "Window":
        """The window of a step that feeds the slots `ids` (L,) or (B, L), less those of `hidden` (`narrowed`)."""
        ...


class Packed:
    """Window of a packed sequence without a cache: training, and the slow twin of cached decoding.

    `own` is a step's visibility among its slots: None, (L, L) or (B, L, L) bool, or runs of slots that are `Apart`,
    which get a view each, so that nothing is computed between them. `branches` repeats it over conditions. `valid`
    (B, L) hides padding, which for scans must be at the end.
    """

    def __init__(self, own: Tensor | Apart | None, valid: Tensor | None = None, branches: int = 1) -> None:
        self.own, self.branches = own, branches
        self.counts = None if valid is None else valid.sum(1).repeat(branches)
        self.lengths: tuple[int, ...] | None = None
        self.mask: Tensor | None = None
        self.masks: list[Mask] = []  # of each run apart; made where it is known on which device
        if isinstance(own, Apart) and valid is None:
            self.lengths = own.lengths
            return
        mask = own.mask() if isinstance(own, Apart) else own
        if valid is not None:
            seen = valid[:, None, :]
            mask = seen if mask is None else mask & seen
        self.mask = self._per_branch(mask)

    @classmethod
    def of(cls, step: Step, branches: int = 1) -> "Packed":
        """The window of a step by itself."""
        own, length = step.sees.own, len(step.feed)
        if isinstance(own, Neighbourhood):
            own = Apart(((length, own),))
        return cls(own if isinstance(own, Apart) else own_mask(own, length), step.feed.valid, branches)

    def views(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Sequence[View]:
        if self.lengths is None:
            self.mask = None if self.mask is None else sent(self.mask, q.device)
            return [View(k, v, self.mask)]
        if not self.masks:
            self.masks = [_visible(within, n, q.device) for n, within in self.own.runs]  # type: ignore[union-attr]
        runs = zip(k.split(self.lengths, dim=2), v.split(self.lengths, dim=2), self.masks, strict=True)
        return [View(*run, queries=run[0].shape[2]) for run in runs]

    def carry(self, layer: int, x: Tensor, scan: Scan) -> Tensor:
        return scan(x, None, None if self.counts is None else sent(self.counts, x.device))[0]

    def narrow(self, hidden: Tensor, ids: Tensor) -> "Packed":
        mask = self.mask if self.lengths is None else self.own.mask()  # type: ignore[union-attr]
        narrow = Packed(None)
        narrow.mask = narrowed(mask, hidden, ids, ids)
        narrow.counts = self.counts
        return narrow

    def _per_branch(self, mask: Tensor | None) -> Tensor | None:
        """(L, L) as it is, (B, L, L) repeated for each branch as (N, 1, L, L)."""
        return mask if mask is None or mask.ndim == 2 else mask[:, None].repeat(self.branches, 1, 1, 1)


def _visible(own: Own, length: int, device: torch.device) -> Mask:
    """How a run is attended to on a device."""
    if isinstance(own, Neighbourhood):
        return fastest(own, device)
    mask = own_mask(own, length)
    return None if mask is None else sent(mask, device)


def narrowed(mask: Tensor | None, hidden: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """A mask, broadcastable to (N, 1, L, S), less what is hidden from each row, as where prompts differ in length.

    hidden: (N, P) bool, of the first P slots. keys (S,) or (B, S) and queries (L,) or (B, L) are slots. A slot always
    sees itself, so that no query is left without a key.
    """
    rows, device = len(hidden), hidden.device
    keys, queries = (torch.atleast_2d(sent(ids, device)) for ids in (keys, queries))
    keys, queries = (ids if len(ids) == 1 else ids.repeat(rows // len(ids), 1) for ids in (keys, queries))
    index = keys.clamp(0, hidden.shape[1] - 1).expand(rows, -1)
    unseen = hidden.gather(1, index) & (keys < hidden.shape[1])
    seen = (~unseen[:, None] | (keys[:, None] == queries[..., None]))[:, None]
    return seen if mask is None else seen & sent(mask, device)


def attend(q: Tensor, views: Sequence[View], scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention of q (N, H, L, E) over views -> (N, H, L, E); fewer key heads than query heads are shared.

    dropout: that of the probabilities, in training.
    """
    if len(views) == 1 and views[0].heads is None:
        return _attend_view(q, views[0], scale, dropout)
    if views[0].queries is not None:
        return _attend_runs(q, views, scale, dropout)
    out = torch.empty_like(q)
    for view in views:
        heads = slice(None) if view.heads is None else view.heads
        out[:, heads] = _attend_view(q[:, heads], view, scale, dropout)
    return out


def _attend_runs(q: Tensor, views: Sequence[View], scale: float | None, dropout: float) -> Tensor:
    """Each view with its run of queries; joined slot by slot, as the next layer wants them: the only copy."""
    runs = q.split([view.queries or 0 for view in views], dim=2)
    out = [
        _attend_view(run, view, scale, dropout).transpose(1, 2) for run, view in zip(runs, views, strict=True)
    ]
    return torch.cat(out, dim=1).transpose(1, 2)


def _attend_view(q: Tensor, view: View, scale: float | None, dropout: float) -> Tensor:
    if isinstance(view.mask, Strips | Tiles):
        return view.mask.apply(q, view.k, view.v, partial(_attend_part, scale=scale, dropout=dropout))
    shared = q.shape[1] != view.k.shape[1]
    if not shared and not dropout:
        if _slow_backward(q, view):
            return _PlainAttention.apply(q, view.k, view.v, view.mask, scale)
        if _is_one_query(q):
            return _one_query(q, view.k, view.v, view.mask, scale)
    return F.scaled_dot_product_attention(
        q, view.k, view.v, attn_mask=view.mask, dropout_p=dropout, scale=scale, enable_gqa=shared
    )


def _attend_part(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    return _attend_view(q, View(k, v, mask), scale, dropout)


def _slow_backward(q: Tensor, view: View) -> bool:
    """Whether gradients are wanted where the stock kernel is slow at them: in bfloat16 on a CPU."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or view.k.requires_grad or view.v.requires_grad)
    return wanted and q.dtype == torch.bfloat16 and q.device.type == "cpu"


def _is_one_query(q: Tensor) -> bool:
    """Whether the stock kernel spends its time on laying out keys for one query: in bfloat16 on a CPU."""
    return q.shape[2] == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu"


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention of q (N, H, 1, E) over k and v, in float32. At 2 x 12 heads of width 64 and 256 keys, on two Zen 4
    cores: 0.23 ms in place of 0.56.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (_softmax(q, k, mask, scale) @ v.float()).to(q.dtype)


SHORT = 512
"""Keys up to which probabilities are kept for the backward pass; beyond they would fill the memory, and are computed
again."""


class _PlainAttention(torch.autograd.Function):
    """Attention as five plain products, for training in bfloat16 on a CPU.

    With P = softmax(S), S = scale Q K^T and D = rowsum(dO * O): dV = P^T dO, dS = P * (dO V^T - D), dQ = scale dS K,
    dK = scale dS^T Q (FlashAttention, arXiv 2205.14135, Sec. B.2). S and dS are float32, so the gradients are closer to
    the exact ones than the stock kernel's. At 32 x 4 heads of 130 slots and width 64, on two Zen 4 cores: 8.0 ms
    forward (the stock kernel 7.2), 9.3 ms backward (15.2 when the probabilities are computed again).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        p = _probabilities(q, k, mask, scale)
        out = p @ v
        ctx.save_for_backward(q, k, v, mask, out, p if k.shape[-2] <= SHORT else None)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, p = ctx.saved_tensors
        if p is None:
            p = _probabilities(q, k, mask, ctx.scale)
        grad = grad.contiguous()
        grad_v = p.mT @ grad
        wide = grad.float()
        own = (wide * out).sum(-1, keepdim=True)
        grad_s = (wide @ v.float().mT).sub_(own).mul_(p).mul_(ctx.scale).to(q.dtype)
        return grad_s @ k, grad_s.mT @ q, grad_v, None, None


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) in q's dtype, by way of float32; a query that sees nothing has zeros."""
    return _softmax(q, k, mask, scale).to(q.dtype)


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q.float() @ k.float().mT).mul_(scale)
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill_(~mask, -torch.inf).softmax(-1).masked_fill_(~mask, 0.0)


class CosineNorm(nn.Module):
    """VAR's cosine attention: unit queries times a learned, clamped scale per head, and unit keys (softmax scale 1)."""

    scale = 1.0

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), 4.0).log())

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.log_scale.clamp(max=math.log(100.0)).exp()
        return q * (_inverse_norm(q) * factor), k * _inverse_norm(k)


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last dimension. With its gradient it takes a third of the passes over x of `F.normalize`."""
    squares = x.square().sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt().to(x.dtype)


class NoNorm(nn.Module):
    """Plain dot products; VAR without cosine attention scales by 0.25 / sqrt(E), Llama by 1 / sqrt(E) (None)."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


Rotation = Callable[[Tensor], Tensor]


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused projection, over whatever the window shows.

    bias "qv" is VAR's: queries and values have one, keys none; "qkv" is a ViT's. dropout: that of the probabilities.
    x (N, L, C) -> (N, L, C).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        norm: "CosineNorm | NoNorm",
        *,
        kv_heads: int | None = None,
        bias: str = "qv",
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        assert width % heads == 0 and bias in ("qv", "qkv", "none")
        self.heads, self.kv_heads, self.head_width = heads, kv_heads or heads, width // heads
        inner = self.kv_heads * self.head_width
        self.qkv = Linear(width, width + 2 * inner, bias=bias == "qkv")
        self.q_bias = nn.Parameter(torch.zeros(width)) if bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(inner)) if bias == "qv" else None
        self.norm, self.scale, self.dropout = norm, norm.scale, dropout
        self.out = Linear(width, width, bias=out_bias)

    def forward(self, x: Tensor, window: Window, layer: int, rotate: Rotation | None = None) -> Tensor:
        n, length, width = x.shape
        q, k, v = self._project(x)
        q = q.view(n, length, self.heads, self.head_width).transpose(1, 2)
        k, v = (t.view(n, length, self.kv_heads, self.head_width).transpose(1, 2) for t in (k, v))
        q, k = self.norm(q, k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(q, window.views(layer, q, k, v), self.scale, dropout)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = self.kv_heads * self.head_width
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = self.qkv(x, bias).split([x.shape[-1], inner, inner], dim=-1)
        return q, k, v


class CrossAttention(nn.Module):
    """Attention to a memory (a prompt) whose keys and values are projected once for a run.

    `project(memory (N, M, D))` -> k, v (N, H, M, E); forward(x (N, L, C), k, v, mask (N, 1, 1, M)) -> (N, L, C).
    """

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.q = Linear(width, width)
        self.kv = Linear(memory_width, 2 * width)
        self.out = Linear(width, width)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        n, m, _ = memory.shape
        k, v = self.kv(memory).view(n, m, 2, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n, length, width = x.shape
        q = self.q(x).view(n, length, self.heads, self.head_width).transpose(1, 2)
        mixed = attend(q, [View(k, v, mask)])
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class AttentivePool(nn.Module):
    """One vector of a memory, by a learned query: memory (N, M, D), mask (N, M) -> (N, C)."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} does not divide into {heads} heads"
        self.query = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.trunc_normal_(self.query, std=(1 / (3 * width)) ** 0.5)
        self.kv = Linear(memory_width, 2 * width)
        self.out = Linear(width, width)

    def forward(self, memory: Tensor, mask: Tensor) -> Tensor:
        n, m, _ = memory.shape
        k, v = self.kv(memory).view(n, m, 2, *self.query.shape).permute(2, 0, 3, 1, 4)
        q = self.query[:, None].expand(n, -1, -1, -1)
        return self.out(attend(q, [View(k, v, mask[:, None, None])]).flatten(1))

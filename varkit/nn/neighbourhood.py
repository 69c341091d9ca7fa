"""Attention in neighbourhoods by strips and tiles: queries that are close share keys under a mask.

A query's own keys alone (the index table of MVAR, arXiv 2505.12742) would be the fewest products, but each key would be
copied for every query that sees it. The windows of a strip of r whole rows lie in r + k - 1 whole rows of keys, which
are a plain slice: nothing is copied. Of a wide grid that is many products. A tile of t x t queries and a window of
k x k share (t + k - 1)^2 keys, which are gathered once: more copies, in one large multiplication for all tiles.
Legend: N rows, H heads, L queries, E head width, T tiles, Q queries and S keys of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from varkit.devices import sent, sent_once
from varkit.plans.visibility import Neighbourhood

SIDE = 8
"""Of a tile. On a CPU at window 7, sides of 6 and 12 are slower, and those of 2 and 4 much."""

ROWS = 4
"""Of a strip. On a CPU 2 to 6 are about as fast up to 1024 slots, and 8 are slower."""

STRIPS = 1024
"""Slots up to which strips are faster than tiles on a CPU, forward and in training. At 4096 tiles take 0.7 to 1.1 of
their time forward, and half of it in training. At 256 strips take 0.7 of the time of attention without any mask, tiles
3.6 times as long."""

FEWEST = 576
"""Elsewhere, where each strip would be a launch of its own: slots from which on tiles are faster than the mask."""

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q (N, H, Q, E), k and v (N, Hkv, S, E), and a mask (..., Q, S) or None -> (N, H, Q, E)."""


@dataclass(frozen=True)
class Strips:
    """For each: how many queries, the slice of their keys, and a mask (Q, S) of who sees whom, None: all."""

    each: tuple[tuple[int, slice, Tensor | None], ...]

    @classmethod
    def of(cls, area: Neighbourhood, rows: int = ROWS) -> "Strips":
        """Strips of so many rows; the last one may have fewer."""
        return _strips(area, rows)

    @property
    def pairs(self) -> int:
        """Products of a query and a key that are computed, masked ones included."""
        return sum(queries * (keys.stop - keys.start) for queries, keys, _ in self.each)

    def to(self, device: torch.device) -> "Strips":
        """On a device."""
        return Strips(
            tuple((n, keys, None if mask is None else sent_once(mask, device)) for n, keys, mask in self.each)
        )

    def apply(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """q (N, H, L, E), k and v (N, Hkv, L, E) -> (N, H, L, E), joined slot by slot, as the next layer wants them."""
        parts = zip(q.split([n for n, _, _ in self.each], dim=2), self.each, strict=True)
        out = [attention(own, k[:, :, keys], v[:, :, keys], mask) for own, (_, keys, mask) in parts]
        return torch.cat([part.transpose(1, 2) for part in out], dim=1).transpose(1, 2)


@dataclass(frozen=True)
class Tiles:
    """queries (T, Q) and keys (T, S): numbers of slots; mask (T, 1, Q, S): who sees whom, None: all. back (L,): where
    each query is found among the tiles' (at the border a tile may repeat queries of the one before).
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    back: Tensor

    @classmethod
    def of(cls, area: Neighbourhood, side: int = SIDE) -> "Tiles":
        """Tiles of side x side queries."""
        return _tiles(area, side)

    @property
    def pairs(self) -> int:
        """Products of a query and a key that are computed, masked ones included."""
        return self.queries.numel() * self.keys.shape[1]

    def to(self, device: torch.device) -> "Tiles":
        """On a device."""
        queries, keys, back = (sent_once(t, device) for t in (self.queries, self.keys, self.back))
        return Tiles(queries, keys, None if self.mask is None else sent_once(self.mask, device), back)

    def apply(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """q (N, H, L, E), k and v (N, Hkv, L, E) -> (N, H, L, E), by `attention` over (T, N H, Q or S, E)."""
        n, heads = q.shape[:2]
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x for x in (k, v))
        out = attention(_taken(q, self.queries), _taken(k, self.keys), _taken(v, self.keys), self.mask)
        out = out.transpose(1, 2).flatten(0, 1)
        return out[self.back].unflatten(1, (n, heads)).permute(1, 2, 0, 3)


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """(N, H, L, E) at slots (T, Q) -> (T, N H, Q, E). A slot's vectors of all rows and heads are copied as one."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)[at.flatten()].unflatten(0, at.shape).transpose(1, 2)


def fastest(area: Neighbourhood, device: torch.device) -> Strips | Tiles | Tensor:
    """How a neighbourhood is attended to on a device: by strips, tiles, or the dense mask (L, L)."""
    length = area.grid[0] * area.grid[1]
    if device.type == "cpu" and length <= STRIPS:
        return Strips.of(area)
    tiles = device.type == "cpu" or length >= FEWEST
    return Tiles.of(area).to(device) if tiles else sent(area.mask(), device)


@lru_cache(maxsize=64)
def _strips(area: Neighbourhood, rows: int) -> Strips:
    (height, width), strips = area.grid, []
    size = min(area.window, height)
    first, columns = Neighbourhood.first(height, area.window), torch.arange(width)
    beside = _seen(width, area.window, columns[None], columns[None])[0]
    for queries in torch.arange(height).split(rows):
        keys = torch.arange(int(first[queries[0]]), int(first[queries[-1]]) + size)
        above = _seen(height, area.window, queries[None], keys[None])[0]
        mask = (above[:, None, :, None] & beside[None, :, None, :]).flatten(2).flatten(0, 1)
        run = slice(int(keys[0]) * width, (int(keys[-1]) + 1) * width)
        strips.append((len(mask), run, None if bool(mask.all()) else mask))
    return Strips(tuple(strips))


@lru_cache(maxsize=64)
def _tiles(area: Neighbourhood, side: int) -> Tiles:
    axes = [_axis(n, area.window, side) for n in area.grid]
    (queries_y, keys_y), (queries_x, keys_x) = axes
    width = area.grid[1]
    queries, keys = _product(queries_y, queries_x, width), _product(keys_y, keys_x, width)
    seen = _seen(area.grid[0], area.window, queries_y, keys_y), _seen(width, area.window, queries_x, keys_x)
    mask = torch.einsum("aqs,bpt->abqpst", *(s.int() for s in seen)).bool()
    mask = mask.reshape(len(queries), 1, queries.shape[1], keys.shape[1])
    back = torch.empty(area.grid[0] * width, dtype=torch.int64)
    back[queries.flatten()] = torch.arange(queries.numel())
    return Tiles(queries, keys, None if bool(mask.all()) else mask, back)


def _axis(length: int, window: int, side: int) -> tuple[Tensor, Tensor]:
    """Along one axis: each tile's queries, and the keys of all their windows; (tiles, n) each."""
    side, window = min(side, length), min(window, length)
    reach = min(side + window - 1, length)
    first = (torch.arange(-(-length // side)) * side).clamp(max=length - side)
    key = (first - window // 2).clamp(0, length - reach)
    return first[:, None] + torch.arange(side), key[:, None] + torch.arange(reach)


def _seen(length: int, window: int, queries: Tensor, keys: Tensor) -> Tensor:
    """(tiles, Q, S) bool along one axis."""
    first = Neighbourhood.first(length, window)[queries][..., None]
    return (keys[:, None] >= first) & (keys[:, None] < first + min(window, length))


def _product(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Numbers of the slots in every tile of rows (a, n) and columns (b, m): (a b, n m)."""
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)

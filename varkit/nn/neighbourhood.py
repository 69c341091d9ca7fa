"""Attention in neighbourhoods by tiles: queries that are close share keys, so a tile of them gathers these once.

A query's own keys alone (a tile of 1 x 1, which is the index table of MVAR, arXiv 2505.12742) would be the fewest
products, but each key would be copied for every query that sees it. A tile of t x t queries and a window of k x k share
(t + k - 1)^2 keys under a mask: more products, in one large multiplication for all tiles, and few copies.
Legend: N rows, H heads, L queries, E head width, T tiles, Q queries and S keys of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from varkit.devices import sent_once
from varkit.plans.visibility import Neighbourhood

SIDE = 8
"""Of a tile. On a CPU at window 7, sides of 6 and 12 are slower, and those of 2 and 4 much."""

FEWEST = 576
"""Slots from which on tiles are faster than the dense mask (on the same machine 1.3 times; 9 times at 4096)."""


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
        mask = None if self.mask is None else sent_once(self.mask, device)
        queries, keys, back = (sent_once(t, device) for t in (self.queries, self.keys, self.back))
        return Tiles(queries, keys, mask, back)

    def apply(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """q (N, H, L, E), k and v (N, Hkv, L, E) -> (N, H, L, E), by `attention` over (T, N H, Q or S, E)."""
        n, heads = q.shape[:2]
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x for x in (k, v))
        out = attention(_taken(q, self.queries), _taken(k, self.keys), _taken(v, self.keys), self.mask)
        out = out.transpose(1, 2).flatten(0, 1)
        return out[self.back].unflatten(1, (n, heads)).permute(1, 2, 0, 3)


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """(N, H, L, E) at slots (T, Q) -> (T, N H, Q, E). A slot's vectors of all rows and heads are copied as one."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)[at.flatten()].unflatten(0, at.shape).transpose(1, 2)


def worth_tiles(area: Neighbourhood) -> bool:
    """Whether tiles are faster than the dense mask."""
    return area.grid[0] * area.grid[1] >= FEWEST


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

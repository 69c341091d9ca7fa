"""Which of a step's own slots see which, as data, so that attention can skip what is never seen.

Every form says its dense mask, which is the slow twin of whatever attention makes of it.
Legend: B batch, L slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Apart:
    """Runs of consecutive slots that see nothing of one another: a block-diagonal mask.

    runs: for each, its length and its own visibility.
    """

    runs: tuple[tuple[int, "Own"], ...]

    @classmethod
    def of(cls, runs: Sequence[tuple[int, "Own"]]) -> "Apart":
        """Join runs; those that are apart themselves come in as their parts."""
        flat: list[tuple[int, Own]] = []
        for length, own in runs:
            flat += own.runs if isinstance(own, Apart) else [(length, own)]
        return cls(tuple(flat))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Slots of each run."""
        return tuple(length for length, _ in self.runs)

    def mask(self) -> Tensor:
        """(L, L) bool."""
        blocks = [
            torch.ones(n, n, dtype=torch.bool) if (mask := own_mask(own, n)) is None else mask
            for n, own in self.runs
        ]
        return torch.block_diag(*blocks).bool()


@dataclass(frozen=True)
class Neighbourhood:
    """A whole grid, row after row, of which each slot sees the window x window around it.

    At the borders the window is shifted inwards (neighbourhood attention, arXiv 2204.07143), so that every slot sees
    as many: min(window, height) x min(window, width).
    """

    grid: tuple[int, int]
    window: int

    @staticmethod
    def first(length: int, window: int) -> Tensor:
        """The first place that each of `length` in a line sees, (length,) int64."""
        window = min(window, length)
        return (torch.arange(length) - window // 2).clamp(0, length - window)

    def table(self) -> Tensor:
        """The slots that each sees, (L, n) int64, ascending."""
        y, x = (self.first(n, self.window)[:, None] + torch.arange(min(n, self.window)) for n in self.grid)
        return (y[:, None, :, None] * self.grid[1] + x[None, :, None, :]).flatten(2).flatten(0, 1)

    def mask(self) -> Tensor:
        """(L, L) bool."""
        table = self.table()
        return torch.zeros(len(table), len(table), dtype=torch.bool).scatter_(1, table, True)


Own = str | Tensor | Apart | Neighbourhood
"""Visibility among a step's own slots: "all" of them, "causal" (itself and those before), "self", a mask (L, L) or
(B, L, L), or one of the forms above."""


def own_mask(own: Own, length: int) -> Tensor | None:
    """(L, L) or (B, L, L) bool, or None when all see all."""
    if isinstance(own, Tensor):
        return own
    if isinstance(own, Apart | Neighbourhood):
        return own.mask()
    if own == "all":
        return None
    eye = torch.ones(length, length, dtype=torch.bool)
    return eye.tril() if own == "causal" else torch.eye(length, dtype=torch.bool)


def pairs(own: Own, length: int) -> int:
    """How many pairs of a slot that sees and a slot that is seen there are among `length` slots."""
    if isinstance(own, Apart):
        return sum(pairs(within, n) for n, within in own.runs)
    if isinstance(own, Neighbourhood):
        return length * min(own.window, own.grid[0]) * min(own.window, own.grid[1])
    mask = own_mask(own, length)
    return length**2 if mask is None else int(mask.sum())

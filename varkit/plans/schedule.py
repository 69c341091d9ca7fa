"""A schedule says which grids a latent is made of, as data: one (height, width) for each level, coarse to fine.

A plain grid is a schedule of one level; VAR's pyramid (arXiv 2404.02905) is ten, from 1 x 1 to 16 x 16. Positions
are numbered level after level, row after row, so position p of level k is `offsets[k] + y * width + x`.
Legend: K levels, L positions in all.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from varkit.errors import UserError

Side = int | tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """Grid sides of each level, coarse to fine: `Schedule.of(1, 2, (3, 4))`.

    Raises `UserError` for an empty schedule, a side below 1, or a level smaller than the one before it.
    """

    sides: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, *sides: Side) -> "Schedule":
        """Build from sides; an integer n stands for the square (n, n)."""
        return cls(tuple((s, s) if isinstance(s, int) else (int(s[0]), int(s[1])) for s in sides))

    @classmethod
    def parse(cls, value: "Schedule | Iterable[Side | list[int]]") -> "Schedule":
        """Accept a schedule, or the lists that JSON makes of one."""
        if isinstance(value, Schedule):
            return value
        return cls.of(*(s if isinstance(s, int) else (s[0], s[1]) for s in value))

    def __post_init__(self) -> None:
        if not self.sides:
            raise UserError("schedule () has no level; give at least one side, e.g. (1, 2, 4, 8)")
        for before, side in zip((self.sides[0], *self.sides), self.sides, strict=False):
            if min(side) < 1:
                raise UserError(f"schedule side {side} is below 1; every height and width must be >= 1")
            if side[0] < before[0] or side[1] < before[1]:
                raise UserError(
                    f"schedule side {side} is smaller than {before} before it; order coarse to fine"
                )

    def __len__(self) -> int:
        return len(self.sides)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each level."""
        return tuple(h * w for h, w in self.sides)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First position of each level, then L: K + 1 numbers."""
        ends = [0]
        for n in self.lengths:
            ends.append(ends[-1] + n)
        return tuple(ends)

    @property
    def total(self) -> int:
        """L, the number of positions."""
        return self.offsets[-1]

    @property
    def last(self) -> tuple[int, int]:
        """Grid of the finest level: the latent's height and width."""
        return self.sides[-1]

    def positions(self, level: int) -> Tensor:
        """Position numbers of one level, (n,) int64."""
        return torch.arange(self.offsets[level], self.offsets[level + 1])

    @cached_property
    def level_of(self) -> Tensor:
        """Level of each position, (L,) int64."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.lengths))

    @cached_property
    def coords(self) -> Tensor:
        """(row, column) of each position in its own level, (L, 2) int64."""
        grids = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in self.sides]
        return torch.cat([g.reshape(-1, 2) for g in grids])

"""Next-scale order (VAR, arXiv 2404.02905): a whole token map a step, all its positions at once.

The feed at level k is the canvas's sum of the levels before it, at level k's grid; it sees itself and everything
coarser (block-causal). The first level has nothing to show: the generator puts its start tokens there.

A level's feed already tells of what is coarser, so attention need not (MVAR, arXiv 2505.12742): with a `history` of h
levels it sees itself and the h before it, and with none there is nothing to cache. Within a fine level a slot may see
a `Windows` of it only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.base import StaticPlan
from varkit.plans.schedule import Schedule, Side
from varkit.plans.step import Sees, Slots, Step
from varkit.plans.visibility import Neighbourhood, Own


@dataclass(frozen=True)
class Windows:
    """Slots see only the side x side of their own level around them, where its smaller side is at least `least`.

    The defaults are MVAR's: of 256-pixel pictures the two largest levels, 13 and 16, and not that of 10.
    """

    side: int = 7
    least: int = 13

    def __post_init__(self) -> None:
        if self.side < 1 or self.side % 2 == 0:
            raise UserError(f"a window of {self.side} has no middle; use an odd side, such as 7")

    def own(self, grid: tuple[int, int]) -> Own:
        """What the slots of a level see of it."""
        dense = min(grid) < self.least or max(grid) <= self.side
        return "all" if dense else Neighbourhood(grid, self.side)


class ScalePlan(StaticPlan):
    """One step a level; slot, shown position and target position have the same number.

    Coordinates are each level's own rows and columns, or, with `frame`, where these lie on one common grid. history:
    how many coarser levels a level sees; None: all. windows: how fine levels see themselves; None: all of them.
    """

    def __init__(
        self,
        schedule: Schedule,
        frame: tuple[int, int] | None = None,
        history: int | None = None,
        windows: Windows | None = None,
    ) -> None:
        self.schedule, self.history, self.windows = schedule, history, windows
        self.coords = schedule.coords if frame is None else framed(schedule, frame)
        super().__init__([self._step(level) for level in range(len(schedule))], schedule.total)

    def _step(self, level: int) -> Step:
        ids = self.schedule.positions(level)
        shows = torch.full_like(ids, -1) if level == 0 else ids
        feed = Slots.of(ids, shows, self.coords[ids], level=level)
        return Step.of(feed, target=ids, sees=self._sees(level), writes=self.history != 0, carries=True)

    def _sees(self, level: int) -> Sees:
        own = "all" if self.windows is None else self.windows.own(self.schedule.sides[level])
        if self.history is None:
            return Sees(own)
        first = self.schedule.offsets[max(0, level - self.history)]
        return Sees(own, past=torch.arange(first, self.schedule.offsets[level]))


def framed(schedule: Schedule, frame: tuple[int, int]) -> Tensor:
    """Row i of a level of h rows lies on row round(i H / h) of the frame's H, columns likewise: (L, 2) int64.

    Infinity's rotary positions (arXiv 2412.04431, mode 2 of the released code), where the frame is the finest grid of
    the 1M-pixel schedule. Halves round to even, and products in float32, as published.
    """
    grids = []
    for h, w in schedule.sides:
        rows, columns = (
            (torch.arange(n) * (whole / n)).round() for n, whole in zip((h, w), frame, strict=True)
        )
        grids.append(torch.cartesian_prod(rows, columns).reshape(-1, 2))
    return torch.cat(grids).long()


@dataclass(frozen=True)
class ScalesConfig:
    """Next-scale order over a pyramid; an integer side stands for a square.

    frame: (rows, columns) of a common grid for positions. ratios: other sizes of pictures may be asked for, those of
    Infinity's table (`varkit.plans.ratios`). history: how many coarser levels a level sees; None: all, 0: none.
    windows: how fine levels see themselves; None: all of them.
    """

    schedule: tuple[Side, ...]
    frame: tuple[int, int] | None = None
    ratios: bool = False
    history: int | None = None
    windows: Windows | None = None

    def __post_init__(self) -> None:
        sides = tuple(s if isinstance(s, int) else tuple(s) for s in self.schedule)
        object.__setattr__(self, "schedule", sides)
        if self.frame is not None:
            object.__setattr__(self, "frame", tuple(self.frame))
        if self.history is not None and self.history < 0:
            raise UserError(
                f"history {self.history} is negative; 0 sees no coarser level, null sees all of them"
            )

    def build(self) -> ScalePlan:
        """Make the plan."""
        return ScalePlan(Schedule.parse(self.schedule), self.frame, self.history, self.windows)

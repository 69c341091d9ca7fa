"""Next-scale order (VAR, arXiv 2404.02905): a whole token map a step, all its positions at once.

The feed at level k is the canvas's sum of the levels before it, at level k's grid; it sees itself and everything
coarser (block-causal). The first level has nothing to show: the generator puts its start tokens there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.plans.base import StaticPlan
from varkit.plans.schedule import Schedule, Side
from varkit.plans.step import Slots, Step


class ScalePlan(StaticPlan):
    """One step a level; slot, shown position and target position have the same number.

    Coordinates are each level's own rows and columns, or, with `frame`, where these lie on one common grid, or `coords`
    (L, D).
    """

    def __init__(
        self, schedule: Schedule, frame: tuple[int, int] | None = None, coords: Tensor | None = None
    ) -> None:
        self.schedule = schedule
        own = schedule.coords if coords is None else coords
        self.coords = own if frame is None else framed(schedule, frame)
        super().__init__([self._step(level) for level in range(len(schedule))], schedule.total)

    def _step(self, level: int) -> Step:
        ids = self.schedule.positions(level)
        shows = torch.full_like(ids, -1) if level == 0 else ids
        feed = Slots.of(ids, shows, self.coords[ids], level=level)
        return Step.of(feed, target=ids)


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
    Infinity's table (`varkit.plans.ratios`).
    """

    schedule: tuple[Side, ...]
    frame: tuple[int, int] | None = None
    ratios: bool = False

    def __post_init__(self) -> None:
        sides = tuple(s if isinstance(s, int) else tuple(s) for s in self.schedule)
        object.__setattr__(self, "schedule", sides)
        if self.frame is not None:
            object.__setattr__(self, "frame", tuple(self.frame))

    def build(self) -> ScalePlan:
        """Make the plan."""
        return ScalePlan(Schedule.parse(self.schedule), self.frame)

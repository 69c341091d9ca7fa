"""Next-scale order (VAR, arXiv 2404.02905): a whole token map a step, all its positions at once.

The feed at level k is the canvas's sum of the levels before it, at level k's grid; it sees itself and everything
coarser (block-causal). The first level has nothing to show: the generator puts its start tokens there.
"""

from dataclasses import dataclass

import torch

from varkit.plans.base import StaticPlan
from varkit.plans.schedule import Schedule, Side
from varkit.plans.step import Slots, Step


class ScalePlan(StaticPlan):
    """One step a level; slot, shown position and target position have the same number."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        super().__init__([self._step(level) for level in range(len(schedule))], schedule.total)

    def _step(self, level: int) -> Step:
        ids = self.schedule.positions(level)
        shows = torch.full_like(ids, -1) if level == 0 else ids
        feed = Slots.of(ids, shows, self.schedule.coords[ids], level=level)
        return Step.of(feed, target=ids)


@dataclass(frozen=True)
class ScalesConfig:
    """Next-scale order over a pyramid; an integer side stands for a square."""

    schedule: tuple[Side, ...]

    def build(self) -> ScalePlan:
        """Make the plan."""
        return ScalePlan(Schedule.parse(self.schedule))

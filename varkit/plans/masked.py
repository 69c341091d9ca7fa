"""Random masked order (MAR, arXiv 2406.11838; its schedule is MaskGIT's, arXiv 2202.04200): a set of positions a step.

After step k of K, floor(L cos(pi/2 (k + 1) / K)) of L positions are still unknown, so that few are settled early and
many late. Each step feeds everything again, the unknown positions as masks, and all slots see each other; nothing can
be cached, since every value already there would now look different. Which positions come first is each sample's own
order, drawn from its stream. Legend: B samples, L positions, P condition slots, T targets.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varkit.errors import UserError, unknown_name
from varkit.plans.base import Plan
from varkit.plans.schedule import Schedule
from varkit.plans.step import Sees, Slots, Step

if TYPE_CHECKING:
    from varkit.decode.state import State

CONDITION, IMAGE = 0, 1
ORDERS = ("random", "raster")


class MaskedPlan(Plan):
    """`prefix` condition slots, then one slot a position. A step's targets are the first in order of what is unknown,
    so that forks, rollbacks and positions given beforehand need nothing of their own.
    """

    segments = ("condition", "image")

    def __init__(
        self, grid: tuple[int, int], iterations: int, prefix: int = 64, order: str = "random"
    ) -> None:
        self.positions, self.iterations, self.prefix, self.order = (
            grid[0] * grid[1],
            iterations,
            prefix,
            order,
        )
        self.slots = prefix + self.positions
        left = [
            math.floor(self.positions * math.cos(math.pi / 2 * (k + 1) / iterations))
            for k in range(iterations)
        ]
        self._left = torch.tensor(left).clamp(min=1)
        self._image = torch.arange(self.positions)
        coords = Schedule.of(grid).coords
        self._coords = torch.cat([coords.new_zeros(prefix, 2), coords])
        self._segment = torch.cat([torch.full((prefix,), CONDITION), torch.full_like(self._image, IMAGE)])

    @property
    def evaluations(self) -> int:
        """Evaluations of the network that a run takes."""
        return self.iterations

    def orders(self, state: "State") -> Tensor:
        """(B, L): each sample's order of the positions, consumed from its end, as published."""
        if self.order == "raster":
            return self._image.flip(0).expand(state.batch, -1)
        return state.draws.uniform("order", 0, self._image).squeeze(-1).argsort(dim=1)

    def next_step(self, state: "State") -> Step | None:
        known = state.canvas.known.cpu()
        remaining = (~known).sum(dim=1)
        if bool((state.finished | (remaining == 0)).all()):
            return None
        last = state.cursor >= self.iterations - 1
        left = self._left[state.cursor.clamp(max=self.iterations - 1)]
        kept = torch.where(last, 0, torch.minimum(left, (remaining - 1).clamp(min=0)))
        return self.step(known, self._next(state, known, torch.where(state.finished, 0, remaining - kept)))

    def step(self, known: Tensor, target: Tensor) -> Step:
        """Predict positions `target` (B, T), -1 for padding, where the positions `known` (B, L) are shown."""
        hidden = torch.full((len(known), self.prefix), -1)
        shows = torch.cat([hidden, torch.where(known, self._image, -1)], dim=1)
        feed = Slots.of(torch.arange(len(self._segment)), shows, self._coords, segment=self._segment)
        read = torch.where(target < 0, -1, target + self.prefix)
        nothing = torch.empty(0, dtype=torch.int64)
        return Step.of(feed, target, read, sees=Sees(own="all", past=nothing), writes=False)

    def finished(self, state: "State") -> Tensor:
        return (state.cursor >= self.iterations) | state.canvas.known.cpu().all(dim=1)

    def progress(self, at: Tensor) -> Tensor:
        """The part of the positions that is known after the step, which the published linear guidance follows."""
        return 1 - self._left[at.clamp(max=self.iterations - 1)] / self.positions

    def _next(self, state: "State", known: Tensor, count: Tensor) -> Tensor:
        """The first `count` (B,) unknown positions in order, (B, T) padded with -1."""
        order = self.orders(state).flip(1)
        unknown = ~known.gather(1, order)
        chosen = unknown & (unknown.cumsum(dim=1) <= count[:, None])
        most = int(count.max())
        target = order.gather(1, chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most])
        return torch.where(torch.arange(most) < count[:, None], target, -1)


@dataclass(frozen=True)
class MaskedConfig:
    """Masked order over a (height, width) grid in `iterations` steps, behind `prefix` condition slots.

    order: "random" for each sample, or "raster". MAR's best results take as many iterations as there are positions;
    64 are nearly as good.
    """

    grid: tuple[int, int]
    iterations: int = 64
    prefix: int = 64
    order: str = "random"

    def __post_init__(self) -> None:
        if min(*self.grid, self.prefix) < 1:
            raise UserError(
                f"grid {self.grid} with prefix {self.prefix} is too small; all must be at least 1"
            )
        positions = self.grid[0] * self.grid[1]
        if not 1 <= self.iterations <= positions:
            raise UserError(
                f"iterations is {self.iterations}; the grid {self.grid} takes 1 to {positions}, one position a step"
            )
        if self.order not in ORDERS:
            raise unknown_name("order", self.order, ORDERS)

    def build(self) -> MaskedPlan:
        """Make the plan."""
        return MaskedPlan(self.grid, self.iterations, self.prefix, self.order)

"""Raster order (LlamaGen, arXiv 2406.06525): one token a step, left to right, top to bottom.

What is fed is not what is predicted: the slot behind token i - 1 predicts token i, and the first prediction is read
from the last slot of the condition prefix (a class token, or the words of a prompt).
"""

from dataclasses import dataclass

import torch

from varkit.errors import UserError
from varkit.plans.base import StaticPlan
from varkit.plans.step import Sees, Slots, Step

PREFIX, IMAGE = 0, 1


class RasterPlan(StaticPlan):
    """`prefix` condition slots come first (zero coordinates), then the grid's tokens but the last, causally.

    The whole prefix is one step, whose slots see each other causally (as a Llama does).
    """

    segments = ("condition", "image")

    def __init__(self, grid: tuple[int, int], prefix: int = 1) -> None:
        self.grid, self.prefix = grid, prefix
        height, width = grid
        first = Slots.of(
            torch.arange(prefix),
            torch.full((prefix,), -1),
            torch.zeros(prefix, 2, dtype=torch.int64),
            segment=PREFIX,
        )
        start = Step.of(
            first, target=torch.tensor([0]), read=torch.tensor([prefix - 1]), sees=Sees(own="causal")
        )
        rest = [self._step(position, width) for position in range(height * width - 1)]
        super().__init__([start, *rest], prefix + height * width - 1)

    def _step(self, position: int, width: int) -> Step:
        shows = torch.tensor([position])
        coords = torch.tensor([[position // width, position % width]])
        feed = Slots.of(shows + self.prefix, shows, coords, segment=IMAGE)
        return Step.of(feed, target=shows + 1, sees=Sees(own="causal"))


@dataclass(frozen=True)
class RasterConfig:
    """Raster order over a (height, width) grid behind `prefix` condition slots."""

    grid: tuple[int, int]
    prefix: int = 1

    def __post_init__(self) -> None:
        if min(*self.grid, self.prefix) < 1:
            raise UserError(
                f"grid {self.grid} with prefix {self.prefix} is too small; all must be at least 1"
            )

    def build(self) -> RasterPlan:
        """Make the plan."""
        return RasterPlan(self.grid, self.prefix)

"""A new order of prediction: whole anti-diagonals at once, on the loop, cache, network and canvas that are there.

LlamaGen takes a grid of tokens in raster order, one evaluation of the network a token. Here a step predicts all tokens
whose row and column add up to the same number, so a grid of 6 x 8 takes 13 evaluations in place of 48. Nothing else is
written: the training mask, cached decoding, guidance and previews follow from the steps. The weights are random (this
shows the seam, not pictures); writes order.png.
"""

from dataclasses import dataclass
from typing import Any

import torch

from varkit.decode.loop import decode
from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.pictures import to_pil
from varkit.plans.base import StaticPlan
from varkit.plans.step import Slots, Step
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.vq import VQConfig


class DiagonalPlan(StaticPlan):
    """Step d settles the positions with row + column = d; a position's slot has the position's number.

    The slot is fed twice: first blank (`shows` -1), which asks for its token, and one step later showing that token. As
    both have one cache address, the answer takes the question's place, and later steps never see a blank.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        height, width = grid
        self.coords = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        diagonal = self.coords.sum(dim=1)
        positions = [(diagonal == d).nonzero()[:, 0] for d in range(height + width - 1)]
        nothing = positions[0][:0]
        steps = [self._step(*pair) for pair in zip([nothing, *positions], positions, strict=False)]
        super().__init__(steps, slots=height * width)

    def _step(self, settled: torch.Tensor, asked: torch.Tensor) -> Step:
        ids = torch.cat([settled, asked])
        shows = torch.cat([settled, torch.full_like(asked, -1)])
        read = torch.arange(len(settled), len(ids))  # from the blank slots
        return Step.of(Slots.of(ids, shows, self.coords[ids]), target=asked, read=read)


@dataclass(frozen=True)
class DiagonalConfig:
    """Anti-diagonal order over a (height, width) grid."""

    grid: tuple[int, int]

    def build(self) -> DiagonalPlan:
        """Make the plan."""
        return DiagonalPlan(self.grid)


def main() -> None:
    """Decode two samples in diagonal order, and show when each position was settled."""
    torch.manual_seed(0)
    grid = (6, 8)
    conv = ConvConfig(
        channels=16, multipliers=(1, 2), res_blocks=1, latent_channels=16, attention=False, groups=4
    )
    configs: dict[str, Any] = {
        "tokenizer": VQConfig(conv, vocab_size=64, code_channels=8, grid=grid),
        "generator": LlamaGenConfig(depth=2, width=64, heads=4, vocab_size=64, condition=ClassConfig(10)),
        "head": CategoricalConfig(width=64, vocab_size=64),
        "plan": DiagonalConfig(grid),
    }
    parts = {name: config.build() for name, config in configs.items()}
    pipeline = Pipeline(parts, configs, Settings(guidance=2.0))

    state = pipeline.start([3, 7], seed=0)
    for _ in decode(pipeline.model, state):
        known = int(state.canvas.known.sum(dim=1)[0])
        print(f"evaluation {int(state.cursor[0]):2}: {known:2} of {grid[0] * grid[1]} positions")

    print("the evaluation that settled each position:")
    for row in state.canvas.revealed_at[0].view(grid).tolist():
        print(" ".join(f"{step:2}" for step in row))
    training = parts["plan"].training_step()
    print(f"training: one sequence of {len(training.feed)} slots, {len(training.target)} targets")
    with torch.no_grad():
        to_pil(state.canvas.preview())[0].save("order.png")


if __name__ == "__main__":
    main()

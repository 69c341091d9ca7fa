"""FlexVAR: next-scale prediction in any schedule, size and aspect ratio (arXiv 2502.20313).

VAR's transformer over maps that do not add up (`varkit.tokenizers.map_vq`): at each scale it is fed the map before,
enlarged, and predicts the whole map. Slots know no scale, only their place on one table of positions that is resized,
by means over areas, to the grid of their scale; so schedules are a choice at run time (`varkit.plans.flexible`).
Legend: N rows, L slots, C width, S side of the table.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.devices import sent_once
from varkit.generators.base import check_tokenizer, per_row
from varkit.generators.conditioning import ClassConfig, class_or_text
from varkit.generators.scale_transformer import ScaleTransformer
from varkit.generators.sizes import check_least, check_scale_transformer
from varkit.generators.text import TextConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.nn.adaln import BlockConfig
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.plans.step import Step
from varkit.tokenizers.map_vq import MapVQConfig

Grid = tuple[int, int]


@dataclass(frozen=True)
class FlexVARConfig:
    """Published sizes (`FlexVARConfig.published`) are VAR's: width = 64 x depth, heads = depth.

    table: side of the square table of positions. adaln_init: factor on the modulation rows that gate the residual
    branches (the paper's alng).
    """

    depth: int
    width: int
    heads: int
    code_width: int
    condition: ClassConfig | TextConfig
    table: int = 32
    mlp_ratio: float = 4.0
    cosine: bool = True
    shared_modulation: bool = False
    drop_path: float = 0.0
    adaln_init: float = 1e-3
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_scale_transformer(self)
        check_least(self, 1, "depth", "table")

    @classmethod
    def published(cls, depth: int, **rest: Any) -> "FlexVARConfig":
        """A released size: depth 16, 20 or 24, all for 256 pixels; the largest starts with smaller gates."""
        defaults: dict[str, Any] = {
            "width": 64 * depth,
            "heads": depth,
            "code_width": 32,
            "condition": ClassConfig(1000),
            "drop_path": 0.1 * depth / 24,
            "adaln_init": 1e-4 if depth >= 24 else 1e-3,
        }
        return cls(depth=depth, **(defaults | rest))

    def fitted(self, tokenizer: MapVQConfig) -> dict[str, Any]:
        """Generator, and the head and plan beside it, for a tokenizer's codes; its schedule is the default."""
        check_tokenizer(self, tokenizer, "code_channels", "vocab_size", "schedule")
        config = replace(self, code_width=tokenizer.code_channels)
        head = CategoricalConfig(config.width, tokenizer.vocab_size)
        return {"generator": config, "head": head, "plan": FlexibleScalesConfig(tokenizer.schedule)}

    def build(self) -> "FlexVAR":
        """The network, initialised as published."""
        return FlexVAR(self)


class FlexVAR(ScaleTransformer):
    """Places are read off the plan's coordinates, (row, column, height, width) of each slot."""

    def __init__(self, config: FlexVARConfig) -> None:
        conditioner = class_or_text(config.condition, config.width)
        block = BlockConfig(
            config.width, config.heads, config.mlp_ratio, config.cosine, config.shared_modulation,
            conditioner.memory_width, config.norm_eps,
        )  # fmt: skip
        super().__init__(conditioner, block, config.depth, config.code_width, 1, 0, config.drop_path)
        self.config = config
        self.position = nn.Parameter(waves(config.width, config.table))
        self.initialise(gate=config.adaln_init)

    def stands(self, step: Step, branches: int, device: torch.device) -> Tensor:
        """The table at the grid of each slot's scale: (L, C) or (N, L, C)."""
        sides = step.feed.coords[..., 2:].clamp(min=1)  # padding
        grids = [(h, w) for h, w in sides.reshape(-1, 2).unique(dim=0).tolist()]
        places, sides = sent_once(step.feed.coords, device).split(2, dim=-1)
        sides = sides.clamp(min=1)
        index, start = torch.zeros_like(places[..., 0]), 0
        for h, w in grids:
            here = (sides[..., 0] == h) & (sides[..., 1] == w)
            index = torch.where(here, start + places[..., 0] * w + places[..., 1], index)
            start += h * w
        return self.positions(grids)[per_row(index, 1, branches)]

    def positions(self, grids: list[Grid]) -> Tensor:
        """The vectors of whole grids, one after the other: (sum of h w, C)."""
        tables = (F.interpolate(self.position[None], grid, mode="area") for grid in grids)
        return torch.cat([table[0].flatten(1).mT for table in tables])


def waves(channels: int, side: int) -> Tensor:
    """Where the table starts, (C, side, side): sin(y w_j) in channel 2j, cos(x w_j) in 2j + 1; w_j = 10000^(-2j/C)."""
    frequencies = 10000 ** (-torch.arange(0, channels, 2) / channels)
    angles = frequencies[:, None] * torch.arange(side)
    table = torch.empty(channels, side, side)
    table[0::2] = angles.sin()[:, :, None]
    table[1::2] = angles.cos()[: channels // 2, None, :]
    return table

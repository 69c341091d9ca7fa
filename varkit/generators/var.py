"""VAR: a transformer that predicts whole token maps of growing resolution (arXiv 2404.02905, Sec. 3).

Inputs are the tokenizer's running feature map at each scale; every block is modulated by the condition (AdaLN);
attention is cosine attention, block-causal over scales in training, cached in decoding. With a text conditioner each
block also attends to the prompt (after Infinity, arXiv 2412.04431).
Legend: R branches, B samples, N = R x B, L slots, C width, D condition width (= C), K levels, M prompt length.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.generators.base import check_tokenizer
from varkit.generators.conditioning import ClassConfig, class_or_text
from varkit.generators.scale_transformer import ScaleTransformer
from varkit.generators.sizes import check_scale_transformer
from varkit.generators.text import TextConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.nn.adaln import BlockConfig
from varkit.nn.surroundings import Surroundings
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig


@dataclass(frozen=True)
class VARConfig:
    """Published sizes: width = 64 x depth, heads = depth, stochastic depth 0.1 x depth / 24 (`VARConfig.published`).

    adaln_init: factor on the modulation rows that gate the residual branches (the paper's alng). reach: grid steps
    around a slot whose vectors are embedded with its own (a convolution; 0 as published).
    """

    depth: int
    width: int
    heads: int
    schedule: tuple[Side, ...]
    code_width: int
    condition: ClassConfig | TextConfig
    mlp_ratio: float = 4.0
    cosine: bool = True
    shared_modulation: bool = False
    drop_path: float = 0.0
    adaln_init: float = 1e-3
    norm_eps: float = 1e-6
    reach: int = 0

    def __post_init__(self) -> None:
        check_scale_transformer(self)
        if self.depth < 1:
            raise UserError(f"depth {self.depth} is below 1; a generator needs at least one block")
        if self.reach < 0:
            raise UserError(f"reach {self.reach} is negative; use 0 to embed a slot by itself, 1 for 3 x 3")

    @classmethod
    def published(cls, depth: int, schedule: tuple[Side, ...], **rest) -> "VARConfig":
        """A released size: depth 16, 20, 24, 30 at 256 pixels, 36 (shared modulation) at 512."""
        defaults: dict[str, Any] = {
            "width": 64 * depth,
            "heads": depth,
            "code_width": 32,
            "condition": ClassConfig(1000),
            "drop_path": 0.1 * depth / 24,
            "shared_modulation": depth >= 36,
        }
        return cls(depth=depth, schedule=schedule, **(defaults | rest))

    def fitted(self, tokenizer: MultiScaleVQConfig) -> dict[str, Any]:
        """Generator, and the head and plan beside it, for a tokenizer's codes and schedule."""
        check_tokenizer(self, tokenizer, "code_channels", "vocab_size", "schedule")
        config = replace(self, schedule=tokenizer.schedule, code_width=tokenizer.code_channels)
        head = CategoricalConfig(config.width, tokenizer.vocab_size)
        return {"generator": config, "head": head, "plan": ScalesConfig(tokenizer.schedule)}

    def block(self, memory_width: int) -> BlockConfig:
        """The kind of block, for a prompt of that width (0 without)."""
        return BlockConfig(
            self.width, self.heads, self.mlp_ratio, self.cosine, self.shared_modulation, memory_width, self.norm_eps
        )  # fmt: skip

    def build(self) -> "VAR":
        """The network, initialised as published."""
        return VAR(self)


class VAR(ScaleTransformer):
    """Every slot of the schedule has a learned position."""

    def __init__(self, config: VARConfig) -> None:
        schedule = Schedule.parse(config.schedule)
        width = config.width
        conditioner = class_or_text(config.condition, width)
        starts, levels = schedule.lengths[0], len(schedule)
        around = Surroundings(schedule, config.reach) if config.reach else None
        block = config.block(conditioner.memory_width)
        super().__init__(
            conditioner, block, config.depth, config.code_width, starts, levels, config.drop_path, around
        )
        self.config = config
        self.position = nn.Parameter(torch.empty(schedule.total, width))
        self.initialise(gate=config.adaln_init)
        nn.init.trunc_normal_(self.position, std=(1 / (3 * width)) ** 0.5)

    def place(self, ids: Tensor, level: Tensor) -> Tensor:
        """A slot's learned position, and its scale's embedding."""
        return self.position[ids] + self.level(level)

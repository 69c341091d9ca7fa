"""Infinity: bitwise next-scale prediction for text to image (arXiv 2412.04431).

VAR's transformer with rotary positions on a common grid (the plan's coordinates, `varkit.plans.scales.framed`) in place
of learned ones, so that one model draws any schedule of up to 15 scales; the prompt, pooled, is start token and
modulation, and every block attends to it; codes are bits (`varkit.heads.bits`).
Legend: R branches, L slots, C width, D bits of a token.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from varkit.devices import sent_once
from varkit.errors import UserError, unknown_name
from varkit.generators.base import check_tokenizer, per_row
from varkit.generators.prompt import PromptCondition
from varkit.generators.scale_transformer import ScaleTransformer
from varkit.generators.sizes import check_least, check_scale_transformer
from varkit.generators.text import TextConfig, TextFeaturesConfig
from varkit.heads.bits import BitsConfig
from varkit.nn.adaln import BlockConfig
from varkit.nn.rope import Rotary, rotary_angles
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step
from varkit.tokenizers.bitwise import BitwiseConfig

SIZES: dict[str, tuple[int, int, int, int]] = {
    "layer12": (12, 768, 8, 32),
    "layer16": (16, 1152, 12, 32),
    "layer24": (24, 1536, 16, 32),
    "2b": (32, 2048, 16, 32),
    "layer32": (32, 2080, 20, 32),
    "layer40": (40, 2688, 24, 32),
    "layer48": (48, 3360, 28, 32),
    "8b": (40, 3584, 28, 56),
    "20b": (58, 4608, 36, 32),
}
"""Published sizes: depth, width, heads, bits of a token."""


@dataclass(frozen=True)
class InfinityConfig:
    """Published sizes: `InfinityConfig.published`. code_width: bits of a token. levels: scales that it knows at most.

    gate_init and modulation_init: factors on the modulation's start (the paper's alng and aln).
    """

    depth: int
    width: int
    heads: int
    code_width: int
    condition: TextConfig | TextFeaturesConfig = TextFeaturesConfig()
    levels: int = 15
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    gate_init: float = 5e-6
    modulation_init: float = 1e-3
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"depth {self.depth} is below 1; a generator needs at least one block")
        check_scale_transformer(self)
        check_least(self, 1, "levels")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise UserError(
                f"width {self.width} over {self.heads} heads does not give a head width that is a multiple of 4, "
                "which 2-D rotary positions need; change one of them"
            )

    @classmethod
    def published(cls, size: str, **rest: Any) -> "InfinityConfig":
        """A published size by name (`SIZES`)."""
        if size not in SIZES:
            raise unknown_name("size", size, SIZES)
        depth, width, heads, bits = SIZES[size]
        hidden = round(4 * width / 256) * 256
        return cls(depth, width, heads, bits, **({"mlp_ratio": hidden / width} | rest))

    def fitted(self, tokenizer: BitwiseConfig) -> dict[str, Any]:
        """Generator, and the head and plan beside it, for a tokenizer's bits and schedule.

        Positions lie on the finest grid of the schedule, so that scales share their frame.
        """
        check_tokenizer(self, tokenizer, "token_bits", "schedule")
        config = replace(self, code_width=tokenizer.token_bits)
        frame = Schedule.parse(tokenizer.schedule).last
        return {
            "generator": config,
            "head": BitsConfig(config.width, tokenizer.token_bits),
            "plan": ScalesConfig(tokenizer.schedule, frame),
        }

    def build(self) -> "Infinity":
        """The network, initialised as published."""
        return Infinity(self)


class Infinity(ScaleTransformer):
    """Slots know their scale by an embedding and their place by rotation, after the norm of cosine attention."""

    def __init__(self, config: InfinityConfig) -> None:
        conditioner = PromptCondition(config.condition, config.width)
        block = BlockConfig(
            config.width, config.heads, config.mlp_ratio, cosine=True, shared_modulation=True,
            memory_width=conditioner.memory_width, norm_eps=config.norm_eps,
        )  # fmt: skip
        super().__init__(
            conditioner, block, config.depth, config.code_width, 1, config.levels, config.drop_path
        )
        self.config = config
        self.initialise(config.gate_init, config.modulation_init)

    def rotation(self, step: Step, branches: int, device: torch.device) -> Rotary:
        """By the plan's rows and columns."""
        coords = per_row(sent_once(step.feed.coords, device), 2, branches)
        return Rotary(rotary_angles(coords, self.width // self.config.heads))

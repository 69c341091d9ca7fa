"""M-VAR: attention within each scale, and a Mamba-2 scan from scale to scale (arXiv 2411.10433; not MVAR, 2505.12742).

VAR with two thirds of its mixing exchanged: attention sees the slots of its own scale alone (the plan's history is 0),
and one causal scan over all slots, coarse to fine and in raster order within a scale, tells a scale of those before it.
What the scan carries has a constant size, so a run keeps no keys and values. The published code runs the scan over the
whole prefix at every step; here it goes on from where it was.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from varkit.errors import UserError
from varkit.generators.var import VAR, VARConfig
from varkit.nn.adaln import BlockConfig
from varkit.nn.mamba import Mamba2Config
from varkit.nn.scan_block import ScanBlock, ScanBlockConfig
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

CONVOLUTION_STD = 0.02


@dataclass(frozen=True)
class MVarConfig(VARConfig):
    """VAR's sizes, and those of the scan. Released: depth 12, 16, 20, 24 and 30 of width 64 x depth, the smaller ones
    without cosine attention.

    published_start: begin training as the published code does, whose rule is VAR's, made for six vectors: the gate of
    the feed-forward starts as scales and shifts do, and the scan's convolution at 0.02 (unconfirmed). Without it all
    three gates start at `adaln_init`, and the convolution as torch's do.
    """

    scan: Mamba2Config = Mamba2Config()
    published_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared_modulation:
            raise UserError(
                "shared_modulation does not go with M-VAR, whose blocks have nine vectors; use false"
            )
        self.scan.check(self.width)

    @classmethod
    def published(cls, depth: int, schedule: tuple[Any, ...], **rest) -> "MVarConfig":
        """A released size at 256 pixels."""
        defaults = {"shared_modulation": False, "cosine": depth > 20, "published_start": True}
        return super().published(depth, schedule, **(defaults | rest))  # type: ignore[return-value]

    def fitted(self, tokenizer: MultiScaleVQConfig) -> dict[str, Any]:
        """As VAR's, with a plan of scales that see only themselves."""
        return super().fitted(tokenizer) | {"plan": ScalesConfig(tokenizer.schedule, history=0)}

    def block(self, memory_width: int) -> BlockConfig:
        """VAR's with a scan."""
        return ScanBlockConfig(**vars(super().block(memory_width)), scan=self.scan)

    def build(self) -> "MVar":
        """The network, initialised."""
        return MVar(self)


class MVar(VAR):
    """VAR of other blocks."""

    recordable = False
    config: MVarConfig

    @torch.no_grad()
    def initialise(self, gate: float, modulation: float = 0.5) -> None:
        super().initialise(gate, modulation)
        for block in self.blocks:
            assert isinstance(block, ScanBlock)
            if self.config.published_start:
                nn.init.trunc_normal_(block.scan.conv.weight, std=CONVOLUTION_STD)
                nn.init.zeros_(block.scan.conv.bias)  # type: ignore[arg-type]
            else:
                block.modulation.weight[2 * self.width : 3 * self.width].mul_(gate / modulation)
                block.scan.out.weight.div_((2 * self.depth) ** 0.5)

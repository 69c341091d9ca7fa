"""VAR: a transformer that predicts whole token maps of growing resolution (arXiv 2404.02905, Sec. 3).

Inputs are the tokenizer's running feature map at each scale; every block is modulated by the condition (AdaLN);
attention is cosine attention, block-causal over scales in training, cached in decoding. With a text conditioner each
block also attends to the prompt (after Infinity, arXiv 2412.04431).
Legend: R branches, B samples, N = R x B, L slots, C width, D condition width (= C), K levels, M prompt length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.generators.base import Condition, Generator, Prepared, per_row, rows
from varkit.generators.conditioning import ClassCondition, ClassConfig, TextCondition
from varkit.generators.text import TextConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.nn.adaln import AdaLNBlock, BlockConfig, modulate
from varkit.nn.attention import Window
from varkit.nn.linear import Linear
from varkit.nn.ports import Ports, port_at, through
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule, Side
from varkit.plans.step import Step
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig


@dataclass(frozen=True)
class VARConfig:
    """Published sizes: width = 64 x depth, heads = depth, stochastic depth 0.1 x depth / 24 (`VARConfig.published`).

    adaln_init: factor on the modulation rows that gate the residual branches (the paper's alng).
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

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"width {self.width} is not a multiple of {self.heads} heads; change one of them")
        if self.depth < 1:
            raise UserError(f"depth {self.depth} is below 1; a generator needs at least one block")

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
        config = replace(self, schedule=tokenizer.schedule, code_width=tokenizer.code_channels)
        head = CategoricalConfig(config.width, tokenizer.vocab_size)
        return {"generator": config, "head": head, "plan": ScalesConfig(tokenizer.schedule)}

    def build(self) -> "VAR":
        """The network, initialised as published."""
        return VAR(self)


class VAR(Generator):
    """`forward` takes {"vectors": (B, L, code_width)} and returns (N, L, C)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config, self.width, self.depth = config, config.width, config.depth
        schedule = Schedule.parse(config.schedule)
        width = config.width
        if isinstance(config.condition, ClassConfig):
            self.conditioner = ClassCondition(config.condition, width)
        else:
            self.conditioner = TextCondition(config.condition, width)
        self.embed = Linear(config.code_width, width)
        self.start = nn.Parameter(torch.empty(schedule.lengths[0], width))
        self.position = nn.Parameter(torch.empty(schedule.total, width))
        self.level = nn.Embedding(len(schedule), width)
        self.shared_modulation = Linear(width, 6 * width) if config.shared_modulation else None
        block = BlockConfig(
            width, config.heads, config.mlp_ratio, config.cosine, config.shared_modulation,
            self.conditioner.memory_width, config.norm_eps,
        )  # fmt: skip
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks: Sequence[AdaLNBlock] = nn.ModuleList(AdaLNBlock(block, width, r) for r in rates)  # type: ignore[assignment]
        self.final_modulation = Linear(width, 2 * width)
        self.initialise()

    def prepare(self, condition: Condition) -> Prepared:
        branches, batch = next(iter(condition.values())).shape[:2]
        vector, memory, mask = self.conditioner({k: v.flatten(0, 1) for k, v in condition.items()})
        shared = None
        if self.shared_modulation is not None:
            shared = self.shared_modulation(F.silu(vector)).unflatten(-1, (6, -1))
        prepared = {
            "start": vector,
            "modulation": torch.stack([b.vectors(vector, shared) for b in self.blocks], dim=1),
            "final": self.final_modulation(F.silu(vector)).unflatten(-1, (2, -1)),
        }
        if memory is not None and mask is not None:
            pairs = [b.cross.project(memory) for b in self.blocks]
            prepared["memory_k"] = torch.stack([k for k, _ in pairs], dim=1)
            prepared["memory_v"] = torch.stack([v for _, v in pairs], dim=1)
            prepared["memory_mask"] = mask[:, None, None]
        return {k: v.unflatten(0, (branches, batch)) for k, v in prepared.items()}

    def forward(
        self,
        fed: dict[str, Tensor],
        step: Step,
        prepared: Prepared,
        window: Window,
        ports: Ports | None = None,
    ) -> Tensor:
        flat = {k: v.flatten(0, 1) for k, v in prepared.items()}
        h = self._embed(fed["vectors"], step, flat["start"])
        h = through(ports, "input", 0, h, step, prepared)
        for layer, block in enumerate(self.blocks):
            memory = None
            if "memory_k" in flat:
                memory = (flat["memory_k"][:, layer], flat["memory_v"][:, layer], flat["memory_mask"])
            port = port_at(ports, "attention", layer, step, prepared)
            h = block(h, flat["modulation"][:, layer], window, layer, memory, port=port)
            h = through(ports, "block", layer, h, step, prepared)
        scale, shift = flat["final"].split(1, dim=1)
        return through(ports, "output", 0, modulate(h, scale, shift, self.config.norm_eps), step, prepared)

    def _embed(self, vectors: Tensor, step: Step, start: Tensor) -> Tensor:
        """(B, L, D) -> (N, L, C): the shown maps, or the start tokens where nothing is shown, plus where they stand."""
        branches, device = start.shape[0] // vectors.shape[0], self.position.device
        starts = bool((step.feed.shows < 0).any())
        ids, level, shows = (
            per_row(t, 1, branches).to(device)
            for t in (step.feed.ids.clamp(min=0), step.feed.level, step.feed.shows)
        )
        h = rows(self.embed(vectors.to(self.embed.weight.dtype)), branches)
        if starts:
            first = start[:, None] + self.start[ids.clamp(max=len(self.start) - 1)]
            h = torch.where((shows < 0)[..., None], first, h)
        return h + (self.position[ids] + self.level(level))

    @torch.no_grad()
    def initialise(self) -> None:
        """Truncated normal of std sqrt(1 / 3C); gates small; projections into the residual over sqrt(2 depth).

        Without this, deep models stall (the sheet's "Init").
        """
        width = self.width
        std = (1 / (3 * width)) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(self.conditioner, TextCondition):
            self.conditioner.encoder.initialise()
        for table in (self.start, self.position):
            nn.init.trunc_normal_(table, std=std)
        self.final_modulation.weight.mul_(0.5)
        for block in self.blocks:
            if block.shared:
                block.modulation_offset[2:].mul_(0.5)
                block.modulation_offset[:2].mul_(self.config.adaln_init)
            else:
                block.modulation.weight[2 * width :].mul_(0.5)
                block.modulation.weight[: 2 * width].mul_(self.config.adaln_init)
            block.attention.out.weight.div_((2 * self.depth) ** 0.5)
            block.ffn.down.weight.div_((2 * self.depth) ** 0.5)
            if hasattr(block, "cross"):
                block.cross.out.weight.div_((2 * self.depth) ** 0.5)

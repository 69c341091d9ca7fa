"""LlamaGen: a plain Llama decoder over VQ tokens in raster order (arXiv 2406.06525).

The class enters as one prefix token; positions are 2-D rotary; the token shown at a slot predicts the next. Text
prompts and the released sizes come with the published-checkpoints work.
Legend: R branches, B samples, N = R x B, L slots, C width, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.generators.base import Condition, Generator, Prepared, per_row, rows
from varkit.generators.conditioning import ClassCondition, ClassConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.nn.attention import Window
from varkit.nn.llama import LlamaBlock, llama_hidden
from varkit.nn.ports import Ports, port_at, through
from varkit.nn.rope import Rotary, rotary_angles
from varkit.plans.raster import RasterConfig
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step
from varkit.tokenizers.vq import VQConfig


@dataclass(frozen=True)
class LlamaGenConfig:
    """`zero_prefix`: rotate condition slots to zero as the released weights expect, else leave them as they are.

    hidden 0 means two thirds of 4 C rounded up to `multiple_of`.
    """

    depth: int
    width: int
    heads: int
    vocab_size: int
    condition: ClassConfig
    kv_heads: int | None = None
    hidden: int = 0
    multiple_of: int = 256
    dropout: float = 0.0
    drop_path: float = 0.0
    zero_prefix: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise UserError(
                f"width {self.width} over {self.heads} heads does not give a head width that is a multiple of 4, "
                "which 2-D rotary positions need; change one of them"
            )

    def fitted(self, tokenizer: VQConfig) -> dict[str, Any]:
        """Generator, and the head and plan beside it, for a tokenizer's codes and grid."""
        config = replace(self, vocab_size=tokenizer.vocab_size)
        head = CategoricalConfig(config.width, tokenizer.vocab_size, bias=False, init_scale=0.0)
        return {"generator": config, "head": head, "plan": RasterConfig(Schedule.of(tokenizer.grid).last)}

    def build(self) -> "LlamaGen":
        """The network, initialised as published."""
        return LlamaGen(self)


class LlamaGen(Generator):
    """`forward` takes {"ids": (B, L)} and returns (N, L, C); slots that show nothing hold the condition."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config, self.width, self.depth = config, config.width, config.depth
        self.conditioner = ClassCondition(config.condition, config.width)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.embed_dropout = nn.Dropout(config.dropout)
        hidden = config.hidden or llama_hidden(config.width, config.multiple_of)
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(
            LlamaBlock(config.width, config.heads, hidden, config.kv_heads, config.dropout, rate)
            for rate in rates
        )
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.initialise()

    def prepare(self, condition: Condition) -> Prepared:
        branches, batch = next(iter(condition.values())).shape[:2]
        vector, _, _ = self.conditioner({k: v.flatten(0, 1) for k, v in condition.items()})
        return {"prefix": vector[:, None].unflatten(0, (branches, batch))}

    def forward(
        self,
        fed: dict[str, Tensor],
        step: Step,
        prepared: Prepared,
        window: Window,
        ports: Ports | None = None,
    ) -> Tensor:
        prefix = prepared["prefix"].flatten(0, 1)
        h = self.embed_dropout(self._embed(fed["ids"], step, prefix))
        h = through(ports, "input", 0, h, step, prepared)
        rotate = self._rotary(step, prefix.shape[0] // fed["ids"].shape[0], h.device)
        for layer, block in enumerate(self.blocks):
            h = block(h, window, layer, rotate, port=port_at(ports, "attention", layer, step, prepared))
            h = through(ports, "block", layer, h, step, prepared)
        return through(ports, "output", 0, self.norm(h), step, prepared)

    def _embed(self, ids: Tensor, step: Step, prefix: Tensor) -> Tensor:
        """(B, L) -> (N, L, C): tokens shown, or the prefix (N, P, C) where nothing is."""
        branches = prefix.shape[0] // ids.shape[0]
        h = rows(self.embed(ids), branches)
        if not bool((step.feed.shows < 0).any()):
            return h
        blank = per_row(step.feed.shows < 0, 1, branches).to(h.device)
        at = per_row(step.feed.ids.clamp(0, prefix.shape[1] - 1), 1, branches).to(h.device)
        start = prefix[:, at] if at.ndim == 1 else prefix[torch.arange(len(prefix))[:, None], at]
        return torch.where(blank[..., None], start, h)

    def _rotary(self, step: Step, branches: int, device: torch.device) -> Rotary:
        coords = per_row(step.feed.coords, 2, branches).to(device)
        blank = per_row(step.feed.shows < 0, 1, branches).to(device) if self.config.zero_prefix else None
        return Rotary(rotary_angles(coords, self.width // self.config.heads), blank)

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal of std 0.02 for every matrix and table; `CategoricalConfig(init_scale=0)` starts the head at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

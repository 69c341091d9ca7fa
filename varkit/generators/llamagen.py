"""LlamaGen: a plain Llama decoder over VQ tokens in raster order (arXiv 2406.06525).

The condition enters as a prefix alone, one token of a class or the P tokens of a prompt; positions are 2-D rotary; the
token shown at a slot predicts the next.
Legend: R branches, B samples, N = R x B, L slots, C width, P prefix slots, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varkit.devices import sent_once
from varkit.errors import UserError, unknown_name
from varkit.generators.base import Condition, Generator, Prepared, check_tokenizer, per_row, rows
from varkit.generators.conditioning import ClassCondition, ClassConfig, Conditioner
from varkit.generators.prefix import PrefixCondition
from varkit.generators.sizes import check_least, check_rates
from varkit.generators.text import TextConfig, TextFeaturesConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.nn.attention import Window
from varkit.nn.llama import LlamaBlock, llama_hidden
from varkit.nn.ports import Ports, port_at, through
from varkit.nn.rope import Rotary, rotary_angles
from varkit.plans.raster import RasterConfig
from varkit.plans.schedule import Schedule
from varkit.plans.step import Step
from varkit.tokenizers.vq import VQConfig

SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
    "XXXL": (48, 2560, 40),
    "1B": (22, 2048, 32),
    "3B": (24, 3200, 32),
    "7B": (32, 4096, 32),
}
"""Published sizes: depth, width, heads."""


@dataclass(frozen=True)
class LlamaGenConfig:
    """Published sizes: `LlamaGenConfig.published`. hidden 0 means two thirds of 4 C rounded up to `multiple_of`.

    zero_prefix: rotate condition slots to zero, as the released weights expect: their queries and keys vanish, and the
    picture reads the condition by the mean of its values. Else they are left as they are.
    """

    depth: int
    width: int
    heads: int
    vocab_size: int
    condition: ClassConfig | TextConfig | TextFeaturesConfig
    kv_heads: int | None = None
    hidden: int = 0
    multiple_of: int = 256
    dropout: float = 0.0
    drop_path: float = 0.0
    zero_prefix: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "depth", "width", "heads", "vocab_size", "multiple_of")
        check_least(self, 0, "hidden")
        check_rates(self, "dropout", "drop_path")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise UserError(
                f"width {self.width} over {self.heads} heads does not give a head width that is a multiple of 4, "
                "which 2-D rotary positions need; change one of them"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise UserError(
                f"kv_heads is {self.kv_heads}; it must divide the {self.heads} heads, or be null for as many"
            )

    @classmethod
    def published(cls, size: str, **rest: Any) -> "LlamaGenConfig":
        """A published size by name (`SIZES`), of ImageNet's classes. Prompts have `TextFeaturesConfig(length=120)`."""
        if size not in SIZES:
            raise unknown_name("size", size, SIZES)
        depth, width, heads = SIZES[size]
        told: dict[str, Any] = {"vocab_size": 16384, "condition": ClassConfig(1000)}
        told |= {"zero_prefix": True, "dropout": 0.1}
        return cls(depth, width, heads, **(told | rest))

    @property
    def prefix(self) -> int:
        """P."""
        return 1 if isinstance(self.condition, ClassConfig) else self.condition.length

    @property
    def inner(self) -> int:
        """Hidden width of the feed-forward layers."""
        return self.hidden or llama_hidden(self.width, self.multiple_of)

    def fitted(self, tokenizer: VQConfig) -> dict[str, Any]:
        """Generator, and the head and plan beside it, for a tokenizer's codes and grid."""
        check_tokenizer(self, tokenizer, "vocab_size", "grid")
        config = replace(self, vocab_size=tokenizer.vocab_size)
        head = CategoricalConfig(config.width, tokenizer.vocab_size, bias=False, init_scale=0.0)
        plan = RasterConfig(Schedule.of(tokenizer.grid).last, config.prefix)
        return {"generator": config, "head": head, "plan": plan}

    def build(self) -> "LlamaGen":
        """The network, initialised as published."""
        return LlamaGen(self)


class LlamaGen(Generator):
    """`forward` takes {"ids": (B, L)} and returns (N, L, C); slots that show nothing hold the condition."""

    stacks = ("blocks",)

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config, self.width, self.depth = config, config.width, config.depth
        self.conditioner: Conditioner
        if isinstance(config.condition, ClassConfig):
            self.conditioner = ClassCondition(config.condition, config.width)
        else:
            self.conditioner = PrefixCondition(config.condition, config.width)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.embed_dropout = nn.Dropout(config.dropout)
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(
            LlamaBlock(config.width, config.heads, config.inner, config.kv_heads, config.dropout, rate)
            for rate in rates
        )
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.initialise()

    def prepare(self, condition: Condition) -> Prepared:
        branches, batch = next(iter(condition.values())).shape[:2]
        vector, memory, valid = self.conditioner({k: v.flatten(0, 1) for k, v in condition.items()})
        prepared = {"prefix": vector[:, None] if memory is None else memory}
        if valid is not None:
            prepared["hidden"] = ~valid
        return {k: v.unflatten(0, (branches, batch)) for k, v in prepared.items()}

    def forward(
        self,
        fed: dict[str, Tensor],
        step: Step,
        prepared: Prepared,
        window: Window,
        ports: Ports | None = None,
    ) -> Tensor:
        prefix = prepared["prefix"].flatten(0, 1)
        if "hidden" in prepared:
            window = window.narrow(prepared["hidden"].flatten(0, 1), step.feed.ids)
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
        blank = per_row(sent_once(step.feed.shows, h.device) < 0, 1, branches)
        at = per_row(sent_once(step.feed.ids, h.device), 1, branches).clamp(0, prefix.shape[1] - 1)
        start = (
            prefix[:, at] if at.ndim == 1 else prefix[torch.arange(len(prefix), device=h.device)[:, None], at]
        )
        return torch.where(blank[..., None], start, h)

    def _rotary(self, step: Step, branches: int, device: torch.device) -> Rotary:
        coords = per_row(sent_once(step.feed.coords, device), 2, branches)
        blank = None
        if self.config.zero_prefix:
            blank = per_row(sent_once(step.feed.shows, device) < 0, 1, branches)
        return Rotary(rotary_angles(coords, self.width // self.config.heads), blank)

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal of std 0.02 for every matrix and table; `CategoricalConfig(init_scale=0)` starts the head at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.conditioner.initialise()

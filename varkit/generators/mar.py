"""MAR: a masked autoencoder that predicts a vector for every unknown position (arXiv 2406.11838, Sec. 3).

The encoder sees the known tokens only, behind a buffer of condition slots; the decoder sees all slots, those of unknown
positions holding one mask token. A step feeds all slots, and those that show nothing are the unknown ones: that is all
that tells the two apart.
Legend: R branches, B samples, N = R x B, L slots, V slots the encoder keeps, C width, P buffer slots, D token width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varkit.devices import sent, sent_once
from varkit.errors import UserError, unknown_name
from varkit.generators.base import Condition, Generator, Prepared, check_tokenizer, per_row, rows
from varkit.generators.conditioning import ClassCondition, ClassConfig, TextCondition
from varkit.generators.sizes import check_heads, check_least, check_rates, check_ratio
from varkit.generators.text import TextConfig
from varkit.heads.diffusion import DiffusionConfig
from varkit.nn.attention import Packed, Window
from varkit.nn.linear import Linear
from varkit.nn.ports import Ports, port_at, through
from varkit.nn.vit import ViTBlock
from varkit.plans.masked import CONDITION, MaskedConfig
from varkit.plans.schedule import Schedule, Side
from varkit.plans.step import Slots, Step
from varkit.tokenizers.kl import KLConfig

SIZES = {"base": (12, 768, 12), "large": (16, 1024, 16), "huge": (20, 1280, 16)}
"""Blocks of encoder and decoder each, width and heads of the released sizes."""

HEADS = {"base": (6, 1024), "large": (8, 1280), "huge": (12, 1536)}
"""Depth and width of the heads beside them."""


@dataclass(frozen=True)
class MARConfig:
    """depth: blocks of the encoder, and as many of the decoder. grid: tokens. buffer: condition slots.

    dropout is that of both residual branches, attention_dropout that of the attention's probabilities.
    """

    depth: int
    width: int
    heads: int
    condition: ClassConfig | TextConfig
    grid: Side = 16
    channels: int = 16
    buffer: int = 64
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.grid, int):
            object.__setattr__(self, "grid", tuple(self.grid))
        Schedule.of(self.grid)
        check_least(self, 1, "depth", "width", "heads", "channels", "buffer")
        check_ratio(self)
        check_rates(self, "dropout", "attention_dropout")
        check_heads(self)
        if isinstance(self.condition, TextConfig) and self.condition.length > self.buffer:
            raise UserError(
                f"prompts of {self.condition.length} tokens do not fit a buffer of {self.buffer} slots; make the "
                "buffer as long"
            )

    @classmethod
    def published(cls, size: str, **rest: Any) -> "MARConfig":
        """A released size: "base", "large" or "huge"."""
        if size not in SIZES:
            raise unknown_name("size", size, SIZES)
        depth, width, heads = SIZES[size]
        return cls(depth, width, heads, **({"condition": ClassConfig(1000)} | rest))

    def fitted(self, tokenizer: KLConfig) -> dict[str, Any]:
        """Generator, and the head and plan beside it, for a tokenizer's tokens and grid.

        Widths of the published sizes get the published head, others one of the generator's width and depth 3. They
        begin sampling where a short training suffices.
        """
        check_tokenizer(self, tokenizer, "token_channels", "grid")
        config = replace(self, grid=tokenizer.grid, channels=tokenizer.token_channels)
        published = {width: HEADS[size] for size, (_, width, _) in SIZES.items()}
        depth, mlp_width = published.get(self.width, (3, self.width))
        grid = Schedule.of(tokenizer.grid).last
        return {
            "generator": config,
            "head": DiffusionConfig(self.width, config.channels, mlp_width, depth, noisiest=990),
            "plan": MaskedConfig(grid, min(64, grid[0] * grid[1]), self.buffer),
        }

    def build(self) -> "MAR":
        """The network, initialised as published."""
        return MAR(self)


def kept(slots: Slots, batch: int) -> Tensor:
    """(B, L) bool: the slots that the encoder keeps, those of the condition and those that show something."""
    keep = ((slots.segment == CONDITION) | (slots.shows >= 0)) & (slots.ids >= 0)
    return keep.expand(batch, -1)


def _taken(h: Tensor, at: Tensor) -> Tensor:
    """h (N, L, C) at slots (N, V), any of them at -1 -> (N, V, C)."""
    return h.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, h.shape[-1]))


class MAR(Generator):
    """`forward` takes {"latents": (B, L, D)} and returns (N, L, C).

    Layers 0 to depth - 1 are the encoder's, and their ports see (N, V, C), the slots of `kept` in order, with padding
    behind them where samples keep different numbers; the other layers are the decoder's. A prompt's words enter the
    first buffer slots, each beside the vector of the whole, which the others hold alone.
    """

    stacks = ("encoder", "decoder")

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config, self.width, self.depth = config, config.width, 2 * config.depth
        width, positions = config.width, Schedule.of(config.grid).total
        slots = config.buffer + positions
        if isinstance(config.condition, ClassConfig):
            self.conditioner = ClassCondition(config.condition, width)
        else:
            self.conditioner = TextCondition(config.condition, width)
            self.word = Linear(self.conditioner.memory_width, width)
        self.embed = Linear(config.channels, width)
        self.encoder_position = nn.Parameter(torch.empty(slots, width))
        self.norm_in = nn.LayerNorm(width, eps=1e-6)
        self.encoder, self.encoder_norm = self._blocks(), nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = Linear(width, width)
        self.mask = nn.Parameter(torch.empty(width))
        self.decoder_position = nn.Parameter(torch.empty(slots, width))
        self.decoder, self.decoder_norm = self._blocks(), nn.LayerNorm(width, eps=1e-6)
        self.output_position = nn.Parameter(torch.empty(positions, width))
        self.initialise()

    def _blocks(self) -> Sequence[ViTBlock]:
        c = self.config
        return nn.ModuleList(  # type: ignore[return-value]
            ViTBlock(c.width, c.heads, c.mlp_ratio, c.dropout, c.attention_dropout) for _ in range(c.depth)
        )

    def prepare(self, condition: Condition) -> Prepared:
        branches, batch = next(iter(condition.values())).shape[:2]
        vector, memory, mask = self.conditioner({k: v.flatten(0, 1) for k, v in condition.items()})
        buffer = vector[:, None].repeat(1, self.config.buffer, 1)
        if memory is not None and mask is not None:
            words = self.word(memory) * mask[..., None]
            buffer = torch.cat([buffer[:, : words.shape[1]] + words, buffer[:, words.shape[1] :]], dim=1)
        return {"buffer": buffer.unflatten(0, (branches, batch))}

    def forward(
        self,
        fed: dict[str, Tensor],
        step: Step,
        prepared: Prepared,
        window: Window,
        ports: Ports | None = None,
    ) -> Tensor:
        buffer, batch = prepared["buffer"].flatten(0, 1), len(fed["latents"])
        branches, device = len(buffer) // batch, buffer.device
        ids = per_row(sent_once(step.feed.ids, device), 1, branches).clamp(min=0)
        layout = fed if "place" in fed else self.layout(step.feed, batch)
        h = self._encode(self._embed(fed["latents"], step, buffer, ids), layout, step, prepared, ports)
        place = rows(sent(layout["place"], device), branches)
        h = torch.where((place < 0)[..., None], self.mask, _taken(self.decoder_embed(h), place))
        h = h + self.decoder_position[ids]
        h = self._through(self.decoder, self.config.depth, h, window, step, prepared, ports)
        h = self.decoder_norm(h) + self.output_position[(ids - self.config.buffer).clamp(min=0)]
        return through(ports, "output", 0, h, step, prepared)

    def _embed(self, latents: Tensor, step: Step, buffer: Tensor, ids: Tensor) -> Tensor:
        """(B, L, D) -> (N, L, C): tokens, or the buffer (N, P, C) in its slots, and where they stand."""
        branches = len(buffer) // len(latents)
        h = rows(self.embed(latents.to(self.embed.weight.dtype)), branches)
        condition = per_row(sent_once(step.feed.segment, h.device) == CONDITION, 1, branches)
        at = ids.clamp(max=self.config.buffer - 1)
        start = (
            buffer[:, at] if at.ndim == 1 else buffer[torch.arange(len(buffer), device=h.device)[:, None], at]
        )
        return torch.where(condition[..., None], start, h) + self.encoder_position[ids]

    def layout(self, slots: Slots, batch: int) -> dict[str, Tensor]:
        """The encoder's slots, `index` (B, V) and, if samples differ, `valid` (B, V); and `place` (B, L), where each
        slot is among them, or -1. `forward` makes it of the step, unless it is fed with the rest, as to a CUDA graph.
        """
        keep = kept(slots, batch)
        counts = keep.sum(dim=1)
        most = int(counts.max())
        index = keep.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        layout = {"index": index, "place": torch.where(keep, keep.cumsum(dim=1) - 1, -1)}
        if bool((counts == most).all()):
            return layout
        return layout | {"valid": torch.arange(most) < counts[:, None]}

    def _encode(
        self, h: Tensor, layout: dict[str, Tensor], step: Step, prepared: Prepared, ports: Ports | None
    ) -> Tensor:
        """(N, L, C) -> (N, V, C): the slots kept, which see each other and nothing else."""
        index, valid = layout["index"], layout.get("valid")
        branches = len(h) // len(index)
        h = _taken(h, rows(sent(index, h.device), branches))
        h = through(ports, "input", 0, self.norm_in(h), step, prepared)
        window = Packed(None, valid, branches)
        return self.encoder_norm(self._through(self.encoder, 0, h, window, step, prepared, ports))

    def _through(
        self, blocks: Sequence[ViTBlock], first: int, h: Tensor, window: Window, step: Step,
        prepared: Prepared, ports: Ports | None,
    ) -> Tensor:  # fmt: skip
        for layer, block in enumerate(blocks, first):
            h = block(h, window, layer, port=port_at(ports, "attention", layer, step, prepared))
            h = through(ports, "block", layer, h, step, prepared)
        return h

    @torch.no_grad()
    def initialise(self) -> None:
        """As published: Xavier for matrices, normal of std 0.02 for tables."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if isinstance(self.conditioner, TextCondition):
            self.conditioner.encoder.initialise()
        for table in (self.encoder_position, self.mask, self.decoder_position, self.output_position):
            nn.init.normal_(table, std=0.02)

"""Words or bytes to ids, and the small transformer that reads them: the text side of bundled and folder-trained models.

Published models read the features of a large encoder instead, which are given from outside (`TextFeaturesConfig`).
Id 0 is padding and 1 begins every prompt, so the empty prompt (the null condition) is a sequence of one.
Legend: N rows, T text length, C width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varkit.errors import UserError, unknown_name
from varkit.generators.sizes import check_least
from varkit.nn.adaln import FeedForward
from varkit.nn.attention import NoNorm, Packed, SelfAttention

PAD, BEGIN, FIRST = 0, 1, 2
BYTES = "bytes"


@dataclass(frozen=True)
class TextConfig:
    """vocabulary: "bytes", or the words a prompt may use. length: longest prompt in tokens, begin token included."""

    vocabulary: str | tuple[str, ...] = BYTES
    length: int = 32
    width: int = 128
    depth: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        check_least(self, 1, "length", "width", "heads", of="text ")
        check_least(self, 0, "depth", of="text ")
        if self.width % self.heads:
            raise UserError(
                f"text width {self.width} is not a multiple of its {self.heads} heads; change one of them"
            )
        if isinstance(self.vocabulary, str) and self.vocabulary != BYTES:
            raise UserError(f"text vocabulary {self.vocabulary!r} is neither {BYTES!r} nor a list of words")

    @property
    def size(self) -> int:
        """Number of ids."""
        return FIRST + (256 if isinstance(self.vocabulary, str) else len(self.vocabulary))

    def encode(self, prompts: list[str], tight: bool = False) -> Tensor:
        """Prompts -> (B, T) int64, padded with 0 at the end; T is `length`, so that any two runs can be merged.

        `tight` pads to the longest prompt instead, which makes training cheaper.
        Raises UserError for a word outside the vocabulary (naming the nearest) or a prompt that is too long.
        """
        rows = [[BEGIN, *self._ids(p)] for p in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.length:
                unit, most = "bytes" if self.vocabulary == BYTES else "words", self.length - 1
                raise UserError(
                    f"prompt {prompt[:60]!r} has {len(row) - 1} {unit}; this model reads at most {most}: shorten it"
                )
        out = torch.full((len(rows), max(map(len, rows)) if tight else self.length), PAD)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
        return out

    def _ids(self, prompt: str) -> list[int]:
        if isinstance(self.vocabulary, str):
            return [FIRST + b for b in prompt.encode()]
        index = {w: FIRST + i for i, w in enumerate(self.vocabulary)}
        words = re.findall(r"[^\s,.;:!?]+", prompt.lower())  # punctuation says nothing here
        for word in words:
            if word not in index:
                raise unknown_name("word", word, self.vocabulary, f"(in the prompt {prompt[:60]!r})")
        return [index[w] for w in words]


@dataclass(frozen=True)
class TextFeaturesConfig:
    """Features from outside, (N, T, width), of prompts of up to `length` tokens. The defaults are flan-t5-xl's."""

    width: int = 2048
    length: int = 512

    def __post_init__(self) -> None:
        check_least(self, 1, "width", "length", of="text ")

    def encode(self, prompts: list[str], tight: bool = False) -> Tensor:
        """Words alone do not do: their features have to be given."""
        raise UserError(
            f"prompt {prompts[0][:60]!r} cannot be read: this model takes features of {self.width} channels from a "
            "text encoder, not words; give --text-encoder or --embeddings, or in Python `Pipeline.with_text`"
        )

    def check(self, features: Tensor) -> None:
        """Raise `UserError` unless features (..., T, D) have the right width, and no prompt is too long."""
        tokens, width = features.shape[-2:]
        if width != self.width:
            raise UserError(
                f"text features of {width} channels do not fit this model, which takes {self.width}; use the text "
                "encoder that it was trained with"
            )
        if tokens > self.length:
            raise UserError(f"a prompt of {tokens} tokens is too long; this model reads up to {self.length}")


class TextEncoder(nn.Module):
    """Pre-norm transformer, bidirectional over the prompt: ids (N, T) -> memory (N, T, C), mask (N, T), pooled (N,
    C).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.size, config.width)
        self.position = nn.Parameter(torch.randn(config.length, config.width) * 0.02)
        blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.depth))
        self.blocks: Sequence[TextBlock] = blocks  # type: ignore[assignment]
        self.norm = nn.LayerNorm(config.width)

    @torch.no_grad()
    def initialise(self) -> None:
        """Truncated normal of std sqrt(1 / 3C) by its own width; projections into the residual over sqrt(2 depth)."""
        width = self.embed.weight.shape[1]
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=(1 / (3 * width)) ** 0.5)
        for block in self.blocks:
            block.attention.out.weight.div_((2 * len(self.blocks)) ** 0.5)
            block.ffn.down.weight.div_((2 * len(self.blocks)) ** 0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = ids != PAD
        x = self.embed(ids) + self.position[: ids.shape[1]]
        window = Packed(None, valid=mask)
        for layer, block in enumerate(self.blocks):
            x = block(x, window, layer)
        x = self.norm(x)
        weight = mask[..., None].to(x.dtype)
        return x, mask, (x * weight).sum(1) / weight.sum(1)


class TextBlock(nn.Module):
    """x += Attn(LN(x)); x += FFN(LN(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, NoNorm())
        self.ffn = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, window: Packed, layer: int) -> Tensor:
        x = x + self.attention(self.norm1(x), window, layer)
        return x + self.ffn(self.norm2(x))

"""Infinity's reading of a prompt (arXiv 2412.04431): features of a text encoder, pooled and projected.

    vector = pool(norm(t)),    memory = Linear(gelu(Linear(norm(t))))

The vector, from attention by one learned query, is the start token and steers every block; blocks attend to the memory.
Features are those of a large encoder (flan-t5-xl), computed beforehand, or of the small one trained with the generator.
Legend: N rows, T text length, D features of the encoder, C width.
"""

import torch
from torch import Tensor, nn

from varkit.generators.conditioning import ReadingCondition
from varkit.generators.text import TextConfig, TextFeaturesConfig
from varkit.nn.adaln import FeedForward
from varkit.nn.attention import AttentivePool


class PromptCondition(ReadingCondition):
    """Features or words -> vector (N, C), memory (N, T, C), mask (N, T).

    Features that ask for nothing are learned, one vector a place, as many as the prompt had.
    """

    def __init__(self, config: TextConfig | TextFeaturesConfig, width: int) -> None:
        super().__init__(config)
        self.null_features = None
        if isinstance(config, TextFeaturesConfig):
            self.null_features = nn.Parameter(torch.empty(config.length, config.width))
            nn.init.trunc_normal_(self.null_features, std=1.2 / config.width**0.5)
        self.memory_width = width
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.pool = AttentivePool(width, pool_heads(config.width, width), config.width)
        self.project = FeedForward(config.width, width, outputs=width)

    def forward(self, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        features, mask = self.read(condition)
        normed = self.norm(features.to(self.norm.weight.dtype))
        return self.pool(normed, mask), self.project(normed), mask

    def empty(self, features: Tensor, mask: Tensor) -> Tensor:
        assert self.null_features is not None
        return self.null_features[: features.shape[-2]].expand_as(features)


def pool_heads(features: int, width: int) -> int:
    """Heads of the pooling query, as published: one for each 128 features, or 64 in models wider than 4096."""
    return max(1, features // (64 if width > 4096 else 128))

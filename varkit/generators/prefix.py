"""LlamaGen's reading of a prompt (arXiv 2406.06525): its tokens are the first slots of the sequence.

    prefix = W2 gelu(W1 t),    no biases

However long a prompt is, the prefix has the same slots: padding stands on the left, hidden from all other slots, and
the last token stands next to the picture. Features are those of a large encoder (flan-t5-xl), computed beforehand, or
of the small one trained with the generator.
Legend: N rows, T text length, P prefix slots, D features of the encoder, C width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.generators.conditioning import ReadingCondition
from varkit.generators.text import TextConfig, TextFeaturesConfig
from varkit.nn.adaln import FeedForward


class PrefixCondition(ReadingCondition):
    """Features or words -> vector (N, C), prefix (N, P, C), mask (N, P).

    The vector is the last slot's, which the first prediction is read from. Padding may stand anywhere. Features that
    ask for nothing are fixed, one vector a slot: what they mean is learned by the two layers.
    """

    null_features: Tensor | None

    def __init__(self, config: TextConfig | TextFeaturesConfig, width: int) -> None:
        super().__init__(config)
        self.memory_width = width
        empty = None
        if isinstance(config, TextFeaturesConfig):
            empty = torch.randn(config.length, config.width) / config.width**0.5
        self.register_buffer("null_features", empty)
        self.project = FeedForward(config.width, width, outputs=width, bias=False)

    def forward(self, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        features, mask = self.read(condition)
        order = _to_the_right(mask)
        missing = self.config.length - mask.shape[1]
        features = features.to(self.project.up.weight.dtype).gather(1, order[..., None].expand_as(features))
        prefix = self.project(F.pad(features, (0, 0, missing, 0)))
        return prefix[:, -1], prefix, F.pad(mask.gather(1, order), (missing, 0))

    def empty(self, features: Tensor, mask: Tensor) -> Tensor:
        assert self.null_features is not None
        return self.null_features[_to_the_right(mask).argsort(dim=-1) + self.config.length - mask.shape[-1]]


def _to_the_right(mask: Tensor) -> Tensor:
    """(..., T) bool -> the order (..., T) that has padding first, and what is valid behind it, in its order."""
    return mask.int().argsort(dim=-1, stable=True)

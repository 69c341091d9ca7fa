"""Softmax over a vocabulary of codes: the head of VAR, LlamaGen and every id-based order.

Legend: R branches, B samples, T targets, C width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.heads.base import Ask, Head
from varkit.nn.linear import Linear


class CategoricalHead(Head):
    """Linear to V logits; sampling without a picker is arg-max. Guidance and probabilities are float32 in any dtype."""

    def __init__(self, width: int, vocab_size: int, bias: bool = True) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.out = Linear(width, vocab_size, bias=bias)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V)."""
        return self.out(h)

    def log_prob(self, h: Tensor, ids: Tensor) -> Tensor:
        """log p(ids), natural logarithm; h (..., C), ids (...) -> (...)."""
        return -F.cross_entropy(self.logits(h).float().flatten(0, -2), ids.flatten(), reduction="none").view(ids.shape)

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws: dict[str, Tensor] | None = None) -> Tensor:
        return -self.log_prob(h, targets["ids"])

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        logits = ask.combine(self.logits(h).float(), ask.progress)
        if ask.pick is None:
            return {"ids": torch.argmax(logits, dim=-1)}
        return ask.pick(logits, ask)

"""Infinity's bitwise head (arXiv 2412.04431, Sec. 3.3): d binary classifiers in place of one over 2^d codes.

Logits 2j and 2j + 1 are those of bit j being 0 and 1; bits are independent given the hidden state.
Legend: R branches, B samples, T targets, C width, D bits of a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.heads.base import Ask, Head
from varkit.nn.linear import Linear


@dataclass(frozen=True)
class BitsConfig:
    """A head of `bits` binary classifiers. init_scale: factor on a start of std sqrt(1 / 3C)."""

    width: int
    bits: int
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        for name in ("width", "bits"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def build(self) -> "BitsHead":
        """Make the head, freshly initialised."""
        return BitsHead(self)


class BitsHead(Head):
    """Linear to 2 D logits; sampling without a picker is arg-max. Probabilities are float32 in any dtype."""

    def __init__(self, config: BitsConfig) -> None:
        super().__init__()
        self.out = Linear(config.width, 2 * config.bits)
        nn.init.trunc_normal_(self.out.weight, std=(1 / (3 * config.width)) ** 0.5)
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            self.out.weight.mul_(config.init_scale)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., D, 2)."""
        return self.out(h).unflatten(-1, (-1, 2))

    def log_prob(self, h: Tensor, bits: Tensor) -> Tensor:
        """log p of each bit, natural logarithm; h (..., C), bits (..., D) -> (..., D)."""
        zero, one = self.logits(h).float().unbind(dim=-1)
        return F.logsigmoid((one - zero) * (2 * bits - 1))

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws: dict[str, Tensor] | None = None) -> Tensor:
        """Mean over a token's bits: h (B, T, C), bits (B, T, D) -> (B, T)."""
        return -self.log_prob(h, targets["bits"].long()).mean(dim=-1)

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        logits = ask.combine(self.logits(h).float(), ask.progress)
        if ask.pick is None:
            return {"bits": logits.argmax(dim=-1)}
        return {"bits": ask.pick(logits, ask)["ids"]}

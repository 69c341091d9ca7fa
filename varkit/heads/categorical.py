"""Softmax over a vocabulary of codes: the head of VAR, LlamaGen and every id-based order.

Legend: R branches, B samples, T targets, C width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.heads.base import Ask, Head
from varkit.nn.linear import Linear

ROWS = 1024
"""Rows whose logits become losses at a time on a CPU, so that float32 copies of all are never made. For 4160 rows and
V = 4096 on one Zen 4 core, in bfloat16: 180 ms instead of 328, the linear included. Fewer would be 7 % faster, but
the weight's gradient is summed over the parts in bfloat16."""


@dataclass(frozen=True)
class CategoricalConfig:
    """A softmax head: hidden width -> vocabulary.

    init_scale: factor on a start of std sqrt(1 / 3C); 0.02 is VAR's, 0 is LlamaGen's.
    """

    width: int
    vocab_size: int
    bias: bool = True
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("vocab_size", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def build(self) -> "CategoricalHead":
        """Make the head, freshly initialised."""
        return CategoricalHead(self.width, self.vocab_size, self.bias, self.init_scale)


class CategoricalHead(Head):
    """Linear to V logits; sampling without a picker is arg-max. Guidance and probabilities are float32 in any dtype."""

    compilable = ("row_losses",)

    def __init__(self, width: int, vocab_size: int, bias: bool = True, init_scale: float = 0.02) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.out = Linear(width, vocab_size, bias=bias)
        nn.init.trunc_normal_(self.out.weight, std=(1 / (3 * width)) ** 0.5)
        with torch.no_grad():
            self.out.weight.mul_(init_scale)
        if bias:
            nn.init.zeros_(self.out.bias)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., C) -> (..., V)."""
        return self.out(h)

    def log_prob(self, h: Tensor, ids: Tensor) -> Tensor:
        """log p(ids), natural logarithm; h (..., C), ids (...) -> (...)."""
        most = ROWS if h.device.type == "cpu" else max(1, ids.numel())
        rows = zip(h.flatten(0, -2).split(most), ids.flatten().split(most), strict=True)
        return -torch.cat([self.row_losses(x, y) for x, y in rows]).view(ids.shape)

    def row_losses(self, h: Tensor, ids: Tensor) -> Tensor:
        """-log p(ids) of a few rows, h (N, C), ids (N,) -> (N,)."""
        return F.cross_entropy(self.logits(h).float(), ids, reduction="none")

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws: dict[str, Tensor] | None = None) -> Tensor:
        return -self.log_prob(h, targets["ids"])

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        logits = ask.combine(self.logits(h).float(), ask.progress)
        if ask.pick is None:
            return {"ids": torch.argmax(logits, dim=-1)}
        return ask.pick(logits, ask)

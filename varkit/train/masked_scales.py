"""What HMAR's two branches are taught (arXiv 2506.04421): whole scales, then masked tokens within scales.

The second lesson masks ceil(p n) tokens of every scale but the first, with one p from U(0, 1) a batch; which ones is
drawn for each sample, where the released code masks all samples alike. The loss is the plain mean over masked tokens.
Legend: B batch, L positions, T masked.
"""

import math
from typing import Any

import torch
from torch import Tensor

from varkit.plans.refined import RefinedPlan
from varkit.tokenizers.base import Latents, Tokenizer
from varkit.train.lessons import Lesson
from varkit.train.scale_weights import WeighedScales

HELD_OUT_SEED, HELD_OUT_SHARE = 0, 0.5


class FirstGuesses(WeighedScales):
    """The main branch: every scale whole, weighed."""

    def __init__(self, tokenizer: Tokenizer, plan: RefinedPlan, weights: str = "lognorm") -> None:
        super().__init__(tokenizer, plan.scales, weights)


class MaskedScales:
    """The refining branch. Held-out losses are measured with half of the tokens masked, always the same ones."""

    def __init__(self, tokenizer: Tokenizer, plan: RefinedPlan) -> None:
        self.tokenizer, self.plan, self.schedule = tokenizer, plan, plan.schedule
        self.settings: dict[str, Any] = {"kind": type(self).__name__}

    def lesson(self, latents: Latents, step: int | None = None) -> Lesson:
        """Masks drawn from torch's generator; with no step, those of held-out losses."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED) if step is None else None
        share = HELD_OUT_SHARE if step is None else torch.rand((), dtype=torch.float64).item()
        canvas = self.tokenizer.canvas(len(next(iter(latents.values()))))
        canvas.fill(latents)
        masked = self.masked(canvas.batch, share, generator)
        return Lesson(canvas, self.plan.masked(masked), canvas.latents(), masked.shape[1])

    def masked(self, batch: int, share: float, generator: torch.Generator | None = None) -> Tensor:
        """Positions to mask, (B, T): in each scale but the first, `share` of it, rounded up."""
        chosen = []
        for level, n in enumerate(self.schedule.lengths):
            if level > 0:
                order = torch.rand(batch, n, generator=generator).argsort(dim=1)
                chosen.append(order[:, : max(1, math.ceil(share * n))] + self.schedule.offsets[level])
        return torch.cat(chosen, dim=1)

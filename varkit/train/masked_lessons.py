"""What a masked generator is taught (MAR, arXiv 2406.11838): predict the masked tokens from those that are left.

One share of masked tokens a batch, from a normal around 1 cut to [0.7, 1]: mostly very many, as decoding begins. The
order, of which the first tokens are masked, is each sample's own. Legend: B batch, L positions, T masked, M repeats.
"""

import math
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.masked import MaskedPlan
from varkit.tokenizers.base import Latents, Tokenizer
from varkit.train.lessons import Lesson

HELD_OUT_SEED = 0


class MaskedLessons:
    """least: the smallest share masked. deviation: of the normal, whose mean is 1.

    Held-out losses are measured at the median share, over orders, times and noise that are always the same; the head
    then takes one time a token.
    """

    def __init__(
        self, tokenizer: Tokenizer, plan: MaskedPlan, least: float = 0.7, deviation: float = 0.25
    ) -> None:
        if not 0 < least <= 1 or deviation <= 0:
            raise UserError(
                f"masks of at least {least} with deviation {deviation} cannot be; least is above 0 and at most 1, "
                "the deviation above 0"
            )
        self.tokenizer, self.plan, self.least, self.deviation = tokenizer, plan, least, deviation
        self.settings: dict[str, Any] = {
            "kind": type(self).__name__,
            "least": least,
            "deviation": deviation,
        }

    def ratio(self, uniform: float) -> float:
        """The share of tokens masked that a uniform number in [0, 1] stands for."""
        lowest = _normal_cdf((self.least - 1) / self.deviation)
        below = torch.tensor(lowest + uniform * (0.5 - lowest), dtype=torch.float64)
        return min(1.0, max(self.least, 1 + self.deviation * torch.special.ndtri(below).item()))

    def lesson(self, latents: Latents, step: int | None = None) -> Lesson:
        """Masks drawn from torch's generator; with no step, those of held-out losses."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED) if step is None else None
        values = latents["latents"]
        batch, positions = values.shape[:2]
        share = 0.5 if step is None else torch.rand((), dtype=torch.float64).item()
        masked = math.ceil(positions * self.ratio(share))
        target = torch.rand(batch, positions, generator=generator).argsort(dim=1)[:, :masked]
        known = torch.ones(batch, positions, dtype=torch.bool).scatter_(1, target, False)
        canvas = self.tokenizer.canvas(batch)
        canvas.fill(latents)
        draws = None if generator is None else self._draws(generator, (batch, masked, 1), values.shape[-1])
        return Lesson(canvas, self.plan.step(known, target), canvas.latents(), masked, draws=draws)

    def _draws(
        self, generator: torch.Generator, shape: tuple[int, int, int], channels: int
    ) -> dict[str, Tensor]:
        noise = torch.randn(*shape, channels, generator=generator)
        return {"times": torch.rand(shape, generator=generator), "noise": noise}


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))

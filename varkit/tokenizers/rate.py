"""Entropy-constrained choice of codes (Chou, Lookabaugh and Gray 1989): a rare code must be worth its bits.

The nearest code spends the vocabulary evenly, also where the choice hardly shows in the picture, and a generator then
has to learn what is noise. Here level k takes the code that minimises

    |x - c|^2 + lambda_k * -ln p_k(c),    lambda_k = slope * 2 / D * mean |x - c|^2

with p_k the running frequency of the codes and the mean running too. slope 1 is the trade-off of a Gaussian source (its
distortion is proportional to exp(-2 R / D), so -dD/dR = 2 D / dimensions); 0 is the plain nearest code. Decoding does
not know of it: any ids are legal.
Legend: V codes, D channels of a code, K levels, n positions of a level.
"""

import torch
from torch import Tensor, nn

DECAY = 0.99
FLOOR = 1e-3
"""Share of the frequencies that is spread evenly, so that an unused code stays within reach."""


class CodeRates(nn.Module):
    """Running code frequencies (K, V) and distortions (K,): what each code costs at each level."""

    frequency: Tensor
    distortion: Tensor

    def __init__(self, levels: int, vocab_size: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.register_buffer("frequency", torch.full((levels, vocab_size), 1 / vocab_size))
        self.register_buffer("distortion", torch.zeros(levels))

    def cost(self, level: int, levels: int, channels: int) -> Tensor:
        """What choosing each code adds to its squared distance at `level` of a schedule of `levels`, (V,)."""
        k = self._row(level, levels)
        p = torch.lerp(
            self.frequency[k], torch.full_like(self.frequency[k], 1 / self.frequency.shape[1]), FLOOR
        )
        return p.log() * (-self.slope * 2 / channels * self.distortion[k])

    @torch.no_grad()
    def update(self, level: int, levels: int, ids: Tensor, errors: Tensor) -> None:
        """Learn from the ids (B, n) chosen at a level and their squared errors (B, n); for training."""
        k = self._row(level, levels)
        mean = errors.mean()
        fresh = self.distortion[k] == 0
        self.distortion[k] = torch.where(fresh, mean, torch.lerp(mean, self.distortion[k], DECAY))
        counts = torch.bincount(ids.flatten(), minlength=self.frequency.shape[1])
        self.frequency[k].lerp_(counts / ids.numel(), 1 - DECAY)

    def _row(self, level: int, levels: int) -> int:
        """Another schedule's level takes the statistics of the level at the same share of the way."""
        known = len(self.distortion)
        return level if levels == known else round(level / max(1, levels - 1) * (known - 1))

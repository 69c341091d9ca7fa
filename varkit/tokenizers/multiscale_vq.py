"""VAR's multi-scale residual VQ tokenizer (arXiv 2404.02905): an image as a pyramid of id maps.

One codebook serves all levels. With f the encoder's features and f_hat_0 = 0, level k quantises what is
still missing:

    ids_k = nearest(area(f - f_hat_k-1)),    f_hat_k = f_hat_k-1 + phi_k(bicubic(codebook[ids_k]))

(what levels of a residual pyramid share is in varkit/tokenizers/residual.py).
Legend: B batch, H W image, h w latent grid, D code channels, V codes, K levels, L positions, n positions of
a level.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.codebook import Codebook
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.rate import CodeRates
from varkit.tokenizers.residual import IdsQuantizer, Quantized, QuantizedTokenizer, ResidualQuantizer

if TYPE_CHECKING:
    from varkit.canvases.base import Canvas


def phi_index(level: int, levels: int, phis: int) -> int:
    """Which of `phis` convolutions serves `level` of `levels`: the nearest of ticks spread over [0, 1].

    Ties are decided by float64 rounding (10 levels and 4 phis have two), so the arithmetic is the published
    one.
    """
    edge = 1 / (3 * phis) if phis == 4 else 1 / (2 * phis)
    ticks = np.linspace(edge, 1 - edge, phis)
    return int(np.argmin(np.abs(ticks - (level / (levels - 1) if levels > 1 else 0.0))))


class Phi(nn.Conv2d):
    """phi(x) = (1 - ratio) x + ratio conv(x): repairs what upsampling a coarse map blurs."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            assert self.bias is not None
            conv = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)
        return (1 - self.ratio) * x + self.ratio * conv


class MultiScaleQuantizer(IdsQuantizer, ResidualQuantizer):
    """Features (B, D, h, w) <-> ids (B, L). `phis` convolutions are shared by the levels; 0 does without.

    With `rates` a code's frequency counts in the choice, not only its distance.
    """

    def __init__(
        self,
        codebook: Codebook,
        phis: int,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        rates: CodeRates | None = None,
    ) -> None:
        super().__init__()
        self.embedding = codebook
        self.beta = beta
        self.rates = rates
        channels = codebook.weight.shape[1]
        self.phis = nn.ModuleList(Phi(channels, phi_ratio) for _ in range(phis))

    def zeros(self, batch: int, schedule: Schedule) -> Tensor:
        """f_hat before any level, (B, D, h, w)."""
        return self.codebook.new_zeros(batch, self.codebook.shape[1], *schedule.last)

    def accumulate(self, f_hat: Tensor, level: int, codes: Tensor, schedule: Schedule) -> Tensor:
        """Add one level's codes (B, n, D) to f_hat (B, D, h, w); returns the new f_hat."""
        h = codes.mT.reshape(len(codes), -1, *schedule.sides[level])
        if schedule.sides[level] != schedule.last:
            h = F.interpolate(h, schedule.last, mode="bicubic")
        if self.phis:
            h = self.phis[phi_index(level, len(schedule), len(self.phis))](h)
        return f_hat + h

    def choose(self, residual: Tensor, level: int, schedule: Schedule) -> Tensor:
        """The codes of a level for what is missing there: residual (B, n, D) -> ids (B, n)."""
        if self.rates is None:
            return self.embedding.nearest(residual)
        return self.embedding.nearest(residual, self.rates.cost(level, len(schedule), residual.shape[-1]))

    def next_input(self, f_hat: Tensor, level: int, schedule: Schedule) -> Tensor:
        """What a generator is fed at `level`: the sum of the levels before it, (B, n, D)."""
        return self._area(f_hat, schedule.sides[level])

    def missing(self, rest: Tensor, level: int, schedule: Schedule) -> Tensor:
        """What is not yet there, (B, D, h, w), at a level's grid: (B, n, D)."""
        return self._area(rest, schedule.sides[level])

    def forward(self, f: Tensor, schedule: Schedule) -> Quantized:
        """Quantise for training: gradients pass straight through to f; codes and phis learn from the loss."""
        f = self.check(f, schedule)
        f_hat = self.zeros(len(f), schedule)
        loss = f.new_zeros(())
        ids, residuals = [], []
        for level in range(len(schedule)):
            goal = self.goal(f, level, schedule)
            target = goal.detach()
            residuals.append(self.missing(target - f_hat.detach(), level, schedule))
            ids.append(self.choose(residuals[-1], level, schedule))
            codes = self.lookup(ids[-1])
            if self.rates is not None and self.training:
                errors = (residuals[-1] - codes.detach()).square().sum(-1)
                self.rates.update(level, len(schedule), ids[-1], errors)
            f_hat = self.accumulate(f_hat, level, codes, schedule)
            loss = loss + self.beta * F.mse_loss(f_hat.detach(), goal) + F.mse_loss(f_hat, target)
        return Quantized(
            features=f + (f_hat - f).detach(),
            loss=loss / len(schedule),
            chosen=torch.cat(ids, 1),
            residuals=torch.cat(residuals, 1),
        )

    @torch.no_grad()
    def initialize_codebook(self, f: Tensor, schedule: Schedule, generator: torch.Generator) -> None:
        """Replace the codes by residual vectors of f (B, D, h, w), from each level in proportion to its size.

        Level by level, each with the codes drawn so far, so that fine levels start from true residuals.
        """
        f = self.check(f, schedule)
        f_hat = self.zeros(len(f), schedule)
        weight = self.embedding.weight
        ends = [len(weight) * offset // schedule.total for offset in schedule.offsets]
        for level in range(len(schedule)):
            vectors = self.missing(self.goal(f, level, schedule) - f_hat, level, schedule)
            rows = vectors.flatten(0, 1)
            start, end = ends[level], ends[level + 1]
            # Each vector once before any comes again: twin codes would never part.
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            chosen = order[torch.arange(end - start, device=rows.device) % len(rows)]
            weight[start:end] = rows[chosen].to(weight.dtype)
            f_hat = self.accumulate(f_hat, level, self.lookup(self.embedding.nearest(vectors)), schedule)

    @staticmethod
    def _area(f: Tensor, side: tuple[int, int]) -> Tensor:
        if tuple(f.shape[2:]) != side:
            f = F.interpolate(f, side, mode="area")
        return f.flatten(2).mT


@dataclass(frozen=True)
class MultiScaleVQConfig:
    """The defaults are VAR's published tokenizer (108.9M parameters, stride 16).

    `phi_sharing`: 0 one phi for each level, 1 one for all, n partially shared. `rate`: how much the frequency of a code
    counts in the choice (`varkit.tokenizers.rate`), 0 not at all. `encoder`: a patch-wise one in place of `conv`'s.
    """

    conv: ConvConfig = ConvConfig()
    vocab_size: int = 4096
    code_channels: int = 32
    schedule: tuple[Side, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    phi_sharing: int = 4
    phi_ratio: float = 0.5
    beta: float = 0.25
    rate: float = 0.0
    encoder: PatchEncoderConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "schedule", tuple(s if isinstance(s, int) else tuple(s) for s in self.schedule)
        )
        Schedule.parse(self.schedule)
        for name, least in (("vocab_size", 2), ("code_channels", 1), ("phi_sharing", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.rate < 0:
            raise UserError(
                f"rate {self.rate} is below 0; 0 chooses by distance alone, 1 is a usual trade-off"
            )
        if not 0 <= self.phi_ratio <= 1:
            raise UserError(f"phi_ratio {self.phi_ratio} is outside [0, 1]; 0.5 is VAR's")

    @property
    def phis(self) -> int:
        """Convolutions after upsampling."""
        return self.phi_sharing or len(self.schedule)

    def quantizer(self) -> MultiScaleQuantizer:
        """The quantizer, its codes drawn anew."""
        return MultiScaleQuantizer(
            Codebook(self.vocab_size, self.code_channels),
            phis=self.phis,
            phi_ratio=self.phi_ratio,
            beta=self.beta,
            rates=CodeRates(len(self.schedule), self.vocab_size, self.rate) if self.rate else None,
        )

    def build(self) -> "MultiScaleVQ":
        """Make the tokenizer, freshly initialised."""
        return MultiScaleVQ(self)


class MultiScaleVQ(QuantizedTokenizer):
    """VAR's tokenizer, and NFIG's: images <-> ids (B, L) over a pyramid."""

    quantizer: MultiScaleQuantizer

    def __init__(self, config: MultiScaleVQConfig) -> None:
        super().__init__(
            config.conv,
            config.quantizer(),
            Schedule.parse(config.schedule),
            config.code_channels,
            kernel=3,
            encoder=config.encoder,
        )
        self.config = config

    def canvas(self, batch: int, schedule: Schedule | None = None) -> "Canvas":
        from varkit.canvases.pyramid import PyramidCanvas

        return PyramidCanvas(self.quantizer, batch, schedule or self.schedule, show=self.decode_features)

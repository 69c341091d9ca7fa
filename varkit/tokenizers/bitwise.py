"""Infinity's bitwise tokenizer (arXiv 2412.04431): a residual pyramid of signs, so 2^d codes cost nothing to store.

Multi-scale binary spherical quantisation (BSQ, arXiv 2406.07548): at each level what is still missing becomes

    z = r / |r|,    bit = z > 0,    q = +-1 / sqrt(d)   (a unit vector, as z is)

The magnitude is never coded: each level adds a unit vector to each of its positions. Levels are brought to the finest
grid bilinearly, and residuals to a level's grid by their mean over areas. The 8B model folds 2 x 2 positions of the
features into one token of 4 d bits (`patch`).
Legend: B batch, H W image, d bits of a code, p patch, D = d p^2 bits of a token, h w grid of the features, K levels,
L positions, n positions of a level.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.base import Latents
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.residual import Quantized, QuantizedTokenizer, ResidualQuantizer

if TYPE_CHECKING:
    from varkit.canvases.base import Canvas

SHARPNESS = 100.0
"""Inverse temperature of the soft bits in the entropy penalty (published)."""

TINY = 1e-6
"""Where the frequency of a bit is cut, so that the entropy's gradient stays finite."""


class BitwiseQuantizer(ResidualQuantizer):
    """Features (B, d, h, w) <-> bits (B, L, D) uint8; nothing in it is learned.

    entropy, commitment and pull weigh the training loss; codes and what a generator is fed have D channels, f_hat d.
    """

    latent = "bits"
    unit: Tensor

    def __init__(
        self, bits: int, patch: int = 1, entropy: float = 0.1, commitment: float = 0.25, pull: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = None
        self.bits, self.patch = bits, patch
        self.entropy, self.commitment, self.pull = entropy, commitment, pull
        self.register_buffer("unit", torch.tensor(bits**-0.5), persistent=False)

    @property
    def token_bits(self) -> int:
        """D."""
        return self.bits * self.patch**2

    def empty(self, batch: int, positions: int) -> Tensor:
        """Bits (B, L, D), all 0."""
        return torch.zeros(batch, positions, self.token_bits, dtype=torch.uint8, device=self.unit.device)

    def lookup(self, chosen: Tensor) -> Tensor:
        """Bits (B, n, D) -> codes (B, n, D) of +-1 / sqrt(d)."""
        return torch.where(chosen > 0, self.unit, -self.unit)

    def choose(self, residual: Tensor, level: int, schedule: Schedule) -> Tensor:
        """Signs: (B, n, D) -> bits (B, n, D)."""
        return (residual > 0).to(torch.uint8)

    def zeros(self, batch: int, schedule: Schedule) -> Tensor:
        """f_hat before any level, (B, d, h, w)."""
        return self.unit.new_zeros(batch, self.bits, *self._grid(schedule, -1))

    def accumulate(self, f_hat: Tensor, level: int, codes: Tensor, schedule: Schedule) -> Tensor:
        """Add one level's codes (B, n, D) to f_hat (B, d, h, w); returns the new f_hat."""
        folded = codes.mT.reshape(len(codes), -1, *schedule.sides[level])
        return f_hat + self._resized(F.pixel_shuffle(folded, self.patch), schedule, -1, "bilinear")

    def next_input(self, f_hat: Tensor, level: int, schedule: Schedule) -> Tensor:
        """What a generator is fed at `level`: the sum of the levels before it, (B, n, D)."""
        return self._fold(self._resized(f_hat, schedule, level, "bilinear"))

    def missing(self, rest: Tensor, level: int, schedule: Schedule) -> Tensor:
        """What is not yet there, (B, d, h, w), at a level's grid: (B, n, D)."""
        return self._fold(self._resized(rest, schedule, level, "area"))

    def forward(self, f: Tensor, schedule: Schedule) -> Quantized:
        """Quantise for training; gradients pass each level's signs straight through to the unit vector z."""
        f = self.check(f, schedule)
        f_hat, loss = self.zeros(len(f), schedule), f.new_zeros(())
        bits, residuals = [], []
        for level in range(len(schedule)):
            rest = self.goal(f, level, schedule) - f_hat.detach()
            z = F.normalize(self._resized(rest, schedule, level, "area"), dim=1)
            q = torch.where(z > 0, self.unit, -self.unit)
            f_hat = f_hat + self._resized(z + (q - z).detach(), schedule, -1, "bilinear")
            loss = loss + self._loss(z, q)
            if self.pull:
                gap = self.goal(f, level, schedule) - f_hat.detach()
                loss = loss + self.pull * gap.square().sum(dim=1).mean()
            residuals.append(self._fold(z))
            bits.append(self.choose(residuals[-1], level, schedule))
        return Quantized(f_hat, loss / len(schedule), torch.cat(bits, 1), torch.cat(residuals, 1))

    def statistics(self, schedule: Schedule) -> "BitStatistics":
        """An empty count of bits."""
        return BitStatistics(self.token_bits, schedule)

    def _loss(self, z: Tensor, q: Tensor) -> Tensor:
        """Commitment |z - q|^2, and the entropy penalty: each position sure of its bits, all together even."""
        logits = 4 * SHARPNESS * self.unit * z
        p = torch.sigmoid(logits)
        # By its logits the entropy has a gradient also where p has become 0 or 1.
        unsure = (F.softplus(logits) - logits * p).sum(dim=1).mean()
        even = _entropy(p.mean(dim=(0, 2, 3)).clamp(TINY, 1 - TINY)).sum()
        return self.commitment * (z - q).square().sum(dim=1).mean() + self.entropy * (unsure - even)

    def _grid(self, schedule: Schedule, level: int) -> tuple[int, int]:
        h, w = schedule.sides[level]
        return h * self.patch, w * self.patch

    def _resized(self, x: Tensor, schedule: Schedule, level: int, mode: str) -> Tensor:
        """x (B, d, ...) at the grid of a level's features (-1: the finest)."""
        grid = self._grid(schedule, level)
        return x if x.shape[2:] == grid else F.interpolate(x, grid, mode=mode)

    def _fold(self, x: Tensor) -> Tensor:
        """(B, d, h, w) -> (B, n, D): p x p positions in one token, in the order c p^2 + dy p + dx."""
        return F.pixel_unshuffle(x, self.patch).flatten(2).mT


def _entropy(p: Tensor) -> Tensor:
    """Of a bit that is 1 with probability p, in nats."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


class BitStatistics:
    """How often each bit was 1 at each level: a bit that never changes is wasted."""

    def __init__(self, bits: int, schedule: Schedule) -> None:
        self.schedule = schedule
        self.ones = torch.zeros(len(schedule), bits, dtype=torch.int64)
        self.items = 0

    def update(self, chosen: Tensor) -> None:
        """Count bits (B, L, D)."""
        self.items += len(chosen)
        self.ones.index_add_(0, self.schedule.level_of, chosen.long().sum(dim=0).cpu())

    def entropy(self, level: int | None = None) -> float:
        """Mean entropy of a bit, from 0 to 1, at one level or over all positions."""
        counts = self.items * torch.tensor(self.schedule.lengths)
        p = self.ones.sum(0) / counts.sum() if level is None else self.ones[level] / counts[level]
        return _entropy(p.double()).mean().item() / math.log(2)

    def metrics(self) -> dict[str, float]:
        """Entropy of all levels, and of each."""
        levels = {f"bit_entropy_{k}": self.entropy(k) for k in range(len(self.schedule))}
        return {"bit_entropy": self.entropy(), **levels}


@dataclass(frozen=True)
class BitwiseConfig:
    """The defaults are Infinity's tokenizer of 32 bits a token (110M parameters, stride 16).

    A code has as many bits as the convolutions have latent channels. `patch` folds patch x patch positions into a
    token. The released ones of 2, 8 and 20 billion parameters: `BitwiseConfig.published`.

    entropy and commitment weigh the paper's losses, which see directions alone: features may grow beyond what unit
    codes add up to, and then most levels repeat the signs of the first. pull weighs the squared distance of the
    features from the sum of codes after each level (ours; VAR's commitment).
    """

    conv: ConvConfig = ConvConfig(128, (1, 2, 4, 4, 4), latent_channels=32, attention=False)
    schedule: tuple[Side, ...] = (1, 2, 4, 6, 8, 12, 16)
    patch: int = 1
    entropy: float = 0.1
    commitment: float = 0.25
    pull: float = 0.0
    encoder: PatchEncoderConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "schedule", tuple(s if isinstance(s, int) else tuple(s) for s in self.schedule)
        )
        Schedule.parse(self.schedule)
        if self.patch < 1:
            raise UserError(
                f"patch {self.patch} is below 1; 1 gives each position of the features its own token"
            )
        for name in ("entropy", "commitment", "pull"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be >= 0 (0 switches it off)")

    @classmethod
    def published(cls, bits: int, schedule: tuple[Side, ...], patch: int = 1) -> "BitwiseConfig":
        """A released tokenizer: 16, 24, 32 or 64 bits at stride 16, or 14 at stride 8, of which `patch` 2 makes 56."""
        multipliers = (1, 2, 4, 4, 4) if patch == 1 else (1, 2, 4, 4)
        return cls(ConvConfig(128, multipliers, latent_channels=bits, attention=False), schedule, patch)

    @property
    def token_bits(self) -> int:
        """Bits of a token."""
        return self.conv.latent_channels * self.patch**2

    def build(self) -> "Bitwise":
        """Make the tokenizer, freshly initialised."""
        return Bitwise(self)


class Bitwise(QuantizedTokenizer):
    """Infinity's tokenizer: images <-> bits (B, L, D) over a pyramid."""

    quantizer: BitwiseQuantizer

    def __init__(self, config: BitwiseConfig) -> None:
        bits = config.conv.latent_channels
        quantizer = BitwiseQuantizer(bits, config.patch, config.entropy, config.commitment, config.pull)
        schedule = Schedule.parse(config.schedule)
        super().__init__(config.conv, quantizer, schedule, bits, kernel=0, encoder=config.encoder)
        self.config = config
        self.stride = config.conv.stride * config.patch

    @torch.no_grad()
    def training_latents(self, images: Tensor) -> Latents:
        """Bits (B, L, D), and the features (B, h w, d) that self-correction quantises again."""
        f = self.encode_features(images)
        return {"bits": self.quantizer.encode(f, self.schedule), "features": f.flatten(2).mT}

    def canvas(self, batch: int, schedule: Schedule | None = None) -> "Canvas":
        from varkit.canvases.pyramid import PyramidCanvas

        return PyramidCanvas(self.quantizer, batch, schedule or self.schedule, show=self.decode_features)

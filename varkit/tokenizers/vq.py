"""Single-scale VQ tokenizer: an image as one grid of ids (VQGAN, arXiv 2012.09841; LlamaGen, 2406.06525).

It is the residual quantizer at a schedule of one level without phi. LlamaGen's version has few code
channels, and puts features and codes on the unit sphere, which keeps a large codebook in use.
Legend: B batch, h w latent grid, L = h w positions, D code channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.codebook import Codebook
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleQuantizer
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.rate import CodeRates
from varkit.tokenizers.residual import QuantizedTokenizer

if TYPE_CHECKING:
    from varkit.canvases.base import Canvas


@dataclass(frozen=True)
class VQConfig:
    """The defaults are LlamaGen's VQ-16 (71.9M parameters); its VQ-8 has multipliers (1, 2, 2, 4).

    `rate`: how much the frequency of a code counts in the choice (`varkit.tokenizers.rate`), 0 not at all. `encoder`: a
    patch-wise one in place of `conv`'s.
    """

    conv: ConvConfig = ConvConfig(channels=128, latent_channels=256)
    vocab_size: int = 16384
    code_channels: int = 8
    grid: Side = 16
    normalize: bool = True
    beta: float = 0.25
    rate: float = 0.0
    encoder: PatchEncoderConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.grid, int):
            object.__setattr__(self, "grid", tuple(self.grid))
        Schedule.of(self.grid)
        for name, least in (("vocab_size", 2), ("code_channels", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.rate < 0:
            raise UserError(
                f"rate {self.rate} is below 0; 0 chooses by distance alone, 1 is a usual trade-off"
            )

    def build(self) -> "VQ":
        """Make the tokenizer, freshly initialised."""
        return VQ(self)


class VQ(QuantizedTokenizer):
    """Images <-> ids (B, L) over one grid."""

    quantizer: MultiScaleQuantizer

    def __init__(self, config: VQConfig) -> None:
        codebook = Codebook(config.vocab_size, config.code_channels, config.normalize)
        rates = CodeRates(1, config.vocab_size, config.rate) if config.rate else None
        quantizer = MultiScaleQuantizer(codebook, phis=0, beta=config.beta, rates=rates)
        schedule = Schedule.of(config.grid)
        super().__init__(
            config.conv, quantizer, schedule, config.code_channels, kernel=1, encoder=config.encoder
        )
        self.config = config

    def encode_features(self, images: Tensor, schedule: Schedule | None = None) -> Tensor:
        f = super().encode_features(images, schedule)
        return F.normalize(f, dim=1) if self.config.normalize else f

    def canvas(self, batch: int, schedule: Schedule | None = None) -> "Canvas":
        from varkit.canvases.grid import GridCanvas

        schedule = schedule or self.schedule
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"ids": ((), torch.int64)}
        return GridCanvas.empty(
            batch,
            schedule.total,
            fields,
            show=lambda latents: self.decode(latents, schedule),
            device=self.quantizer.codebook.device,
        )

"""KL autoencoder: an image as one grid of continuous vectors (LDM, arXiv 2112.10752; KL-16 of MAR, 2406.11838).

The encoder gives mean and log variance of a normal at each position; latents are its mean, or a draw, times a scale
that gives them unit deviation, which every head over them expects. Legend: B batch, C latent channels, h w latent grid,
p patch, L = (h / p) (w / p) tokens of D = C p p numbers, in the order (channel, row, column).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.base import Latents, Tokenizer
from varkit.tokenizers.conv import ConvConfig, Decoder, Encoder, initialize

if TYPE_CHECKING:
    from varkit.canvases.base import Canvas

LOG_VARIANCES = (-30.0, 20.0)
MOMENTUM = 0.05


@dataclass(frozen=True)
class KLConfig:
    """The defaults are the published KL-16 (66.5M parameters).

    grid: tokens in each direction. patch: latent positions folded into a token, in each direction. scale: what latents
    are multiplied by; training finds its own. kl: weight of the divergence from a standard normal, in nats a sub-pixel.
    """

    conv: ConvConfig = ConvConfig(channels=128, latent_channels=16)
    grid: Side = 16
    patch: int = 1
    scale: float = 0.2325
    kl: float = 1e-6

    def __post_init__(self) -> None:
        if not isinstance(self.grid, int):
            object.__setattr__(self, "grid", tuple(self.grid))
        Schedule.of(self.grid)
        if self.patch < 1:
            raise UserError(f"patch is {self.patch}; it must be at least 1")
        if self.scale <= 0:
            raise UserError(f"scale is {self.scale}; it must be above 0 (1 / deviation of the latents)")
        if self.kl < 0:
            raise UserError(f"kl is {self.kl}; it must be >= 0 (1e-6 is usual)")

    @property
    def token_channels(self) -> int:
        """D, the numbers of a token."""
        return self.conv.latent_channels * self.patch**2

    def build(self) -> "KL":
        """Make the tokenizer, freshly initialised."""
        return KL(self)


@dataclass(frozen=True)
class Posterior:
    """Independent normals, mean and log_variance (B, C, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """The features that standard normal `noise` stands for."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def divergence(self) -> Tensor:
        """KL from the standard normal, in nats, summed over each picture: (B,)."""
        each = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * each.flatten(1).sum(dim=1)


class KL(Tokenizer):
    """Images <-> {"latents": (B, L, D) float32}.

    In training, `scale` follows the inverse deviation of the posterior's draws, as a moving average.
    """

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config, self.schedule = config, Schedule.of(config.grid)
        self.patch, self.stride = config.patch, config.conv.stride * config.patch
        channels = config.conv.latent_channels
        self.encoder = Encoder(replace(config.conv, latent_channels=2 * channels))
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = Decoder(config.conv, level_attention=False)
        self.register_buffer("scale", torch.tensor(config.scale))
        self.scale: Tensor
        for part in (self.encoder, self.quant_conv, self.post_quant_conv, self.decoder):
            part.apply(initialize)

    def posterior(self, images: Tensor, schedule: Schedule | None = None) -> Posterior:
        """Images (B, 3, H, W) -> the distribution of their features, in float32."""
        self.check_images(images, schedule)
        moments = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype))).float()
        mean, log_variance = moments.chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCES))

    def reconstruct(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w), not scaled -> images (B, 3, H, W) float32, not clamped."""
        return self.decoder(self.post_quant_conv(features.to(self.post_quant_conv.weight.dtype))).float()

    @torch.no_grad()
    def encode(
        self, images: Tensor, schedule: Schedule | None = None, noise: Tensor | None = None
    ) -> Latents:
        """The posterior's mean, or with `noise` (B, C, h, w) its draw."""
        posterior = self.posterior(images, schedule)
        return self.tokens(posterior.mean if noise is None else posterior.draw(noise))

    @torch.no_grad()
    def decode(self, latents: Latents, schedule: Schedule | None = None, levels: int | None = None) -> Tensor:
        return self.reconstruct(self.features(latents, schedule)).clamp(-1, 1)

    def tokens(self, features: Tensor) -> Latents:
        """Features (B, C, h, w) -> scaled latents."""
        return {"latents": F.pixel_unshuffle(features * self.scale, self.patch).flatten(2).mT.contiguous()}

    def features(self, latents: Latents, schedule: Schedule | None = None) -> Tensor:
        """The inverse of `tokens`."""
        values = latents["latents"].float().mT.unflatten(2, (schedule or self.schedule).last)
        return F.pixel_shuffle(values, self.patch) / self.scale

    def canvas(self, batch: int, schedule: Schedule | None = None) -> "Canvas":
        from varkit.canvases.grid import GridCanvas

        schedule = schedule or self.schedule
        fields = {"latents": ((self.config.token_channels,), torch.float32)}
        return GridCanvas.empty(
            batch,
            schedule.total,
            fields,  # type: ignore[arg-type]
            show=lambda latents: self.decode(latents, schedule),
            device=self.scale.device,
        )

    def training_forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images -> `reconstruction` (B, 3, H, W) of a draw, not clamped, and `kl_loss` (), weighted."""
        posterior = self.posterior(images)
        drawn = posterior.draw(torch.randn_like(posterior.mean))
        if self.training:
            with torch.no_grad():
                self.scale.lerp_(1 / drawn.std().clamp(min=1e-6), MOMENTUM)
        sub_pixels = images[0].numel()
        return {
            "reconstruction": self.reconstruct(drawn),
            "kl_loss": self.config.kl * posterior.divergence().mean() / sub_pixels,
        }

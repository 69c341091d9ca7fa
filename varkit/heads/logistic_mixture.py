"""Mixture of discretised logistics: the distribution of a pixel in PixelCNN++ (Salimans et al., arXiv 1701.05517).

A component gives each channel a logistic; green's mean moves with red, and blue's with both. A level's probability is
the mass of its cell, the end cells being open: sigma(a) - sigma(b) with a, b = (x - mean +- 1/255) / scale, here as
sigma(a) sigma(-b) (1 - exp(b - a)), whose logarithm is exact in the tails, where the published code falls back on the
density. Legend: R branches, B samples, T targets, C width, K components; the channels are red, green, blue.
"""

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.devices import sent
from varkit.errors import UserError
from varkit.heads.base import Ask, Head
from varkit.nn.linear import Linear
from varkit.tokenizers.pixels import LEVELS, from_levels, to_levels

CHANNELS = 3
HALF_CELL = 1 / 255
LEAST_LOG_SCALE = -7.0
N = TypeVar("N", float, Tensor)


def bits_per_dim(nats: N) -> N:
    """Nats a pixel, as `LogisticMixtureHead.loss` gives them -> bits a sub-pixel."""
    return nats / (CHANNELS * math.log(2))


def log_mass(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Logarithm of a logistic's mass in the cells of the levels x, elementwise."""
    inverse = torch.exp(-log_scale)
    upper, lower = (x - mean + HALF_CELL) * inverse, (x - mean - HALF_CELL) * inverse
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    inside = below + above + torch.log(-torch.expm1(-2 * HALF_CELL * inverse))
    return torch.where(x < -1 + HALF_CELL, below, torch.where(x > 1 - HALF_CELL, above, inside))


@dataclass(frozen=True)
class Mixture:
    """log_weights (..., K); means, log_scales and coefficients (..., 3, K).

    coefficients: how green moves with red, and blue with red and with green.
    """

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor
    coefficients: Tensor

    @classmethod
    def of(cls, parameters: Tensor) -> "Mixture":
        """Unconstrained numbers (..., 10 K) -> mixture, in float32 or better."""
        wide = parameters.to(torch.promote_types(parameters.dtype, torch.float32)).unflatten(-1, (10, -1))
        weights, means, log_scales, coefficients = wide.split((1, CHANNELS, CHANNELS, CHANNELS), dim=-2)
        return cls(
            weights.squeeze(-2).log_softmax(dim=-1),
            means,
            log_scales.clamp(min=LEAST_LOG_SCALE),
            coefficients.tanh(),
        )

    def log_prob(self, pixels: Tensor) -> Tensor:
        """log p of pixels (..., 3) that are levels in [-1, 1] -> (...), in nats."""
        return self._joint(pixels).logsumexp(dim=-1)

    def level_log_probs(self, before: Tensor) -> Tensor:
        """log p of the next channel's 256 levels, given the channels before, (..., 0 to 2) -> (..., 256)."""
        channel, joint = before.shape[-1], self._joint(before)
        levels = from_levels(torch.arange(LEVELS, device=before.device))
        each = log_mass(
            levels,
            self._mean(channel, before)[..., None],
            self.log_scales[..., channel, :, None],
        )
        posterior = joint.log_softmax(dim=-1)  # of the components, after the channels before
        return torch.logsumexp(posterior[..., None] + each, dim=-2)

    def draw(self, gumbel: Tensor, uniform: Tensor) -> Tensor:
        """A component by Gumbel numbers (..., K), then each channel by its inverse distribution function at `uniform`
        (..., 3), rounded to a level -> (..., 3) float32.
        """
        chosen = (self.log_weights + gumbel).argmax(dim=-1, keepdim=True)
        noise = self.log_scales.exp() * torch.logit(uniform)[..., None]
        pixels = noise.new_zeros((*chosen.shape[:-1], 0), dtype=torch.float32)
        for channel in range(CHANNELS):
            values = self._mean(channel, pixels) + noise[..., channel, :]
            pixels = torch.cat([pixels, from_levels(to_levels(values.gather(-1, chosen)))], dim=-1)
        return pixels

    def _joint(self, values: Tensor) -> Tensor:
        """log p of each component and the first channels' values (..., 0 to 3) -> (..., K)."""
        total = self.log_weights
        for channel in range(values.shape[-1]):
            mean = self._mean(channel, values)
            total = total + log_mass(values[..., channel, None], mean, self.log_scales[..., channel, :])
        return total

    def _mean(self, channel: int, values: Tensor) -> Tensor:
        """A channel's means (..., K), moved by the channels before it."""
        mean = self.means[..., channel, :]
        for earlier in range(channel):
            coefficient = self.coefficients[..., channel - 1 + earlier, :]
            mean = mean + coefficient * values[..., earlier, None]
        return mean


@dataclass(frozen=True)
class LogisticMixtureConfig:
    """Hidden width -> a mixture of `mixtures` components; 10 were published."""

    width: int
    mixtures: int = 10

    def __post_init__(self) -> None:
        for name in ("width", "mixtures"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def build(self) -> "LogisticMixtureHead":
        """Make the head, freshly initialised."""
        return LogisticMixtureHead(self.width, self.mixtures)


class LogisticMixtureHead(Head):
    """A pixel's three sub-pixels at once: {"pixels": (B, T, 3)}; the loss is in nats a pixel.

    With a sampler, red, green and blue are drawn one after the other, each from its 256 levels, so that guidance,
    temperature, top-k and top-p mean what they mean for codes. Without one, a pixel is drawn as published: a component,
    then its logistics. The two have the same distribution. Guidance over the parameters of mixtures, whose components
    need not correspond, would mean nothing, so the second way refuses it.
    """

    def __init__(self, width: int, mixtures: int = 10) -> None:
        super().__init__()
        self.mixtures = mixtures
        self.out = Linear(width, 10 * mixtures)

    def mixture(self, h: Tensor) -> Mixture:
        """h (..., C) -> the distribution of pixels."""
        return Mixture.of(self.out(h))

    def log_prob(self, h: Tensor, pixels: Tensor) -> Tensor:
        """log p(pixels), natural logarithm; h (..., C), pixels (..., 3) -> (...)."""
        return self.mixture(h).log_prob(pixels)

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws: dict[str, Tensor] | None = None) -> Tensor:
        return -self.log_prob(h, targets["pixels"])

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        mixture = self.mixture(h)
        if ask.pick is None:
            return {"pixels": self._drawn(mixture, ask)}
        target = ask.step.target
        pixels = mixture.means.new_zeros((*h.shape[1:3], 0), dtype=torch.float32)
        for channel in range(CHANNELS):
            logits = ask.combine(mixture.level_log_probs(pixels), ask.progress)
            # a sub-pixel is a position of its own to the draws, or the three would share a number
            place = torch.where(target < 0, target, CHANNELS * target + channel)
            ids = ask.pick(logits, replace(ask, step=replace(ask.step, target=place)))["ids"]
            pixels = torch.cat([pixels, from_levels(ids)[..., None]], dim=-1)
        return {"pixels": pixels}

    def _drawn(self, mixture: Mixture, ask: Ask) -> Tensor:
        branches = len(mixture.log_weights)
        if branches != 1:
            raise UserError(
                f"{branches} condition branches were given to a mixture without a sampler, which cannot be guided; "
                "give a sampler, or turn guidance off"
            )
        place, device = ask.step.target.clamp(min=0), mixture.means.device
        gumbel = ask.draws.gumbel("component", ask.at, place, self.mixtures)
        uniform = ask.draws.uniform("pixel", ask.at, place, CHANNELS)
        gumbel, uniform = sent(gumbel, device), sent(uniform, device)
        return mixture.draw(gumbel[None], uniform[None])[0]

"""The diffusion-loss head of MAR (arXiv 2406.11838): p(x | z) of a continuous token as a small diffusion given the
backbone's vector z.

Training: the noise that a random time puts into the token is predicted, several times for each z, which the backbone
computed once. Sampling: ancestral steps over some of the times, with guidance inside, on the predicted noise, and one
starting noise for all branches. Legend: R branches, B samples, T targets, C width, D token width, M repeats, S steps.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varkit.devices import placed, sent, sent_once
from varkit.errors import UserError
from varkit.heads.base import Ask, Head
from varkit.heads.gaussian_diffusion import TIMES, GaussianDiffusion, Reverse, spread
from varkit.nn.denoiser import Denoiser, Steering

ROWS = 512
"""Rows (branches x targets x steps) whose modulations are made in one product. A head of width 1024 and depth 3 samples
8 guided targets in 1.7 s of one Zen 4 core instead of 3.8 with one product a step, and 32 in 3.4 instead of 5.1."""


@dataclass(frozen=True)
class DiffusionConfig:
    """width: the backbone's. channels: numbers of a token. repeats: times drawn for each token in training.

    Published heads (depth, mlp_width): (6, 1024), (8, 1280) and (12, 1536) for base, large and huge. noisiest: the time
    that sampling begins at. Published is the last, of which x_0 is 1 part in 20 000, so that the first step multiplies
    an error in the noise by hundreds; a head that was trained for a short time diverges there, and not from 990.
    """

    width: int
    channels: int = 16
    mlp_width: int = 1024
    depth: int = 6
    repeats: int = 4
    sampling_steps: int = 100
    noisiest: int = TIMES - 1

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("channels", 1), ("mlp_width", 1), ("depth", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 1 <= self.noisiest < TIMES:
            raise UserError(f"noisiest is {self.noisiest}; the times go from 1 to {TIMES - 1}")
        if not 2 <= self.sampling_steps <= self.noisiest + 1:
            raise UserError(
                f"sampling_steps is {self.sampling_steps}; use 2 to {self.noisiest + 1} (100 is usual)"
            )

    def build(self) -> "DiffusionHead":
        """Make the head, initialised as published."""
        return DiffusionHead(self)


class DiffusionHead(Head):
    """Continuous tokens {"latents": (B, T, D)}. The diffusion itself is computed in float32 or better.

    `draws` of the loss: `times` (B, T, M) uniform in [0, 1), and `noise` (B, T, M, D). `process` has all times, for
    training; `reverse` those that sampling visits.
    """

    picks = False

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.process = GaussianDiffusion()
        self.reverse = GaussianDiffusion(spread(config.sampling_steps, config.noisiest))
        self.net = Denoiser(
            config.channels, 2 * config.channels, config.width, config.mlp_width, config.depth
        )

    def stepped(self, steps: int) -> "DiffusionHead":
        """The same head (no weight is copied), sampling in so many steps."""
        other = copy(self)
        other.config = replace(self.config, sampling_steps=steps)
        other.reverse = GaussianDiffusion(spread(steps, self.config.noisiest))
        return other

    def predict(self, h: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """The network alone: noise and raw variances (..., 2 D) for x (..., D), given h (..., C), at times (...)."""
        steering = self.net.steering(self.net.time(times), self.net.condition(h))
        return self.net(x.to(h.dtype), steering).to(x.dtype)

    def terms(self, h: Tensor, x0: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and variational bound, (B, T, M) each, of x0 (B, T, D) at integer times (B, T, M)."""
        x0 = x0[..., None, :].to(torch.promote_types(h.dtype, torch.float32)).expand(noise.shape)
        noise = noise.to(x0.dtype)
        x = self.process.noised(x0, times, noise)
        condition = self.net.condition(h)[..., None, :]
        steering = self.net.steering(self.net.time(times), condition)
        prediction = self.net(x.to(h.dtype), steering).to(x0.dtype)
        return self.process.losses(prediction, x0, noise, times)

    def loss(self, h: Tensor, targets: dict[str, Tensor], draws: dict[str, Tensor] | None = None) -> Tensor:
        x0 = targets["latents"]
        if draws is None:
            shape = (*x0.shape[:-1], self.config.repeats)
            draws = {
                "times": torch.rand(shape, device=h.device),
                "noise": torch.randn(*shape, x0.shape[-1], device=h.device),
            }
        draws = placed(draws, h.device)
        times = (draws["times"] * TIMES).long()
        error, bound = self.terms(h, x0, times, draws["noise"])
        return (error + bound).mean(dim=-1)

    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        noise, temperature = self.noise(ask, h.device), ask.temperature
        if isinstance(temperature, Tensor):
            temperature = sent(temperature, h.device)
        return {
            "latents": self.sample_with(h, noise, lambda eps: ask.combine(eps, ask.progress), temperature)
        }

    def noise(self, ask: Ask, device: torch.device) -> Tensor:
        """All noise of a sampling, (S, B, T, D)."""
        steps, channels = len(self.reverse), self.config.channels
        place = ask.step.target.clamp(min=0)
        noise = ask.draws.normal("diffusion", ask.at, place, steps * channels)
        return sent(noise, device).unflatten(-1, (steps, channels)).movedim(2, 0)

    def sample_with(
        self,
        h: Tensor,
        noise: Tensor,
        combine: Callable[[Tensor], Tensor],
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Tokens (B, T, D) from h (R, B, T, C) and all noise (S, B, T, D): the start, then what each step adds."""
        x = noise[0].to(torch.promote_types(h.dtype, torch.float32))
        steps = len(self.reverse)
        for i, steering in self._steering(h):
            step = self._ancestral(x, i, steering, combine)
            x = step.draw(noise[steps - i], temperature) if i else step.mean
        return x

    def ancestral(self, h: Tensor, x: Tensor, i: int, combine: Callable[[Tensor], Tensor]) -> Reverse:
        """One step back from x (B, T, D) at step i of `reverse`, given h (R, B, T, C): its mean and variance."""
        time = self.net.time(sent_once(self.reverse.times, h.device)[i])
        return self._ancestral(x, i, self.net.steering(time, self.net.condition(h)), combine)

    def _ancestral(
        self, x: Tensor, i: int, steering: Steering, combine: Callable[[Tensor], Tensor]
    ) -> Reverse:
        eps, variance = self.net(x.to(steering[0].dtype), steering).to(x.dtype).chunk(2, dim=-1)
        return self.reverse.reverse(x, i, combine(eps), variance[0])  # variances are not guided

    def _steering(self, h: Tensor) -> Iterator[tuple[int, Steering]]:
        """Steps from noise to data, and what each does to the network; made for as many together as fit `ROWS`."""
        condition = self.net.condition(h)
        times = self.net.time(sent_once(self.reverse.times, h.device)).flip(0)
        together = max(1, ROWS // max(1, h.shape[:-1].numel()))
        for first in range(0, len(times), together):
            group = times[first : first + together]
            made = self.net.steering(group[:, None, None, None], condition)
            for row in range(len(group)):
                yield len(times) - 1 - first - row, [each[row] for each in made]

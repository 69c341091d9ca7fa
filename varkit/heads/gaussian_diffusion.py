"""Gaussian diffusion with learned variances (Improved DDPM, arXiv 2102.09672), over all its times or over some of them.

q(x_t | x_0) = N(sqrt(a_t) x_0, 1 - a_t) with the cosine a_t. The network predicts the noise eps in x_t and, for each
number, a v that places the log variance of the step back between its bounds: log sigma^2 = (1 + v)/2 log beta_t +
(1 - v)/2 log b_t, b_t being the variance of q(x_{t-1} | x_t, x_0). Keeping some of the times makes a diffusion of its
own, whose betas follow from a_t at those times; the network is still told the original ones.
Legend: S times kept, D numbers of one value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TIMES = 1000
HALF_BIN = 1 / 255
"""Half the width of the bins of the last step's likelihood; the published code keeps those of 8-bit pictures."""


def cosine_alpha_bars() -> Tensor:
    """a_t for t = 0 ... `TIMES` - 1, float64."""

    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((t + 1) / TIMES) / level(t / TIMES), 0.999) for t in range(TIMES)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(dim=0)


def spread(count: int, last: int = TIMES - 1) -> list[int]:
    """`count` >= 2 times from 0 to `last`, evenly spaced and rounded."""
    return [round(i * last / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Reverse:
    """One ancestral step p(x_{t-1} | x_t): independent normals, mean and log_variance (..., D)."""

    mean: Tensor
    log_variance: Tensor

    def draw(self, noise: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """The value that standard normal `noise` stands for; the temperature multiplies the deviation."""
        return self.mean + temperature * torch.exp(0.5 * self.log_variance) * noise

    def log_prob(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """log density of x (..., D) -> (...), in nats; the temperature must be above 0."""
        log_variance = self.log_variance + 2 * math.log(temperature)
        squares = (x - self.mean).square() * torch.exp(-log_variance)
        return -0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(dim=-1)


class GaussianDiffusion:
    """The process over the times `kept` (all by default). A step is a number i from 0 (data) to S - 1 (noise), or a
    tensor of them, one a value.
    """

    def __init__(self, kept: Sequence[int] | None = None) -> None:
        self.times = torch.arange(TIMES) if kept is None else torch.tensor(kept)
        bars = cosine_alpha_bars()[self.times]
        before = torch.cat([torch.ones_like(bars[:1]), bars[:-1]])
        betas = 1 - bars / before
        posterior = betas * (1 - before) / (1 - bars)
        to_start = betas * before.sqrt() / (1 - bars)
        self._signal, self._noise = bars.sqrt(), (1 - bars).sqrt()
        # The mean of q(x_{t-1} | x_t, x_0) is to_start x_0 + from_here x_t, with x_0 = (x_t - noise eps) / signal.
        self._to_start, self._from_here = to_start, (1 - before) * (bars / before).sqrt() / (1 - bars)
        self._mean_x = to_start / self._signal + self._from_here
        self._mean_eps = to_start * self._noise / self._signal
        # the posterior at 0 has no variance: it takes that of 1
        self._low, self._high = torch.cat([posterior[1:2], posterior[1:]]).log(), betas.log()

    def __len__(self) -> int:
        return len(self.times)

    def noised(self, x0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        """x_t of x0 (..., D) for steps i (...)."""
        return _at(self._signal, i, x0) * x0 + _at(self._noise, i, x0) * noise

    def reverse(self, x: Tensor, i: int | Tensor, eps: Tensor, variance: Tensor) -> Reverse:
        """The ancestral step from x at step i, given the noise predicted in it and the raw v, all (..., D)."""
        low, high = _at(self._low, i, x), _at(self._high, i, x)
        mean = _at(self._mean_x, i, x) * x - _at(self._mean_eps, i, x) * eps
        return Reverse(mean, low + (variance + 1) / 2 * (high - low))

    def losses(self, prediction: Tensor, x0: Tensor, noise: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of eps, and the variational bound in bits, which teaches the variances alone; (...) each.

        prediction (..., 2 D) is the network's at `noised(x0, i, noise)`. Both are means over D.
        """
        eps, variance = prediction.chunk(2, dim=-1)
        x = self.noised(x0, i, noise)
        ours = self.reverse(x, i, eps.detach(), variance)
        true = _at(self._to_start, i, x) * x0 + _at(self._from_here, i, x) * x
        low = _at(self._low, i, x)
        gap = (true - ours.mean).square() * torch.exp(-ours.log_variance)
        kl = 0.5 * (ours.log_variance - low - 1 + torch.exp(low - ours.log_variance) + gap)
        nats = torch.where((i == 0)[..., None], -_log_bin(x0, ours), kl)
        return (eps - noise).square().mean(dim=-1), nats.mean(dim=-1) / math.log(2)


def _at(table: Tensor, i: int | Tensor, like: Tensor) -> Tensor | float:
    """Values of a table (S,) at steps i, in the dtype and on the device of `like` (..., D)."""
    if isinstance(i, int):
        return table[i].item()
    return table.to(like.device)[i][..., None].to(like.dtype)


def _log_bin(x: Tensor, normal: Reverse) -> Tensor:
    """log of the mass in x +- `HALF_BIN`; what lies outside [-1, 1] has the open end bins of a picture."""
    inverse = torch.exp(-0.5 * normal.log_variance)
    above = _normal_cdf((x - normal.mean + HALF_BIN) * inverse)
    below = _normal_cdf((x - normal.mean - HALF_BIN) * inverse)
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The published approximation."""
    return 0.5 * (1 + F.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))

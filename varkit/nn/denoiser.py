"""The small residual network of a diffusion or flow head (MAR, arXiv 2406.11838, Sec. 4): one value, its noise time and
what the backbone says of it.

    y = time(t) + condition(z);  x += gate * MLP(LN(x) * (1 + scale) + shift), (shift, scale, gate) = Linear(SiLU(y))

The modulations depend on t and z alone, not on x, so a solver's steps can have theirs made together, in one product of
many rows (`steering`), instead of reading their weights, more than half of all, once a step.
Legend: W width, D numbers of a value, C condition width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.nn.linear import Linear

EPS = 1e-6
FREQUENCIES = 256

Steering = list[Tensor]
"""What t and z do to each block, (..., 3 W), and to the output, (..., 2 W)."""


class TimeEmbedding(nn.Module):
    """Cosines and sines of a time, and two linear layers: (...) -> (..., W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = Linear(FREQUENCIES, width), Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angles = t[..., None].float() * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.down(F.silu(self.up(waves.to(self.up.weight.dtype))))


class DenoiserBlock(nn.Module):
    """One residual block; its modulation starts at zero, so that it begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.up, self.down = Linear(width, width), Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, x: Tensor, steering: Tensor) -> Tensor:
        shift, scale, gate = steering.chunk(3, dim=-1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return torch.addcmul(x, gate, self.down(F.silu(self.up(h))))


class Denoiser(nn.Module):
    """Values (..., D) under a steering -> (..., outputs)."""

    def __init__(self, channels: int, outputs: int, condition_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.condition = Linear(condition_width, width)
        self.embed = Linear(channels, width)
        self.blocks: Sequence[DenoiserBlock] = nn.ModuleList(DenoiserBlock(width) for _ in range(depth))  # type: ignore[assignment]
        self.modulation = Linear(width, 2 * width)
        self.out = Linear(width, outputs)
        self.initialise()

    def steering(self, time: Tensor, condition: Tensor) -> Steering:
        """Embedded times and conditions, (..., W) each and broadcast against each other."""
        y = F.silu(time + condition)
        return [*(block.modulation(y) for block in self.blocks), self.modulation(y)]

    def forward(self, x: Tensor, steering: Steering) -> Tensor:
        x = self.embed(x)
        for block, own in zip(self.blocks, steering, strict=False):
            x = block(x, own)
        shift, scale = steering[-1].chunk(2, dim=-1)
        return self.out(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale))

    @torch.no_grad()
    def initialise(self) -> None:
        """As published: Xavier, times of std 0.02, zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time.up, self.time.down):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.modulation, self.out, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(linear.weight)

"""The Mamba-2 mixer (Dao and Gu, arXiv 2405.21060), as the released models of M-VAR use it.

    z, u, dt = in(x);  u = silu(conv(u));  x, B, C = u;  y = SSM(x, softplus(dt + bias), -exp(log_a), B, C) + skip x
    out(RMS(y silu(z)))

What it carries from one call to the next has a constant size: the last inputs of the causal convolution and the state
of the recurrence, which stays in float32 under smaller weights.
Legend: N rows, L slots, C width, I inner width (expand x C), H heads, P channels of a head, E entries of a state,
U = I + 2 E, K kernel.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.nn.attention import Carry
from varkit.nn.linear import Linear
from varkit.nn.state_space import scan

STEPS = (1e-3, 0.1)
"""Where dt starts, evenly in logarithms."""
FORGETTING = (1.0, 16.0)
"""Where -A starts, evenly."""
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes beside the width; those of the published code by default."""

    state: int = 64
    head_width: int = 64
    expand: int = 2
    kernel: int = 4

    def __post_init__(self) -> None:
        for name, least in (("state", 1), ("head_width", 1), ("expand", 1), ("kernel", 2)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{name} {getattr(self, name)} of the scan is too small; give at least {least}"
                )

    def check(self, width: int) -> None:
        """Raise `UserError` unless heads fill the inner width."""
        if self.expand * width % self.head_width:
            raise UserError(
                f"width {width} expanded {self.expand} times does not divide into heads of {self.head_width}; change "
                "the width or head_width of the scan"
            )


class GatedNorm(nn.Module):
    """RMS norm of y silu(z), in float32; (..., I) -> (..., I)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return F.rms_norm(y * F.silu(z.to(y.dtype)), self.gain.shape, self.gain.to(y.dtype), NORM_EPS)


class Mamba2(nn.Module):
    """x (N, L, C) and what was carried so far -> (N, L, C) and what is carried on: a `Scan` of the window.

    Carries `tail` (N, K - 1, U), and `state` (N, H, P, E).
    """

    def __init__(self, width: int, config: Mamba2Config) -> None:
        super().__init__()
        config.check(width)
        self.config, self.inner = config, config.expand * width
        self.heads = self.inner // config.head_width
        convolved = self.inner + 2 * config.state
        self.into = Linear(width, self.inner + convolved + self.heads, bias=False)
        self.conv = nn.Conv1d(convolved, convolved, config.kernel, groups=convolved)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.log_a = nn.Parameter(torch.empty(self.heads))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedNorm(self.inner)
        self.out = Linear(self.inner, width, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The recurrence's own parameters, as published; linear layers and the convolution are the model's to start."""
        least, most = map(math.log, STEPS)
        dt = torch.exp(least + (most - least) * torch.rand(self.heads))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.log_a.copy_(torch.empty(self.heads).uniform_(*FORGETTING).log())
        nn.init.ones_(self.skip)

    def forward(
        self, x: Tensor, carried: Carry | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Carry]:
        """`lengths` (N,): slots that count, from the first on; None: all. What the others give means nothing."""
        config = self.config
        z, u, dt = self.into(x).split([self.inner, self.inner + 2 * config.state, self.heads], dim=-1)
        tail = u.new_zeros(len(u), config.kernel - 1, u.shape[-1]) if carried is None else carried["tail"]
        u = torch.cat([tail, u], dim=1)
        tail = _last(u, config.kernel - 1, lengths)
        u = F.silu(causal_convolution(u, self.conv.weight[:, 0], self.conv.bias))
        exact = torch.promote_types(u.dtype, torch.float32)
        v, b, c = u.to(exact).split([self.inner, config.state, config.state], dim=-1)
        v = v.unflatten(-1, (self.heads, -1))
        dt = F.softplus(dt.to(exact) + self.dt_bias.to(exact))
        if lengths is not None:
            dt = dt * (torch.arange(dt.shape[1], device=dt.device) < lengths[:, None])[..., None]
        state = v.new_zeros(*v.shape[:1], *v.shape[2:], config.state) if carried is None else carried["state"]
        y, state = scan(v, dt, -torch.exp(self.log_a.to(exact)), b, c, state)
        y = torch.addcmul(y, v, self.skip.to(exact)[:, None])
        return self.out(self.norm(y.flatten(2), z).to(x.dtype)), {"state": state, "tail": tail}


def causal_convolution(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise: u (N, K - 1 + L, U), weight (U, K) -> (N, L, U), each slot from the K inputs that end with its own.

    A sum of shifted inputs, which keeps channels innermost; torch's `conv1d` is its twin.
    """
    length = u.shape[1] - weight.shape[1] + 1
    out = u[:, :length] * weight[:, 0]
    if bias is not None:
        out = out + bias
    for k in range(1, weight.shape[1]):
        out = torch.addcmul(out, u[:, k : k + length], weight[:, k])
    return out


def _last(u: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last `count` slots before each row's end, u (N, count + L, U) -> (N, count, U)."""
    if lengths is None:
        return u[:, u.shape[1] - count :].clone()
    index = lengths[:, None] + torch.arange(count, device=u.device)
    return u.gather(1, index[..., None].expand(-1, -1, u.shape[-1]))

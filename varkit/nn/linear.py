"""The library's linear layer: one place where the matrix kernel is chosen.

On AMD processors the stock float32 path (MKL) stays behind what oneDNN reaches, and oneDNN's convolutions are
differentiable, so on CPUs a large product runs as a 1 x 1 convolution over a channels-last view (no copy).
`F.linear` is the twin.
Legend: N rows, I inputs, O outputs.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALLEST_WORK = (
    2**24
)  # multiply-adds below which the detour costs more than it gains (measured on two Zen 4 cores)


@functools.cache
def _is_amd() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()[:4096]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O), by the kernel that measured fastest for this size and dtype."""
    rows = x.numel() // x.shape[-1]
    big = rows * weight.numel() >= _SMALLEST_WORK
    if (
        big
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and _is_amd()
        and torch.backends.mkldnn.enabled
    ):
        return convolution_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def convolution_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product as a 1 x 1 convolution on a (1, I, rows, 1) channels-last view."""
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    # A single thread's 1 x 1 filters would leave oneDNN, were they not "dilated"; they span one pixel all the same.
    dilation = (1, 2) if torch.get_num_threads() == 1 else (1, 1)
    out = F.conv2d(image, weight[:, :, None, None], bias, dilation=dilation)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """`torch.nn.Linear` on the kernel above; a caller may pass a bias in place of the module's own."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return linear(x, self.weight, self.bias if bias is None else bias)

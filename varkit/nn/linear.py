"""The library's linear layer: one place where the matrix kernel is chosen.

On AMD processors the stock float32 path (MKL) stays behind what oneDNN reaches, by a little for many rows and by three
times for the few dozen of a coarse scale. Without gradients oneDNN's own linear is called; with them a large product
runs as a 1 x 1 convolution over a channels-last view (no copy), since oneDNN's convolutions are differentiable.
`F.linear` is the twin of both.
Legend: N rows, I inputs, O outputs.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALLEST_WORK = 2**18
"""Multiply-adds below which nothing but `F.linear` is worth a call."""

_SMALLEST_CONVOLUTION = 2**24
"""Multiply-adds below which that detour costs more than it gains (measured on two Zen 4 cores)."""


@functools.cache
def _is_amd() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()[:4096]


@functools.cache
def _has_onednn_linear() -> bool:
    """Whether this torch offers oneDNN's linear as an operator (it does for its compiler, not as a public function)."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O), by the kernel that measured fastest for this size and dtype."""
    work = x.numel() // x.shape[-1] * weight.numel()
    if work < _SMALLEST_WORK or x.dtype != torch.float32 or not _on_onednn(x) or not _is_amd():
        return F.linear(x, weight, bias)
    if not _needs_gradients(x, weight):
        if _is_two_rows(x):
            return two_rows(x, weight, bias)
        if _has_onednn_linear():
            return onednn_linear(x, weight, bias)
    return convolution_linear(x, weight, bias) if work >= _SMALLEST_CONVOLUTION else F.linear(x, weight, bias)


def two_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of two rows (a token with and without its condition), as that of the weight by two columns.

    Reading the weight is all its work: 22 to 34 GB/s so, 14 to 23 by oneDNN, 6 to 10 by MKL's other way round.
    """
    columns = x.reshape(2, -1).contiguous().T  # rows in memory: the other layout takes four times as long
    out = (weight @ columns).T.contiguous().view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def _is_two_rows(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() == 2 * x.shape[-1]


def onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = ""
) -> Tensor:
    """oneDNN's linear, which has no gradient, and an activation on its result."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


def _on_onednn(x: Tensor) -> bool:
    onednn = torch.backends.mkldnn
    return x.device.type == "cpu" and bool(onednn.enabled) and onednn.is_available()


def _needs_gradients(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def convolution_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product as a 1 x 1 convolution on a (1, I, rows, 1) channels-last view."""
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    # A single thread's 1 x 1 filters would leave oneDNN, were they not "dilated"; they span one pixel all the same.
    dilation = (1, 2) if torch.get_num_threads() == 1 else (1, 1)
    out = F.conv2d(image, weight[:, :, None, None], bias, dilation=dilation)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """`torch.nn.Linear` on the kernel above; a caller may pass a bias in place of the module's own."""

    _packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        bias = self.bias if bias is None else bias
        packed = self._packed_now()
        if packed is not None and self.fuses(x):
            return onednn_linear(x, packed, bias)
        return linear(x, self.weight, bias)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """gelu of the layer's output; in one kernel where there is one, which spares a pass over the memory."""
        if not self.fuses(x):
            return F.gelu(self(x), approximate=approximate)
        packed = self._packed_now()
        return onednn_linear(x, self.weight if packed is None else packed, self.bias, "gelu", approximate)

    def fuses(self, x: Tensor) -> bool:
        """Whether oneDNN's own linear is the one to call: on a CPU, without gradients, and not for `two_rows`."""
        known = (
            x.dtype in (torch.float32, torch.bfloat16)
            and x.dtype == self.weight.dtype
            and not _is_two_rows(x)
        )
        return known and _on_onednn(x) and _has_onednn_linear() and not _needs_gradients(x, self.weight)

    @torch.no_grad()
    def pack(self) -> None:
        """Keep a copy of the weight in the order that oneDNN reads it; used until the weight changes."""
        weight = self.weight.detach()
        if len(weight) > 2 and self.fuses(weight):
            self._packed = self._stamp(), torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def _packed_now(self) -> Tensor | None:
        """The packed weight, unless the weight has changed since."""
        return self._packed[1] if self._packed is not None and self._packed[0] == self._stamp() else None

    def _stamp(self) -> tuple[int, int]:
        """What tells one content of the weight from another."""
        return self.weight.data_ptr(), self.weight._version


def pack(module: nn.Module) -> None:
    """`Linear.pack` for all linear layers within. Their weights take twice the memory then.

    Without it oneDNN orders a weight anew at each call, which a few rows do not repay: at 8 rows and 1024 x 4096, on
    two Zen 4 cores, 0.72 ms in place of 0.93 in float32 and 0.40 in place of 0.58 in bfloat16; at 512 rows of bfloat16
    9.7 in place of 10.2.
    """
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.pack()

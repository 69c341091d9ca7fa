"""The library's linear layer: one place where the matrix kernel is chosen.

On AMD processors the stock float32 path (MKL) stays behind what oneDNN reaches, by a little for many rows and by three
times for the few dozen of a coarse scale. So oneDNN's own linear is called, with gradients as well as without.
`F.linear` is the twin of all.
Legend: N rows, I inputs, O outputs.
"""

import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALLEST_WORK = 2**18
"""Multiply-adds below which nothing but `F.linear` is worth a call."""

_SMALLEST_PRODUCT = 2**24
"""The same where there are gradients, which calls from Python cost more."""

_GELU_SLOPE = 2 * (2 / math.pi) ** 0.5


def _is_amd() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()[:4096]


# Facts of the machine are found once, here: the compiler of `compile_parts` takes them as given, and would break off
# where they are looked for.
AMD = _is_amd()
ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this torch offers oneDNN's linear as an operator (it does for its compiler, not as a public function)."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O), by the kernel that measured fastest for this size and dtype."""
    work = x.numel() // x.shape[-1] * weight.numel()
    if not AMD or work < _SMALLEST_WORK or x.dtype != torch.float32 or not _on_onednn(x):
        return F.linear(x, weight, bias)
    if not _needs_gradients(x, weight):
        return two_rows(x, weight, bias) if _is_two_rows(x) else onednn_linear(x, weight, bias)
    return differentiable_linear(x, weight, bias) if work >= _SMALLEST_PRODUCT else F.linear(x, weight, bias)


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
    """Whether oneDNN's own linear may be called."""
    allowed = torch.compiler.is_compiling() or bool(torch.backends.mkldnn.enabled)  # the compiler cannot ask
    return ONEDNN_LINEAR and allowed and x.device.type == "cpu"


def _needs_gradients(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


@torch.library.custom_op("varkit::product", mutates_args=())
def differentiable_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same product by oneDNN's linear, and its gradients by the kernels that are fastest for them.

    An operator of its own, which the compiler leaves as it is: it takes oneDNN's for one with a constant weight.
    """
    return onednn_linear(x, weight, bias)


@differentiable_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """That of the input by oneDNN too; that of the weight sums over thousands of rows, where MKL is ahead of it (on two
    Zen 4 cores 150 to 175 GFLOP/s for 115 to 160).
    """
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    rows = grad.flatten(0, -2)
    return (
        differentiable_linear(grad, weight.T, None) if wants_x else None,
        rows.T @ x.flatten(0, -2) if wants_weight else None,
        rows.sum(0) if wants_bias else None,
    )


differentiable_linear.register_autograd(_gradients, setup_context=_remember)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    """F.gelu. Compiled for a CPU, tanh takes three times the rest of it: 0.5 x (1 + tanh u) is x sigmoid(2u)."""
    if approximate != "tanh" or x.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.gelu(x, approximate=approximate)
    return x * torch.sigmoid(x * (_GELU_SLOPE + _GELU_SLOPE * 0.044715 * x * x))


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
            return _gelu(self(x), approximate)
        packed = self._packed_now()
        return onednn_linear(x, self.weight if packed is None else packed, self.bias, "gelu", approximate)

    def fuses(self, x: Tensor) -> bool:
        """Whether oneDNN's own linear is the one to call: on a CPU, without gradients, and not for `two_rows`."""
        known = (
            x.dtype in (torch.float32, torch.bfloat16)
            and x.dtype == self.weight.dtype
            and not _is_two_rows(x)
        )
        return known and _on_onednn(x) and not _needs_gradients(x, self.weight)

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

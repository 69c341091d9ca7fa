"""Muon over stacks of matrices of one shape, in fewer calls: an accelerator waits for each of them (docs/log.md)."""

import math
from typing import Any

import torch
from torch import Tensor


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, up to rounding, for matrices of few shapes; its `match_rms_adamw` rates alone.

    The products of each shape's Newton-Schulz iteration are batched (arXiv 2502.16982, Algorithm 1).
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move the matrices along their gradients."""
        for group in self.param_groups:
            assert group["adjust_lr_fn"] == "match_rms_adamw" and group["nesterov"]
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                self._move(matrices, group, 0.2 * math.sqrt(max(shape)) * group["lr"])

    def _move(self, matrices: list[Tensor], group: dict[str, Any], rate: float) -> None:
        """One step of matrices of one shape."""
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        directions = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(
            ahead.dtype
        )
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(directions.unbind()), alpha=-rate)


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """x (n, A, B) -> nearly orthogonal matrices of the same singular vectors, bfloat16, by a quintic Newton-Schulz
    iteration on X / |X|: X <- a X + (b G + c G^2) X with G = X X^T.
    """
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

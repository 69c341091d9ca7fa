"""Guidance combines condition branches. `scale` s means u + s (c - u): 1 is off, 0 is unconditional.

Branch 0 is the condition, branch 1 the null condition. Published conventions ((1 + t) c - t u in VAR, cfg in
LlamaGen) are converted where they are loaded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598), constant or rising from off at the first step to `scale` at the
    last.

    The ramp is VAR's: t grows linearly over the scales, so s_k = 1 + (scale - 1) k / (K - 1).
    """

    scale: float = 1.0
    ramp: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= 100:
            raise UserError(
                f"guidance {self.scale} is out of range; use 0 to 100 (1 is off, 2 to 5 is usual)"
            )

    @property
    def off(self) -> bool:
        """True when only the conditional branch matters, so that one branch is enough."""
        return self.scale == 1.0

    def __call__(self, branches: Tensor, progress: Tensor) -> Tensor:
        """branches (R, B, T, ...), progress (B, 1) or (B, T) in [0, 1] -> (B, T, ...)."""
        if branches.shape[0] == 1:
            return branches[0]
        conditional, null = branches[0], branches[1]
        if not self.ramp:
            return torch.lerp(null, conditional, self.scale)
        s = 1 + (self.scale - 1) * progress.to(branches.device, branches.dtype)
        s = s.view(*s.shape, *([1] * (conditional.ndim - s.ndim)))
        return s * conditional + (1 - s) * null

"""Guidance combines condition branches. `scale` s means u + s (c - u): 1 is off, 0 is unconditional.

Branch 0 is the condition, branch 1 the null condition. Published conventions ((1 + t) c - t u in VAR, cfg in
LlamaGen) are converted where they are loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from varkit.devices import sent, sent_once
from varkit.errors import UserError
from varkit.generators.base import Prepared, branches_and_batch
from varkit.plans.step import Step

BySteps = float | tuple[float, ...]
"""One number for a whole run, or one for each of its steps."""

Ramp = bool | tuple[float, ...]
"""Whether guidance rises over a run, or how far it has risen at each of its steps."""


def by_step(values: Sequence[float], progress: Tensor) -> Tensor:
    """The value of each step, of progress's shape; a list of another length than the plan's is spread evenly."""
    index = (progress * (len(values) - 1)).round().long()
    return sent_once(_table(tuple(values)), progress.device)[index]


@lru_cache(maxsize=64)
def _table(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)


def until(scale: float, last: int, steps: int) -> tuple[float, ...]:
    """A scale for each of a run's steps that guides up to step `last`, and is off behind it.

    LlamaGen's `cfg_interval` n counts from the step after the prompt's, so it is `last` = n + 1.
    """
    if not 0 <= last < steps:
        raise UserError(f"guidance cannot end at step {last}; a run of {steps} steps has 0 to {steps - 1}")
    return (scale,) * (last + 1) + (1.0,) * (steps - 1 - last)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598), constant, given for each step, or rising from off at the first step
    to `scale` at the last.

    The ramp is VAR's: t grows linearly over the scales, so s_k = 1 + (scale - 1) k / (K - 1). A ramp given as a list
    says how far it has risen at each step, in place of k / (K - 1); above 1 it goes beyond `scale`.
    """

    scale: BySteps = 1.0
    ramp: Ramp = False

    def __post_init__(self) -> None:
        if isinstance(self.ramp, tuple) and not (self.ramp and min(self.ramp) >= 0):
            raise UserError(
                f"the ramp {self.ramp} must be a share of at least 0 for each step; e.g. 0, 0.5, 1"
            )
        if self.ramp and isinstance(self.scale, tuple):
            raise UserError(
                f"guidance {self.scale} is given for each step, so it cannot be a ramp too; leave one out"
            )
        for scale in self.scale if isinstance(self.scale, tuple) else (self.scale,):
            if not 0 <= scale <= 100:
                raise UserError(f"guidance {scale} is out of range; use 0 to 100 (1 is off, 2 to 5 is usual)")

    @property
    def off(self) -> bool:
        """True when only the conditional branch matters, so that one branch is enough."""
        return set(self.scale) == {1.0} if isinstance(self.scale, tuple) else self.scale == 1.0

    def __call__(self, branches: Tensor, progress: Tensor) -> Tensor:
        """branches (R, B, T, ...), progress (B, 1) or (B, T) in [0, 1] -> (B, T, ...)."""
        if branches.shape[0] == 1:
            return branches[0]
        conditional, null = branches[0], branches[1]
        if isinstance(self.scale, tuple):
            s = sent(by_step(self.scale, progress), branches.device).to(branches.dtype)
        elif self.ramp:
            risen = by_step(self.ramp, progress) if isinstance(self.ramp, tuple) else progress
            s = 1 + (self.scale - 1) * sent(risen, branches.device).to(branches.dtype)
        else:
            return torch.lerp(null, conditional, self.scale)
        s = s.view(*s.shape, *([1] * (conditional.ndim - s.ndim)))
        return s * conditional + (1 - s) * null


@dataclass(frozen=True)
class GuidedLayer:
    """A port that guides hidden states in the midst of the network (Infinity's "CFG on features").

    All branches go on from what was combined, each with its own condition; the head then reads `Conditional`.
    """

    guidance: Guidance

    def __post_init__(self) -> None:
        if self.guidance.ramp:
            raise UserError("guidance at a layer is one number, not one that rises; say --ramp off")
        if isinstance(self.guidance.scale, tuple):
            raise UserError("guidance at a layer is one number, not one for each step; say e.g. --guidance 3")

    def __call__(self, h: Tensor, step: Step, prepared: Prepared) -> Tensor:
        """h (R x B, L, C) -> the same, equal in all branches."""
        branches, batch = branches_and_batch(prepared)
        mixed = self.guidance(h.unflatten(0, (branches, batch)), torch.zeros(batch, 1))
        return mixed.repeat(branches, 1, 1)


@dataclass(frozen=True)
class Conditional:
    """What is read after a `GuidedLayer`: the conditional branch."""

    def __call__(self, branches: Tensor, progress: Tensor) -> Tensor:
        """branches (R, B, T, ...) -> (B, T, ...)."""
        return branches[0]

"""What every head promises: hidden states -> distribution of the targets.

A head computes a loss and samples; every random number can be passed in, and guidance is a callable over condition
branches, so that heads with sampling loops of their own (diffusion, flow) can apply it inside.
Legend: R branches, B samples, T targets, C width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from varkit.draws import Draws
from varkit.plans.step import Step

Combine = Callable[[Tensor, Tensor], Tensor]
"""Guidance: branches (R, B, T, ...), progress (B, 1) or (B, T) in [0, 1] -> (B, T, ...)."""


@dataclass(frozen=True)
class Ask:
    """What is asked of a head at one step of decoding.

    draws: the samples' random streams. at: the decoding step each target belongs to, (B, 1), or (B, T) in a pack.
    progress: of the same shape, 0 at the first step, 1 at the last. combine: guidance. pick: the sampler of a discrete
    head (logits -> values by name). fed: values that entered at the slots read, (B, T, ...), for heads that refine what
    was fed (a flow over the backbone). temperature: of heads over real numbers, a number or (B, T or 1, 1); a discrete
    head has its sampler's. confidence: whether the sampler adds how probable each choice was, (B, T), by the name of
    `varkit.plans.base.CONFIDENCE`.
    """

    step: Step
    draws: Draws
    at: Tensor
    progress: Tensor
    combine: Combine
    pick: Callable[[Tensor, "Ask"], dict[str, Tensor]] | None = None
    fed: dict[str, Tensor] = field(default_factory=dict)
    temperature: float | Tensor = 1.0
    confidence: bool = False


class Head(nn.Module, ABC):
    """Distribution of targets given hidden states; `route` names in a plan choose among several.

    picks: whether it draws codes by `Ask.pick`, so that top-k and top-p mean something.
    """

    picks: ClassVar[bool] = True

    @abstractmethod
    def loss(self, h: Tensor, targets: dict[str, Tensor], draws: dict[str, Tensor] | None = None) -> Tensor:
        """h (B, T, C), true values (B, T, ...), the objective's noise and times -> loss of each target (B, T)."""

    @abstractmethod
    def sample(self, h: Tensor, ask: Ask) -> dict[str, Tensor]:
        """h (R, B, T, C) -> values (B, T, ...) by name, the form the canvas takes."""

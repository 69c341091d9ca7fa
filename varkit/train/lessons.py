"""What one training step teaches: the inputs a canvas holds, a packed step over them, and what is right at its targets.

`WholePlan` is teacher forcing over true latents. Methods that corrupt the inputs and correct the targets, or that draw
an order afresh for each batch, are other `Lessons`; the objective, the task and the trainer stay as they are.
Legend: B batch, T targets.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from varkit.canvases.base import Canvas
from varkit.plans.base import StaticPlan
from varkit.plans.step import Step
from varkit.tokenizers.base import Latents, Tokenizer
from varkit.train.progressive import Progressive


@dataclass(frozen=True)
class Lesson:
    """One batch as the objective takes it.

    canvas: feeds the step's slots. targets: what is right, by name, (B, P, ...) over the canvas's positions. total: the
    targets that the mean is over; in a truncated plan more than the step has. weights: factors of the losses, (T,) or
    (B, T). draws: the head's noise and times, (B, T, ...), where they are not to be drawn by the head.
    """

    canvas: Canvas
    step: Step
    targets: Latents
    total: int
    weights: Tensor | None = None
    draws: dict[str, Tensor] | None = None


class Lessons(Protocol):
    """Makes lessons of true latents; what is random comes from torch's generator, which the trainer seeds."""

    settings: dict[str, Any]
    """What defines a run, as JSON."""

    def lesson(self, latents: Latents, step: int | None = None) -> Lesson:
        """The lesson at a training step; None asks for the one that held-out losses are measured on."""
        ...


@runtime_checkable
class HeldOutLessons(Protocol):
    """Lessons whose held-out losses are measured on several plans."""

    def held_out(self, latents: Latents) -> dict[str, Lesson]:
        """Lessons beside the one with no step, by name."""
        ...


class WholePlan:
    """Teacher forcing: every target of the plan at once, from true latents.

    step_power: a target's loss weighs (targets of its step)^-power, the mean weight being 1; at 0.5 coarse scales count
    as in Infinity (arXiv 2412.04431, released code). `progressive` may be set to VAR's growing number of scales, once
    the run's steps are known.
    """

    def __init__(self, tokenizer: Tokenizer, plan: StaticPlan, step_power: float = 0.0) -> None:
        self.tokenizer, self.plan = tokenizer, plan
        self.settings: dict[str, Any] = {"kind": type(self).__name__, "step_power": step_power}
        self.progressive: Progressive | None = None
        self._steps: dict[int, Step] = {}
        self.sizes = [step.target.shape[-1] for step in plan.steps]
        sizes = torch.tensor(self.sizes)
        weights = torch.repeat_interleave(sizes**-step_power, sizes)
        self._weights = weights / weights.mean() if step_power else None

    def lesson(self, latents: Latents, step: int | None = None) -> Lesson:
        if step is None:
            canvas, targets = self.true(latents)
            return Lesson(canvas, self._packed(len(self.sizes)), targets, sum(self.sizes))
        levels, newest = (len(self.sizes), 1.0) if self.progressive is None else self.progressive.at(step)
        canvas, targets = self.taught(latents)
        weights = self._weighed(levels, newest)
        return Lesson(canvas, self._packed(levels), targets, sum(self.sizes), weights)

    def true(self, latents: Latents) -> tuple[Canvas, Latents]:
        """True latents as inputs, and as what is right."""
        canvas = self.tokenizer.canvas(len(next(iter(latents.values()))))
        canvas.fill(latents)
        return canvas, canvas.latents()

    def taught(self, latents: Latents) -> tuple[Canvas, Latents]:
        """The inputs of training, and what is right; subclasses may corrupt the one and correct the other."""
        return self.true(latents)

    def _packed(self, levels: int) -> Step:
        if levels not in self._steps:
            self._steps[levels] = self.plan.training_step(levels)
        return self._steps[levels]

    def _weighed(self, levels: int, newest: float) -> Tensor | None:
        active = sum(self.sizes[:levels])
        weights = None if self._weights is None else self._weights[:active]
        if newest == 1.0:
            return weights
        weights = torch.ones(active) if weights is None else weights.clone()
        weights[-self.sizes[levels - 1] :] *= newest
        return weights

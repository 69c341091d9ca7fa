"""Teacher forcing for any static plan: one packed step over true latents, one loss a target.

The training inputs are what a canvas filled with true latents feeds at the packed step, so they cannot differ from what
decoding feeds. Legend: B batch, L slots, T targets, K levels.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from varkit.canvases.base import Canvas, gather_positions
from varkit.generators.base import Generator
from varkit.generators.conditioning import drop_condition
from varkit.heads.base import Head
from varkit.nn.attention import Packed
from varkit.plans.step import Step
from varkit.train.task import TrainConfig


def teacher_forced(
    generator: Generator, canvas: Canvas, step: Step, condition: Mapping[str, Tensor]
) -> Tensor:
    """Hidden states (B, T, C) at the slots read, over a filled canvas; condition tensors are (B, ...)."""
    fed = canvas.feed(step.feed)
    prepared = generator.prepare({k: v[None] for k, v in condition.items()})
    h = generator(fed, step, prepared, Packed(step.sees.own_mask(len(step.feed)), step.feed.valid))
    return h if step.reads_all else gather_positions(h, step.read)


class NextStepLoss(nn.Module):
    """Mean of the head's loss over targets, the condition dropped at a rate for guidance.

    `weights` (T,) scales each target's loss; the mean stays over all T targets of the plan, so that a truncated step
    (progressive training) weighs its tokens as the full one would.
    """

    def __init__(self, generator: Generator, head: Head, condition_drop: float = 0.1) -> None:
        super().__init__()
        self.generator, self.head, self.condition_drop = generator, head, condition_drop

    def losses(self, canvas: Canvas, step: Step, condition: Mapping[str, Tensor]) -> Tensor:
        """Loss of each target of the packed step, (B, T), over a filled canvas."""
        h = teacher_forced(self.generator, canvas, step, condition)
        return self.head.loss(h, {k: gather_positions(v, step.target) for k, v in canvas.latents().items()})

    def forward(
        self,
        canvas: Canvas,
        step: Step,
        condition: dict[str, Tensor],
        total: int,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The training loss, (): weighted losses summed over targets, over `total`, meaned over samples."""
        if self.training and self.condition_drop:
            condition = drop_condition(self.generator.conditioner, condition, self.condition_drop)
        losses = self.losses(canvas, step, condition)
        scaled = losses if weights is None else losses * weights.to(losses.device)
        return scaled.sum(dim=1).mean() / total


class Progressive:
    """VAR's progressive training: scales join one by one, and the newest scale's loss is ramped from 0.01 to 1.

    first: active scales until the warm-up ends (the published index pg0 = 4 is five scales); from there their number
    grows linearly, rounded, to all at step `fraction` x steps. ramp: steps for which a scale is new; the scales active
    from the start are not.
    """

    def __init__(
        self, levels: int, steps: int, first: int = 5, fraction: float = 0.8, warmup: int = 0, ramp: int = 1
    ) -> None:
        self.levels, self.first, self.warmup, self.ramp = levels, min(first, levels), warmup, max(1, ramp)
        self.end = max(warmup + 1, round(fraction * steps))

    @classmethod
    def over(cls, levels: int, config: TrainConfig, fraction: float) -> "Progressive":
        """Published proportions for a run whose steps are known: a ramp of 1/300 of the run after the warm-up."""
        assert config.steps is not None
        warm = config.warmup if isinstance(config.warmup, int) else round(config.warmup * config.steps)
        return cls(levels, config.steps, fraction=fraction, warmup=warm, ramp=config.steps // 300)

    def at(self, step: int) -> tuple[int, float]:
        """Active levels and the weight of the newest at a training step."""
        levels = self._levels(step)
        if levels == self.first:
            return levels, 1.0
        joined = self.warmup + (levels - self.first - 0.5) / (self.levels - self.first) * (
            self.end - self.warmup
        )
        return levels, min(1.0, max(0.01, (step - joined) / self.ramp))

    def _levels(self, step: int) -> int:
        if step < self.warmup:
            return self.first
        part = min(1.0, (step - self.warmup) / (self.end - self.warmup))
        return self.first + math.floor(part * (self.levels - self.first) + 0.5)

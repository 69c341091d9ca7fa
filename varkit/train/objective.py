"""The training loss of every plan: one packed step over a filled canvas, one loss a target.

The training inputs are what a canvas feeds at the packed step, so they cannot differ from what decoding feeds.
Legend: B batch, L slots, T targets.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from varkit.canvases.base import Canvas, gather_positions
from varkit.generators.base import Generator
from varkit.generators.conditioning import drop_condition
from varkit.heads.base import Head
from varkit.nn.attention import Packed
from varkit.nn.ports import Ports
from varkit.plans.step import Step
from varkit.train.lessons import Lesson


def teacher_forced(
    generator: Generator,
    canvas: Canvas,
    step: Step,
    condition: Mapping[str, Tensor],
    ports: Ports | None = None,
) -> Tensor:
    """Hidden states (B, T, C) at the slots read, over a filled canvas; condition tensors are (B, ...)."""
    fed = canvas.feed(step.feed)
    prepared = generator.prepare({k: v[None] for k, v in condition.items()})
    h = generator(fed, step, prepared, Packed.of(step), ports)
    return h if step.reads_all else gather_positions(h, step.read)


class NextStepLoss(nn.Module):
    """Mean of the head's loss over targets, the condition dropped at a rate for guidance.

    The weighted mean stays over all targets of the plan (`Lesson.total`), so that a truncated step (progressive
    training) weighs its tokens as the full one would.
    """

    def __init__(self, generator: Generator, head: Head, condition_drop: float = 0.1) -> None:
        super().__init__()
        self.generator, self.head, self.condition_drop = generator, head, condition_drop

    def hidden(self, lesson: Lesson, condition: Mapping[str, Tensor]) -> Tensor:
        """What each target of the lesson's step is read from, (B, T, C)."""
        return teacher_forced(self.generator, lesson.canvas, lesson.step, condition)

    def losses_of(self, h: Tensor, lesson: Lesson) -> Tensor:
        """Loss of each target, (B, T), given its hidden state."""
        targets = {k: gather_positions(v, lesson.step.target) for k, v in lesson.targets.items()}
        return self.head.loss(h, targets, lesson.draws)

    def losses(self, lesson: Lesson, condition: Mapping[str, Tensor]) -> Tensor:
        """Loss of each target of the lesson's step, (B, T)."""
        return self.losses_of(self.hidden(lesson, condition), lesson)

    def dropped(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The condition, in training replaced at the rate by the null one; draws from torch's generator."""
        if self.training and self.condition_drop:
            return drop_condition(self.generator.conditioner, condition, self.condition_drop)
        return condition

    def forward(self, lesson: Lesson, condition: dict[str, Tensor]) -> Tensor:
        """The training loss, (): weighted losses summed over targets, over the lesson's total, meaned over samples."""
        return weighed(self.losses(lesson, self.dropped(condition)), lesson)


def weighed(losses: Tensor, lesson: Lesson) -> Tensor:
    """Losses (B, T) -> their weighted sum over targets, over the lesson's total, meaned over samples."""
    scaled = losses if lesson.weights is None else losses * lesson.weights.to(losses.device)
    return scaled.sum(dim=1).mean() / lesson.total

"""Exposure bias of a next-scale model: how much worse it predicts the truth from inputs of its own.

    gap_k = CE(q_k | inputs of y_1..y_k-1) - CE(q_k | inputs of q_1..q_k-1)

with q the codes of real pictures and y what the model draws at each scale from true coarser ones (the stagger-scale
rollout of SAR, arXiv 2512.06421), so that every scale is judged one step away from the truth. The first scale has no
input: its gap is 0. Legend: B pictures, T targets, K scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.adapt.sar import Rollout, redrawn
from varkit.generators.base import Generator
from varkit.heads.base import Head
from varkit.train.lessons import Lesson
from varkit.train.objective import NextStepLoss

PLAIN = Rollout(guidance=1.0, top_k=0, top_p=0.0)
"""The model's own distribution, which its loss is about."""


@dataclass(frozen=True)
class Exposure:
    """Mean losses of the true codes at each of K scales, nats a target: from true inputs, and from the model's own.

    sizes: targets of each scale.
    """

    teacher: tuple[float, ...]
    student: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def gaps(self) -> tuple[float, ...]:
        """The exposure bias of each scale."""
        return tuple(s - t for s, t in zip(self.student, self.teacher, strict=True))

    @property
    def gap(self) -> float:
        """The mean gap of a target that has an input."""
        pairs = list(zip(self.gaps, self.sizes, strict=True))[1:]
        return sum(gap * size for gap, size in pairs) / sum(size for _, size in pairs)


@torch.no_grad()
def exposure(
    generator: Generator,
    head: Head,
    lesson: Lesson,
    condition: dict[str, Tensor],
    rollout: Rollout = PLAIN,
    seed: int = 0,
) -> Exposure:
    """Measured over a lesson of true latents whose step is a pack of K scales, conditions (B, ...), at `seed`."""
    loss = NextStepLoss(generator, head, condition_drop=0.0)
    h = loss.hidden(lesson, condition)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = redrawn(lesson, rollout(generator, head, lesson, condition, h))
    own = Lesson(drawn.canvas, lesson.step, lesson.targets, lesson.total)
    pair = (loss.losses_of(h, lesson), loss.losses(own, condition))
    scale, scales = lesson.step.turn, lesson.step.turns
    assert scale is not None and scales > 1, "exposure bias is about several scales"
    means = [tuple(each[:, scale == k].mean().item() for k in range(scales)) for each in pair]
    return Exposure(means[0], means[1], tuple(int((scale == k).sum()) for k in range(scales)))

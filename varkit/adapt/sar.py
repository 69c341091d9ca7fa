"""SAR, self-autoregressive refinement (arXiv 2512.06421): a short training of a next-scale model on its own
predictions.

Teacher forcing predicts every scale from true coarser ones. What is drawn there, y, makes the inputs of a second,
student-forced pass, one scale behind (stagger-scale rollout); its output is led to y too, not to the truth, which does
not belong to those inputs:

    L = CE(TF_k, q_k) + gamma CE(SF_k, y_k),    TF from inputs of q_1..q_k-1,  SF from inputs of y_1..y_k-1, k > 1

The inputs of y are what the canvas feeds once y is drawn on it: the last map, resized, for models of absolute maps
(FlexVAR, as published), the sum of maps for residual ones (VAR, Infinity), which is an extension of ours.
(unconfirmed) gamma 0.01 is the released code's, for the last scale alone; the paper's, for all, is not known. The
learning rate is a choice of ours: the published run goes on near the end of its schedule.
Legend: B batch, L slots, T targets, C width, K scales, R condition branches.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from varkit.adapt.method import Material
from varkit.canvases.base import gather_positions, scatter_positions, steps_of
from varkit.decode.guidance import Guidance
from varkit.decode.sampling import Sampler
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.generators.base import Generator
from varkit.heads.base import Ask, Head
from varkit.heads.bits import BitsHead
from varkit.heads.categorical import CategoricalHead
from varkit.nn.ports import Port
from varkit.plans.join import only
from varkit.plans.scales import ScalePlan
from varkit.plans.step import Step
from varkit.tokenizers.base import Latents
from varkit.train.generator_task import NextStepTask
from varkit.train.lessons import Lesson
from varkit.train.mixed_scales import MixedScales
from varkit.train.objective import NextStepLoss, teacher_forced, weighed

Condition = dict[str, Tensor]


@dataclass(frozen=True)
class Rollout:
    """How the model's own predictions are drawn from a teacher-forced pass.

    guidance s means u + s (c - u) at the last scale, 1 is off; it rises with the scales, s_k = 1 + (s - 1) (1 + (k - 1)
    / (K - 1)) / 2, from half-way on. The published cfg is s - 1. temperature 0 is arg-max.
    """

    guidance: float = 2.2
    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96

    def __post_init__(self) -> None:
        self.combine(2), self.sampler()  # validates

    def combine(self, scales: int) -> Guidance:
        """The guidance over branches in a run of `scales` steps."""
        if self.guidance == 1:
            return Guidance()
        half = (self.guidance - 1) / 2
        return Guidance(tuple(1 + half * (1 + k / max(1, scales - 1)) for k in range(scales)))

    def sampler(self) -> Sampler:
        """The sampler of codes."""
        return Sampler(self.temperature, self.top_k, self.top_p)

    @torch.no_grad()
    def __call__(
        self, generator: Generator, head: Head, lesson: Lesson, condition: Condition, h: Tensor
    ) -> Latents:
        """What would be drawn at every target given its hidden state, h (B, T, C): values (B, T, ...), without
        gradient. Guidance evaluates the network once more, for the null condition. The seed is torch's.
        """
        step, batch = lesson.step, h.shape[0]
        combine, branches = self.combine(step.turns), h.detach()[None]
        if not combine.off:
            null = generator.conditioner.null(condition)
            branches = torch.stack([h, teacher_forced(generator, lesson.canvas, step, null)])
        at = steps_of(step, torch.zeros(batch, dtype=torch.int64)).expand(batch, step.target.shape[-1])
        draws = Draws.start(int(torch.randint(2**62, ())), batch)
        progress = at / max(1, step.turns - 1)
        return head.sample(branches, Ask(step, draws, at, progress, combine, self.sampler()))


@torch.no_grad()
def redrawn(lesson: Lesson, values: Latents) -> Lesson:
    """The lesson whose inputs, and targets, are `values` (B, T, ...) at its step's targets."""
    canvas = lesson.canvas.select(range(lesson.canvas.batch))
    latents = {name: table.clone() for name, table in canvas.latents().items()}
    for name, table in latents.items():
        scatter_positions(table, lesson.step.target, values[name])
    canvas.fill(latents)
    return Lesson(canvas, lesson.step, canvas.latents(), lesson.total)


class RefinementLoss(NextStepLoss):
    """Teacher forcing, and student forcing on what the teacher-forced pass draws."""

    def __init__(self, generator: Generator, head: Head, condition_drop: float, settings: "SAR") -> None:
        super().__init__(generator, head, condition_drop)
        self.settings, self.rollout = settings, settings.rollout

    def terms(self, lesson: Lesson, condition: Condition) -> tuple[Tensor, Tensor]:
        """The teacher-forced and the student-forced loss, both (); conditions are dropped once, for both passes."""
        condition = self.dropped(condition)
        h = self.hidden(lesson, condition)
        teacher = weighed(self.losses_of(h, lesson), lesson)
        drawn = redrawn(lesson, self.rollout(self.generator, self.head, lesson, condition, h))
        taught = self.taught(lesson.step)
        if not bool(taught.any()):
            raise UserError("SAR refines what follows a first scale, and this model has one scale alone")
        student = self.student(drawn, condition)
        return teacher, self._led(student, h[:, taught], drawn, lesson)

    def forward(self, lesson: Lesson, condition: Condition) -> Tensor:
        """The training loss, ()."""
        teacher, student = self.terms(lesson, condition)
        return teacher + self.settings.gamma * student

    def taught(self, step: Step) -> Tensor:
        """(T,) bool: targets of the lesson's step that the student predicts: those that something is shown for."""
        shown = step.feed.shows[step.read] >= 0
        if self.settings.scales == "all":
            return shown
        assert step.turn is not None
        return shown & (step.turn == step.turns - 1)

    def student(self, drawn: Lesson, condition: Condition) -> Tensor:
        """Hidden states (B, n, C) of the n targets taught, from inputs of what was drawn."""
        step = drawn.step
        if self.settings.scales == "all":
            return self.hidden(drawn, condition)[:, self.taught(step)]
        last = only(step, [0, step.turns - 1])
        # The released code leaves out what only marks the start (`pos_start`), in this pass alone.
        ports = {("input", 0): without_start(self.generator)}
        h = teacher_forced(self.generator, drawn.canvas, last, condition, ports)
        return h[:, last.feed.shows[last.read] >= 0]

    def _led(self, student: Tensor, teacher: Tensor, drawn: Lesson, lesson: Lesson) -> Tensor:
        """Mean loss of the student's hidden states (B, n, C) towards the chosen target."""
        if self.settings.target == "tf_soft":
            return _soft(self.head, student, teacher.detach())
        source = drawn if self.settings.target == "tf_hard" else lesson
        positions = lesson.step.target[self.taught(lesson.step)]
        targets = {name: gather_positions(values, positions) for name, values in source.targets.items()}
        return self.head.loss(student, targets).mean()


def _soft(head: Head, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy of the student's distribution to the teacher's; of a token's bits, their mean."""
    logits: nn.Module | None = getattr(head, "logits", None)
    assert logits is not None
    with torch.no_grad():
        wanted = logits(teacher).float().softmax(dim=-1)
    return -(wanted * logits(student).float().log_softmax(dim=-1)).sum(dim=-1).mean()


def without_start(generator: Generator) -> Port:
    """A port at ("input", 0) that takes the start tokens' own embedding away and leaves condition and place."""

    def port(h: Tensor, step: Step, prepared: dict[str, Tensor]) -> Tensor:
        start: Tensor = generator.start  # type: ignore[assignment]
        ids = step.feed.ids.clamp(min=0, max=len(start) - 1).to(h.device)
        blank = (step.feed.shows < 0)[..., None].to(h.device)
        return h - torch.where(blank, start[ids], torch.zeros_like(start[:1]))

    return port


class RefinementTask(NextStepTask):
    """Next-step prediction with the two losses of SAR."""

    objective: RefinementLoss

    def __init__(self, settings: "SAR", material: Material) -> None:
        super().__init__(**material.keywords())
        parts = material.parts
        self.objective = RefinementLoss(parts.generator, parts.head, material.condition_drop, settings)

    def loss(
        self, phase: str, batch: tuple[Latents, dict[str, Tensor]], step: int
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """L; the metrics are its two terms."""
        latents, condition = batch
        teacher, student = self.objective.terms(self.lessons.lesson(latents, step), condition)
        metrics: dict[str, float | Tensor] = {"teacher": teacher.item(), "student": student.item()}
        return teacher + self.objective.settings.gamma * student, metrics


@dataclass(frozen=True)
class SAR:
    """Refine a next-scale model on its own predictions (SAR)."""

    share: ClassVar[float] = 1 / 18  # 10 epochs after 180
    lr_share: ClassVar[float] = 0.1

    scales: Literal["all", "last"] = "all"
    """Which scales are predicted from the model's own: all behind the first in one pass (the paper), or the last alone
    with only the condition before it (the released code)."""
    gamma: float = 0.01
    """Weight of the student-forced loss."""
    target: Literal["tf_hard", "tf_soft", "gt"] = "tf_hard"
    """What the student-forced pass is led to: codes drawn by the teacher-forced one, its distribution, or the truth."""
    guidance: float = 2.2
    """Guidance of the drawing at the last scale; 1 is off, and spares an evaluation."""
    temperature: float = 1.0
    """Temperature of the drawing; 0 takes the likeliest codes."""
    top_k: int = 900
    """Codes to draw from; 0 is all."""
    top_p: float = 0.96
    """Draw from the likeliest codes of this probability in all; 0 is all."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise UserError(f"gamma is {self.gamma}; it must be a number from 0 up, 0.01 is published")
        for name, known in (("scales", ("all", "last")), ("target", ("tf_hard", "tf_soft", "gt"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        self.rollout  # noqa: B018  (validates)

    @property
    def rollout(self) -> Rollout:
        """How the model's own predictions are drawn."""
        return Rollout(self.guidance, self.temperature, self.top_k, self.top_p)

    def task(self, material: Material) -> RefinementTask:
        """Refinement of a model that predicts codes or bits scale by scale; `UserError` for others."""
        parts = material.parts
        if not isinstance(parts.plan, ScalePlan) or not isinstance(parts.head, CategoricalHead | BitsHead):
            raise UserError(
                f"SAR refines models that draw codes or bits scale by scale, not {type(parts.plan).__name__} with "
                f"{type(parts.head).__name__}; use a model such as digits, or the method finetune"
            )
        if isinstance(parts.lessons, MixedScales):
            # A scale by itself has no other's predictions to follow: the whole plan's lessons, which are the default.
            material = replace(material, parts=replace(parts, lessons=None))
        return RefinementTask(self, material)

"""Reward: a model goes on learning from verdicts on what it draws itself.

Of each picture's caption or label a group of pictures is drawn, as the model draws by default, and judged, r in [0, 1].
What is right more often than the rest of its group becomes likelier, what is wrong more often less likely:

    L = a CE(truth) - mean_i A_i mean_t w_t log pi(x_it),    A_i = r_i - mean of r over the other pictures of i's group

the policy gradient with a baseline of leave-one-out (arXiv 2402.14740; groups as in GRPO, arXiv 2402.03300), one step
for each drawing, so that nothing needs clipping. pi is what pictures are drawn from, with guidance s_t and temperature
tau_t, but for what top-k and top-p cut off. Its gradient is taken through the conditional branch alone, and weighed by
w_t = tau_t / s_t, which takes out the factor that both put on the logits: else guided, cold last scales outweigh the
rest twentyfold. The true pictures of the same prompts keep the model, and its unconditional branch, in place of a
divergence from where it began. Legend: B pictures of a batch, G of a group, P prompts, T targets, V values of each.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from varkit.adapt.method import Material
from varkit.canvases.base import Canvas, gather_positions, steps_of
from varkit.decode.guidance import by_step
from varkit.decode.loop import run
from varkit.decode.sampling import Sampler
from varkit.errors import UserError
from varkit.evaluate.judges import Judge, find_judge
from varkit.heads.bits import BitsHead
from varkit.heads.categorical import CategoricalHead
from varkit.hub.pipeline import Settings
from varkit.hub.prompts import Prompt
from varkit.pictures import to_array
from varkit.plans.base import StaticPlan
from varkit.tokenizers.base import Latents
from varkit.train.generator_task import NextStepTask, drawing
from varkit.train.lessons import WholePlan
from varkit.train.objective import teacher_forced

Condition = dict[str, Tensor]
Batch = tuple[Latents, Condition, list[Prompt]]


def advantages(rewards: Tensor) -> Tensor:
    """Rewards (P, G) of P groups -> (P, G): how much better than the others of its group each one is."""
    group = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (group / (group - 1))


class RewardTask(NextStepTask):
    """Next-step prediction of true pictures, and of drawn ones by how they were judged."""

    def __init__(self, settings: "Reward", material: Material, lessons: WholePlan, judge: Judge) -> None:
        prompts = max(1, material.batch_size // settings.group)
        super().__init__(**material.keywords() | {"batch_size": prompts})
        assert material.start is not None
        self.settings, self.pipeline = settings, material.start
        self.whole, self.judge = lessons, judge
        self.step = lessons.plan.training_step(settings.first or None)
        self.progress = lessons.plan.progress(steps_of(self.step, torch.zeros(1, dtype=torch.int64)))
        sampling = self.pipeline.sampling()
        self.combine, self.cold = sampling.combine(), Sampler(sampling.temperature)
        self.slopes = slopes(sampling, self.progress)

    def batch(self, step: int, micro: int) -> Batch:  # type: ignore[override]
        """Latents, conditions and prompts of the B / G pictures whose prompts are drawn."""
        rows = self.rows(step, micro)
        return *self.take(self.tokens, rows), self._prompts(rows)

    def _prompts(self, rows: np.ndarray) -> list[Prompt]:
        told = self.tokens.captions if self.tokens.captions is not None else self.tokens.labels
        assert told is not None, "what is judged was asked for"
        return [told[i] if isinstance(told, list) else int(told[i]) for i in rows]

    def loss(self, phase: str, batch: Any, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """L; metrics: the loss of true pictures, the mean reward, and the share of groups that teach something."""
        latents, condition, prompts = batch
        truth = self.objective(self.lessons.lesson(latents, step), condition)
        drawn, rewards = self.drawn(condition, prompts)
        advantage = advantages(rewards)
        metrics: dict[str, float | Tensor] = {
            "truth": truth.item(),
            "reward": rewards.mean().item(),
            "taught": (advantage != 0).any(dim=1).float().mean().item(),
        }
        return self.settings.anchor * truth + self.policy(drawn, condition, advantage.flatten()), metrics

    @torch.no_grad()
    def drawn(self, condition: Condition, prompts: list[Prompt]) -> tuple[Latents, Tensor]:
        """Latents (B, L, ...) of G pictures for each of the prompts, and their rewards (B / G, G)."""
        group = self.settings.group
        asked = [prompt for prompt in prompts for _ in range(group)]
        told = {name: values.repeat_interleave(group, dim=0)[None] for name, values in condition.items()}
        seed = int(torch.randint(2**62, ()))
        with drawing(self.modules.values()):
            state = self.pipeline.start_from(told, seed, range(len(asked)), self.pipeline.settings)
            canvas = run(self.pipeline.model, state).canvas
        rewards = self.judge(to_array(canvas.preview()), asked)
        return canvas.latents(), torch.from_numpy(rewards).float().view(-1, group)

    def policy(self, drawn: Latents, condition: Condition, advantage: Tensor) -> Tensor:
        """The loss of drawn latents (B, L, ...) with advantages (B,), (); where there is none nothing is evaluated."""
        kept = advantage.nonzero().flatten()
        device = next(iter(condition.values())).device
        if not len(kept):
            return torch.zeros((), device=device)
        own = {name: values[(kept // self.settings.group).to(device)] for name, values in condition.items()}
        canvas, values = self.whole.true({name: t[kept.to(t.device)] for name, t in drawn.items()})
        chances = self.chances(canvas, values, own)
        return -(chances * advantage[kept].to(device)).sum() / len(advantage)

    def chances(self, canvas: Canvas, values: Latents, condition: Condition) -> Tensor:
        """What the gradient is of: the mean over targets of w log pi of the values on a filled canvas, (B,)."""
        generator, head, step = self.objective.generator, self.objective.head, self.step
        assert isinstance(head, CategoricalHead | BitsHead)
        progress = self.progress.expand(canvas.batch, -1)
        branches = head.logits(teacher_forced(generator, canvas, step, condition)).float()[None]
        if not self.combine.off:
            with torch.no_grad():
                null = generator.conditioner.null(condition)
                away = head.logits(teacher_forced(generator, canvas, step, null)).float()
            branches = torch.cat([branches, away[None]])
        chosen = gather_positions(next(iter(values.values())), step.target).long()
        guided = self.cold.filtered(self.combine(branches, progress), progress)
        log_pi = guided.log_softmax(dim=-1).gather(-1, chosen[..., None]).flatten(2).sum(dim=-1)
        return (log_pi * self.slopes.to(log_pi)).mean(dim=1)


def slopes(settings: Settings, progress: Tensor) -> Tensor:
    """w = tau / s of targets at `progress` (B, T), by the settings that pictures are drawn with; 0 where the likeliest
    value is taken, since nothing is drawn there.
    """
    told, ones = settings.temperature, torch.ones(progress.shape)
    tau = by_step(told, progress) if isinstance(told, tuple) else told * ones
    return tau / settings.combine()(torch.stack([ones, 0 * ones]), progress)


@dataclass(frozen=True)
class Reward:
    """Learn from verdicts on one's own pictures (policy gradient over groups)."""

    share: ClassVar[float] = 0.2
    lr_share: ClassVar[float] = 0.1

    judge: Literal["scenes", "digits"] = "scenes"
    """Who judges: the reader of scenes, or the classifier of digits."""
    group: int = 4
    """Pictures drawn for a prompt."""
    anchor: float = 0.1
    """Weight of the loss of true pictures."""
    first: int = 0
    """Steps of drawing that learn, from the first; 0 is all. The others follow them as they are."""

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"group is {self.group}; compare at least 2 pictures of a prompt, such as 4")
        if not 0 <= self.anchor < float("inf"):
            raise UserError(f"anchor is {self.anchor}; it must be a number from 0 up, such as 0.1")
        if self.first < 0:
            raise UserError(f"first is {self.first}; it must be 0 (all) or a number of steps")

    def task(self, material: Material) -> RewardTask:
        """Training of a model whose order is fixed and whose head has a likelihood; `UserError` for others."""
        parts, start = material.parts, material.start
        assert start is not None, "pictures are drawn by a whole model"
        if start.model.plan is not parts.plan or not isinstance(parts.plan, StaticPlan):
            raise UserError(
                f"reward learns from pictures drawn in a fixed order, and this model's is a "
                f"{type(start.model.plan).__name__}; use a model such as scenes, or the method finetune"
            )
        if not isinstance(parts.head, CategoricalHead | BitsHead):
            raise UserError(
                f"reward learns from the probabilities of codes or bits, and {type(parts.head).__name__} has none; "
                "use a model such as scenes, or the method finetune"
            )
        if start.settings.smooth or start.settings.guidance_layer:
            raise UserError(
                "reward learns from codes drawn by guided logits, and this model smooths them or guides hidden "
                "states; use a model such as scenes, or the method finetune"
            )
        whole = WholePlan(parts.tokenizer, parts.plan)
        return RewardTask(self, material, whole, find_judge(self.judge, start))

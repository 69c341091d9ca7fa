"""What the trainer does for a generator over tokens: teacher forcing on encoded pictures, labels or captions beside
them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from varkit.devices import device_of, placed
from varkit.generators.base import Generator
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.heads.base import Head
from varkit.plans.base import Plan, StaticPlan
from varkit.tokenizers.base import Latents, Tokenizer
from varkit.train.lessons import HeldOutLessons, Lessons, WholePlan
from varkit.train.objective import NextStepLoss
from varkit.train.task import Phase, Task
from varkit.train.tokens import Tokens


@contextmanager
def drawing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in training draw meanwhile: nothing is dropped."""
    before = [(module, module.training) for module in modules]
    for module, _ in before:
        module.eval()
    try:
        yield
    finally:
        for module, was in before:
            module.train(was)


@dataclass(frozen=True)
class Forced:
    """The parts of a model under teacher forcing; the tokenizer is frozen.

    lessons: what is made of true latents, by default `WholePlan`, which takes a static plan.
    """

    tokenizer: Tokenizer
    generator: Generator
    head: Head
    plan: Plan
    lessons: Lessons | None = None


class NextStepTask(Task):
    """Train a generator and its head to follow their plan over `tokens`.

    recipe: what defines the run. draw: makes the sample grid (a pipeline's business, so it is passed in).
    """

    def __init__(
        self,
        parts: Forced,
        tokens: Tokens,
        held_out: Tokens,
        batch_size: int,
        recipe: dict[str, Any],
        seed: int = 0,
        condition_drop: float = 0.1,
        draw: Callable[[], Image.Image] | None = None,
    ) -> None:
        self.tokenizer, self.plan = parts.tokenizer.eval().requires_grad_(False), parts.plan
        self.tokens, self.held_out, self.batch_size, self.recipe = tokens, held_out, batch_size, recipe
        self.seed, self.draw = seed, draw
        lessons = parts.lessons
        if lessons is None:
            assert isinstance(self.plan, StaticPlan), "plans that are not static want lessons of their own"
            lessons = WholePlan(self.tokenizer, self.plan)
        self.lessons = lessons
        self.phases = (Phase("generator", ("generator", "head")),)
        self.objective = NextStepLoss(parts.generator, parts.head, condition_drop)
        self.modules: dict[str, nn.Module] = {"generator": parts.generator, "head": parts.head}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def batch(self, step: int, micro: int) -> tuple[Latents, dict[str, Tensor]]:
        """Latents (B, L, ...) and the condition (B, ...): each epoch goes once through a seeded permutation."""
        return self.take(self.tokens, self.rows(step, micro))

    def rows(self, step: int, micro: int) -> np.ndarray:
        """Which items the micro-batch is made of, (B,)."""
        return np.array([self._row(step * self.batch_size + i, micro) for i in range(self.batch_size)])

    def _row(self, position: int, micro: int) -> int:
        epoch, place = divmod(position, len(self.tokens))
        key = epoch * 1009 + micro
        if self._order[0] != key:
            self._order = (
                key,
                np.random.default_rng([self.seed, epoch, micro]).permutation(len(self.tokens)),
            )
        return int(self._order[1][place])

    def take(self, tokens: Tokens, rows: np.ndarray) -> tuple[Latents, dict[str, Tensor]]:
        """Latents (B, L, ...) and the condition (B, ...) of items."""
        latents = tokens.take(rows)
        config = self.objective.generator.config.condition  # type: ignore[union-attr]
        if isinstance(config, TextConfig):
            assert tokens.captions is not None, "a text model is trained on captioned pictures"
            return latents, {"text": config.encode([tokens.captions[i] for i in rows], tight=True)}
        assert isinstance(config, ClassConfig)
        labels = np.zeros(len(rows), np.int64) if tokens.labels is None else tokens.labels[rows]
        return latents, {"label": torch.from_numpy(labels)}

    def loss(
        self, phase: str, batch: tuple[Latents, dict[str, Tensor]], step: int
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Mean loss over the plan's targets, in nats where the head has a likelihood."""
        latents, condition = batch
        loss = self.objective(self.lessons.lesson(latents, step), condition)
        return loss, {"loss": loss.item()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Held-out loss (nats a token) overall and, when a static plan has few steps, of each; and on further plans,
        where the lessons have some.
        """
        losses = []
        others: dict[str, list[Tensor]] = {}
        for start in range(0, min(512, len(self.held_out)), 64):
            rows = np.arange(start, min(start + 64, len(self.held_out)))
            latents, condition = self.take(self.held_out, rows)
            condition = placed(condition, device_of(self.objective.generator))
            losses.append(self.objective.losses(self.lessons.lesson(latents), condition))
            if isinstance(self.lessons, HeldOutLessons):
                for name, lesson in self.lessons.held_out(latents).items():
                    others.setdefault(name, []).append(self.objective.losses(lesson, condition))
        each = torch.cat(losses).mean(dim=0)
        result = {"loss": each.mean().item()}
        if isinstance(self.plan, StaticPlan) and len(self.plan.steps) <= 16:
            sizes = [s.target.shape[-1] for s in self.plan.steps]
            result |= {f"loss_{k}": part.mean().item() for k, part in enumerate(each.split(sizes))}
        return result | {f"loss_over_{name}": torch.cat(x).mean().item() for name, x in others.items()}

    def samples(self) -> Image.Image | None:
        """A grid of pictures, if the caller knows how to draw them."""
        return None if self.draw is None else self.draw()

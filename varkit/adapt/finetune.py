"""Fine-tuning: teacher forcing goes on, over the same pictures or other ones. The yardstick of every other method."""

from dataclasses import dataclass
from typing import ClassVar

from varkit.adapt.method import Material
from varkit.train.generator_task import NextStepTask


@dataclass(frozen=True)
class Finetune:
    """Train on as before, on the same or other pictures."""

    share: ClassVar[float] = 1 / 18
    lr_share: ClassVar[float] = 0.1

    def task(self, material: Material) -> NextStepTask:
        """Next-step prediction from true latents."""
        return NextStepTask(**material.keywords())

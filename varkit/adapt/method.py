"""What a method of post-training promises: settings that make a task of a trained model and its pictures.

A method is one file with one frozen dataclass: its fields are the settings (and the command's options), `task` says
what is trained. `varkit.adapt.run` brings the model, the data, the folder and the one trainer.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from PIL import Image

from varkit.hub.pipeline import Pipeline
from varkit.train.generator_task import Forced
from varkit.train.task import Task
from varkit.train.tokens import Tokens


@dataclass(frozen=True)
class Material:
    """What a method trains with, by the names of `NextStepTask`.

    parts: of the trained model, which are changed in place. recipe: what defines the run, as JSON. condition_drop: the
    rate at which the condition is left out. draw: makes a sheet of samples. start: the whole model, for methods that
    draw with it.
    """

    parts: Forced
    tokens: Tokens
    held_out: Tokens
    batch_size: int
    recipe: dict[str, Any]
    seed: int = 0
    condition_drop: float = 0.1
    draw: Callable[[], Image.Image] | None = None
    start: Pipeline | None = None

    def keywords(self) -> dict[str, Any]:
        """The fields by name, as `NextStepTask` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "start"}


class Method(Protocol):
    """Settings of a post-training, a frozen dataclass of plain values.

    share: the part of the model's own training steps that it takes unless told otherwise. lr_share: its learning rate
    as a part of the training's highest.
    """

    share: ClassVar[float]
    lr_share: ClassVar[float]

    def task(self, material: Material) -> Task:
        """What is trained: its modules `generator` and `head` are the finished model's. Raises `UserError` for a model
        that the method does not fit.
        """
        ...

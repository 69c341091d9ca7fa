"""Conditioners turn what a user asks for into a steering vector and, for prompts, a memory to attend to.

Legend: N rows, D condition width, M memory length.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.generators.text import BEGIN, PAD, TextConfig, TextEncoder, TextFeaturesConfig
from varkit.nn.linear import Linear


@dataclass(frozen=True)
class ClassConfig:
    """`classes` labels, 0 to classes - 1; one more row stands for "no label". names: what users may call them."""

    classes: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise UserError(
                f"classes {self.classes} is below 1; a class-conditional model needs at least one label"
            )
        if len(self.names) not in (0, self.classes):
            raise UserError(
                f"names has {len(self.names)} entries; it must have {self.classes}, one for each class, or none"
            )


class Conditioner(nn.Module, ABC):
    """Conditions by name -> (vector (N, D), memory (N, M, C) or None, its mask (N, M) or None)."""

    memory_width: int

    @abstractmethod
    def forward(self, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Everything the generator needs to know of what was asked for."""

    @abstractmethod
    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same shape, asking for nothing."""

    def initialise(self) -> None:
        """What a generator's initialisation must not leave as it made it; nothing here."""


class ClassCondition(Conditioner):
    """A row of a table for each label: {"label": (N,)} -> vector (N, D), no memory."""

    memory_width = 0

    def __init__(self, config: ClassConfig, width: int) -> None:
        super().__init__()
        self.classes = config.classes
        self.embed = nn.Embedding(config.classes + 1, width)

    def forward(self, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.embed(condition["label"]), None, None

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"label": torch.full_like(condition["label"], self.classes)}


class TextCondition(Conditioner):
    """A small encoder trained with the generator: {"text": (N, T)} -> vector (N, D), memory (N, T, C), mask (N, T)."""

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.encoder = TextEncoder(config)
        self.memory_width = config.width
        self.project = Linear(config.width, width)

    def forward(self, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        memory, mask, pooled = self.encoder(condition["text"])
        return self.project(pooled), memory, mask

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"text": empty_prompt(condition["text"])}

    def initialise(self) -> None:
        """The encoder starts by its own width."""
        self.encoder.initialise()


def class_or_text(config: ClassConfig | TextConfig, width: int) -> Conditioner:
    """The conditioner of a generator of this width that takes either."""
    return ClassCondition(config, width) if isinstance(config, ClassConfig) else TextCondition(config, width)


class ReadingCondition(Conditioner):
    """{"features": (N, T, D), "mask": (N, T) bool} from outside, or {"text": (N, T)} for an encoder trained along.

    Words that ask for nothing are the empty prompt; features that do are the subclass's (`empty`), under the mask of
    the prompt that they stand for.
    """

    def __init__(self, config: TextConfig | TextFeaturesConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config) if isinstance(config, TextConfig) else None

    def read(self, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features (N, T, D), and their mask (N, T). Raises `UserError` for features that do not fit."""
        if self.encoder is not None:
            features, mask, _ = self.encoder(condition["text"])
            return features, mask
        assert isinstance(self.config, TextFeaturesConfig)
        self.config.check(condition["features"])
        return condition["features"], condition["mask"]

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.encoder is not None:
            return {"text": empty_prompt(condition["text"])}
        features, mask = self.read(condition)
        return {"features": self.empty(features, mask).to(features.dtype), "mask": mask}

    @abstractmethod
    def empty(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features of the same shape (..., T, D) that ask for nothing."""

    def initialise(self) -> None:
        """The encoder starts by its own width."""
        if self.encoder is not None:
            self.encoder.initialise()


def empty_prompt(text: Tensor) -> Tensor:
    """Ids (..., T) of the prompt without words."""
    empty = torch.full_like(text, PAD)
    empty[..., 0] = BEGIN
    return empty


def drop_condition(conditioner: Conditioner, condition: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Replace each sample's condition by the null one with probability `rate` (classifier-free guidance training).

    Draws from torch's generator; condition tensors are (N, ...)."""
    null = conditioner.null(condition)
    first = next(iter(condition.values()))
    drop = torch.rand(first.shape[0], device=first.device) < rate
    return {k: torch.where(drop.view(-1, *([1] * (v.ndim - 1))), null[k], v) for k, v in condition.items()}

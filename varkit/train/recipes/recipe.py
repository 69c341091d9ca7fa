"""A recipe: everything that makes a model from pictures."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from varkit.errors import UserError
from varkit.generators.base import GeneratorConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Settings
from varkit.plans.schedule import Side
from varkit.tokenizers.base import TokenizerConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.lessons import Lessons, WholePlan
from varkit.train.task import TrainConfig
from varkit.train.tokenizer_loss import TokenizerLossConfig

PYRAMID: tuple[Side, ...] = (1, 2, 3, 4, 6, 8)
"""Scales of pictures of 64 x 64, at 8 pixels a position."""


@dataclass(frozen=True)
class TokenizerRecipe:
    """How the tokenizer is built and trained, None for one that has nothing to learn. share: part of `--minutes` that
    it gets.

    decoder: how its decoder goes on alone afterwards, for the squared error; with `--minutes`, a fifth of the share.
    """

    config: TokenizerConfig
    train: TrainConfig | None
    loss: TokenizerLossConfig = TokenizerLossConfig()
    batch_size: int = 32
    share: float = 0.35
    decoder: TrainConfig | None = None


@dataclass(frozen=True)
class FurtherRecipe:
    """How a trained generator is trained further, as a stage of its own, over the same tokens.

    begin(generator, head, head of `route`) makes ready and returns what of the generator is trained, beside that head;
    everything else is frozen. share: part of the generator's `--minutes` that it gets.
    """

    name: str
    route: str
    begin: Callable[[Any, Any, Any], Iterable[Tensor]]
    teach: Callable[[Any, Any], Lessons]
    train: TrainConfig
    batch_size: int = 64
    share: float = 0.3


@dataclass(frozen=True)
class GeneratorRecipe:
    """How the generator is built and trained, and over how many encoded pictures.

    progressive: the part of the run by which all scales have joined (VAR's progressive training); 0 trains all at once.
    teach(tokenizer, plan) makes the lessons. settings: how the model samples by default.
    parts: configurations in place of the head or plan that the generator has by default, by name. further: a second
    stage.
    """

    config: GeneratorConfig
    train: TrainConfig
    batch_size: int = 64
    pictures: int = 4096
    condition_drop: float = 0.1
    progressive: float = 0.0
    teach: Callable[[Any, Any], Lessons] = WholePlan
    settings: Settings = Settings()
    parts: Mapping[str, Any] = field(default_factory=dict)
    further: FurtherRecipe | None = None


@dataclass(frozen=True)
class Recipe:
    """A name, the data set it is made from, and both stages. prompts: what sample grids ask for."""

    name: str
    dataset: str
    tokenizer: TokenizerRecipe
    generator: GeneratorRecipe
    prompts: tuple[str | int, ...] = field(default=())


def next_scale(base: Recipe) -> tuple[MultiScaleVQConfig, VARConfig]:
    """The tokenizer and generator of a recipe by VAR, which those of other systems are derived from.

    Raises `UserError` for a recipe that is of another system already.
    """
    tokenizer, generator = base.tokenizer.config, base.generator.config
    if type(tokenizer) is not MultiScaleVQConfig or type(generator) is not VARConfig:
        raise UserError(
            f"the recipe {base.name!r} has a system of its own; choose one for your own pictures, a data set, or a "
            "recipe by VAR such as scenes"
        )
    return tokenizer, generator


def part_of(train: TrainConfig, share: float) -> TrainConfig:
    """A training for a share of its steps, or of its minutes; above 1 for more."""
    steps = None if train.steps is None else round(train.steps * share)
    return replace(train, steps=steps, minutes=None if train.minutes is None else train.minutes * share)


def longer(recipe: Recipe, times: float) -> Recipe:
    """The recipe with `times` as much training of its generator."""
    generator = replace(recipe.generator, train=part_of(recipe.generator.train, times))
    return replace(recipe, generator=generator)

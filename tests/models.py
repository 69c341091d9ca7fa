"""Tiny models with random weights, saved once a session: `text_model` and `class_model` are their folders.

A test file takes them by `class_model = models.class_model`.
"""

from pathlib import Path

import pytest
import torch

from varkit.data.registry import open_dataset
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.recipes import GeneratorRecipe, Recipe, TokenizerRecipe
from varkit.train.run import Request, train_recipe
from varkit.train.task import TrainConfig

SCHEDULE = (1, 2, 3)
CLASSES = ("cat", "dog", "owl")
WORDS = ("a", "red", "blue", "circle", "square")
CODES, CODE_WIDTH, WIDTH = 16, 4, 32


def tiny_pipeline(condition: ClassConfig | TextConfig, seed: int = 0, **changes: object) -> Pipeline:
    """Random weights; pictures of 6 x 6 pixels. `changes` are to the generator's configuration."""
    conv = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8)
    settings = {"width": WIDTH, "heads": 4, "code_width": CODE_WIDTH, "condition": condition} | changes
    generator = VARConfig.published(2, SCHEDULE, **settings)
    configs = {
        "tokenizer": MultiScaleVQConfig(conv, CODES, CODE_WIDTH, SCHEDULE),
        "generator": generator,
        "head": CategoricalConfig(generator.width, CODES),
        "plan": ScalesConfig(SCHEDULE),
    }
    torch.manual_seed(seed)
    parts = {name: config.build() for name, config in configs.items()}  # type: ignore[attr-defined]
    return Pipeline(parts, configs, Settings(guidance=2.0), {"data": "none"})


def tiny_recipe() -> Recipe:
    """Digits at 6 x 6 pixels, trained for as short as can be."""
    conv = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8, attention=False)
    briefly = TrainConfig(minutes=1e-3)
    generator = VARConfig(2, WIDTH, 4, SCHEDULE, CODE_WIDTH, ClassConfig(10))
    return Recipe(
        "tiny",
        "digits",
        TokenizerRecipe(MultiScaleVQConfig(conv, CODES, CODE_WIDTH, SCHEDULE), briefly, batch_size=4),
        GeneratorRecipe(generator, briefly, batch_size=4, pictures=32),
        prompts=(0, 1),
    )


def train_tiny(folder: Path) -> Path:
    """Train the tiny recipe in a folder, a step of each stage; returns the folder."""
    train_recipe(
        Request("tiny", steps=1), tiny_recipe(), open_dataset("digits"), folder, say=lambda text: None
    )
    return folder


@pytest.fixture(scope="session")
def class_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a class model: labels 0 to 2."""
    folder = tmp_path_factory.mktemp("models") / "class"
    tiny_pipeline(ClassConfig(len(CLASSES), CLASSES)).save(folder)
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a text model: prompts of up to 7 of `WORDS`."""
    folder = tmp_path_factory.mktemp("models") / "text"
    tiny_pipeline(TextConfig(WORDS, length=8, width=16, depth=1)).save(folder)
    return folder

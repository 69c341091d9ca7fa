"""Captioned scenes by MAR: continuous tokens in random order, each drawn by a small diffusion head."""

from dataclasses import replace

from varkit.generators.mar import MARConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.kl import KLConfig
from varkit.train.masked_lessons import MaskedLessons
from varkit.train.recipes.recipe import GeneratorRecipe, Recipe
from varkit.train.recipes.scenes import CONV, GENERATOR_TRAIN, TEXT, of_scenes


def mar_scenes() -> Recipe:
    """Sixty-four tokens of 16 numbers. Dropout of attention, which keeps its fast path from use, is left out."""
    tokenizer = KLConfig(replace(CONV, latent_channels=16), grid=8)
    generator = MARConfig(
        depth=4, width=192, heads=3, condition=TEXT, grid=8, buffer=TEXT.length, dropout=0.0, attention_dropout=0.0
    )  # fmt: skip
    return of_scenes(
        "mar-scenes",
        tokenizer,
        GeneratorRecipe(
            generator,
            GENERATOR_TRAIN,
            pictures=128_000,
            teach=MaskedLessons,
            settings=Settings(ramp=True, guidance=3.0),
        ),
    )

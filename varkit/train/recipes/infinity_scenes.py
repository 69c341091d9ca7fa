"""Captioned scenes by Infinity: bits instead of codes, and a generator taught to correct its own."""

from dataclasses import replace

from varkit.generators.infinity import InfinityConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.train.recipes.recipe import PYRAMID, GeneratorRecipe, Recipe
from varkit.train.recipes.scenes import CONV, GENERATOR_TRAIN, TEXT, of_scenes
from varkit.train.self_correction import SelfCorrection

BITS = 16


def infinity_scenes() -> Recipe:
    """The small text encoder stands in for flan-t5-xl; the pyramid is that of `scenes`."""
    tokenizer = BitwiseConfig(
        replace(CONV, latent_channels=BITS), PYRAMID, entropy=0.1, encoder=PatchEncoderConfig()
    )
    generator = InfinityConfig(
        depth=8,
        width=192,
        heads=3,
        code_width=BITS,
        condition=TEXT,
        levels=len(PYRAMID),
        gate_init=0.5,
        modulation_init=0.5,
    )
    return of_scenes(
        "infinity-scenes",
        tokenizer,
        GeneratorRecipe(
            generator,
            GENERATOR_TRAIN,
            pictures=128_000,
            teach=SelfCorrection,
            settings=Settings(ramp=True, guidance=2.5),
        ),
    )

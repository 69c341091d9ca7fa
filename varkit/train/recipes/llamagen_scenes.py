"""Captioned scenes by LlamaGen: one grid of codes, token by token, behind the words of the caption."""

from dataclasses import replace

from varkit.generators.llamagen import LlamaGenConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.vq import VQConfig
from varkit.train.recipes.recipe import GeneratorRecipe, Recipe
from varkit.train.recipes.scenes import CONV, GENERATOR_TRAIN, TEXT, of_scenes


def llamagen_scenes() -> Recipe:
    """Patches of 4 pixels: without coarser scales to add to, a code for 8 x 8 pixels says too little of a shape."""
    conv = replace(CONV, multipliers=(1,))
    tokenizer = VQConfig(
        conv, vocab_size=1024, code_channels=8, grid=16, rate=1.0, encoder=PatchEncoderConfig()
    )
    generator = LlamaGenConfig(
        depth=8, width=192, heads=3, vocab_size=tokenizer.vocab_size, condition=TEXT, multiple_of=64
    )
    return of_scenes(
        "llamagen-scenes",
        tokenizer,
        GeneratorRecipe(
            generator,
            replace(GENERATOR_TRAIN, steps=12_000, lr=1.5e-3),
            batch_size=32,
            pictures=192_000,
            settings=Settings(guidance=2.5, top_p=0.95),
        ),
    )

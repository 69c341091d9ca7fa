"""MAR: continuous tokens in random order, each drawn by a small diffusion head."""

from dataclasses import replace

from varkit.generators.mar import MARConfig
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.kl import KLConfig
from varkit.train.masked_lessons import MaskedLessons
from varkit.train.recipes.recipe import Recipe, longer, next_scale
from varkit.train.recipes.scenes import scenes_small

CLASS_SLOTS = 16


def mar(base: Recipe) -> Recipe:
    """The base's finest scale alone, in numbers: 16 a token. Dropout of attention, which keeps its fast path from use,
    is left out. Encoder and decoder have half the base's blocks each.
    """
    pyramid, var = next_scale(base)
    conv, grid = replace(pyramid.conv, latent_channels=16), pyramid.schedule[-1]
    buffer = var.condition.length if isinstance(var.condition, TextConfig) else CLASS_SLOTS
    generator = MARConfig(
        max(1, var.depth // 2), var.width, var.heads, var.condition, grid, buffer=buffer, dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    part = replace(
        base.generator, config=generator, teach=MaskedLessons, settings=Settings(ramp=True, guidance=3.0)
    )
    tokenizer = replace(base.tokenizer, config=KLConfig(conv, grid), decoder=None)
    return replace(base, tokenizer=tokenizer, generator=part)


def mar_scenes() -> Recipe:
    """Captioned scenes, of 64 tokens. A step teaches the masked positions alone, so it takes more than its base."""
    return longer(replace(mar(scenes_small()), name="mar-scenes"), 4)

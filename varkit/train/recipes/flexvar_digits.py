"""Digits by FlexVAR: maps that do not add up, in a schedule of its own for each training step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig
from varkit.generators.var import VARConfig
from varkit.tokenizers.map_vq import MapVQConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import Recipe
from varkit.train.schedule_lessons import ScheduleLessons

VALIDATED: Sequence[tuple[int, ...]] = ((1, 2, 4, 8), (1, 2, 3, 5, 8), (1, 2, 3, 4, 5, 6, 7, 8))
"""Schedules of 4, 5 and 8 steps, beside the pyramid's 6; with sides up to 8, training draws 4 to 6."""


def taught(tokenizer: Any, plan: Any) -> ScheduleLessons:
    """Random schedules, validated on several."""
    return ScheduleLessons(tokenizer, plan, others=VALIDATED)


def flexvar_digits() -> Recipe:
    """The codes, steps, pictures and generator of `digit_scales`; its maps share no codes with that pyramid's."""
    base = digit_scales()
    pyramid, var = base.tokenizer.config, base.generator.config
    assert isinstance(pyramid, MultiScaleVQConfig) and isinstance(var, VARConfig)
    assert isinstance(var.condition, ClassConfig)
    tokenizer = MapVQConfig(pyramid.conv, pyramid.vocab_size, pyramid.code_channels, pyramid.schedule)
    generator = FlexVARConfig(
        var.depth, var.width, var.heads, tokenizer.code_channels, var.condition, table=16,
        drop_path=var.drop_path, adaln_init=var.adaln_init,
    )  # fmt: skip
    return replace(
        base,
        name="flexvar-digits",
        tokenizer=replace(base.tokenizer, config=tokenizer),
        generator=replace(base.generator, config=generator, teach=taught),
    )

"""FlexVAR: maps that do not add up, in a schedule of its own for each training step."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from varkit.generators.flexvar import FlexVARConfig
from varkit.plans.schedule import Schedule
from varkit.tokenizers.map_vq import MapVQConfig
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import Recipe, next_scale
from varkit.train.schedule_lessons import ScheduleLessons

VALIDATED: Sequence[tuple[int, ...]] = ((1, 2, 4, 8), (1, 2, 3, 5, 8), (1, 2, 3, 4, 5, 6, 7, 8))
"""Schedules of 4, 5 and 8 steps, beside the pyramid's 6; with sides up to 8, training draws 4 to 6."""


def flexvar(base: Recipe) -> Recipe:
    """The codes, steps, pictures and generator of the base; its maps share no codes with that pyramid's.

    Its decoder does not go on alone, which would be with the finest maps alone. A temperature for each of the base's
    scales would not fit other schedules.
    """
    pyramid, var = next_scale(base)
    tokenizer = MapVQConfig(pyramid.conv, pyramid.vocab_size, pyramid.code_channels, pyramid.schedule)
    largest = max(Schedule.parse(pyramid.schedule).last)
    generator = FlexVARConfig(
        var.depth, var.width, var.heads, tokenizer.code_channels, var.condition, table=2 * largest,
        shared_modulation=var.shared_modulation, drop_path=var.drop_path, adaln_init=var.adaln_init,
    )  # fmt: skip
    part = replace(
        base.generator,
        config=generator,
        teach=partial(ScheduleLessons, others=VALIDATED),
        settings=replace(base.generator.settings, temperature=1.0),
    )
    return replace(base, tokenizer=replace(base.tokenizer, config=tokenizer, decoder=None), generator=part)


def flexvar_digits() -> Recipe:
    """FlexVAR on the digits of `digit-scales`."""
    return replace(flexvar(digit_scales()), name="flexvar-digits")

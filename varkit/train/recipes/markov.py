"""MVAR: VAR's network under a plan whose scales see only themselves."""

from dataclasses import replace

from varkit.plans.scales import ScalesConfig, Windows
from varkit.plans.schedule import Schedule
from varkit.train.mixed_scales import MixedScales
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import Recipe, next_scale


def markov(base: Recipe) -> Recipe:
    """Tokens, data, parameters and steps of the base; each step takes all scales at once.

    Windows are on the two largest grids, as in the paper; 5 of 8 is to the grid about what 7 of 13 is.
    """
    pyramid, _ = next_scale(base)
    schedule = Schedule.parse(pyramid.schedule)
    side = max(schedule.last) * 5 // 8
    windows = Windows(side + 1 - side % 2, least=min(schedule.sides[-2:][0]))
    plan = ScalesConfig(pyramid.schedule, history=0, windows=windows)
    return replace(base, generator=replace(base.generator, parts={"plan": plan}))


def markov_digits() -> Recipe:
    """MVAR on the digits of `digit-scales`."""
    return replace(markov(digit_scales()), name="markov-digits")


def markov_digits_mixed() -> Recipe:
    """The same in steps of a few scales each."""
    base = markov_digits()
    return replace(base, name="markov-digits-mixed", generator=replace(base.generator, teach=MixedScales))

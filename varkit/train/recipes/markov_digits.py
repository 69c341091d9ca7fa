"""Digits by MVAR: the network of `digit-scales` under a plan whose scales see only themselves."""

from dataclasses import replace

from varkit.plans.scales import ScalesConfig, Windows
from varkit.train.mixed_scales import MixedScales
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import PYRAMID, Recipe

WINDOWS = Windows(5, least=6)
"""On the two largest grids, 6 and 8, as in the paper; 5 of 8 is to the grid about what 7 of 13 is."""


def markov_digits() -> Recipe:
    """Tokens, data, parameters and steps of `digit-scales`; each step takes all scales at once."""
    base = digit_scales()
    plan = ScalesConfig(PYRAMID, history=0, windows=WINDOWS)
    return replace(base, name="markov-digits", generator=replace(base.generator, parts={"plan": plan}))


def markov_digits_mixed() -> Recipe:
    """The same in steps of a few scales each."""
    base = markov_digits()
    return replace(base, name="markov-digits-mixed", generator=replace(base.generator, teach=MixedScales))

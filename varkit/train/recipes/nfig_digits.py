"""Digits by NFIG: the base of next-scale comparisons over a tokenizer whose levels take bands of frequencies."""

from dataclasses import replace

from varkit.tokenizers.frequency import FrequencyVQConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import Recipe


def nfig_digits() -> Recipe:
    """VAR's generator, unchanged; the tokenizer differs in its bands, and in having no phi."""
    base = digit_scales()
    return replace(base, name="nfig-digits", tokenizer=replace(base.tokenizer, config=banded(base)))


def banded(recipe: Recipe, bands: str = "nested_square") -> FrequencyVQConfig:
    """The tokenizer of a recipe with bands by a rule, without phi."""
    own = recipe.tokenizer.config
    assert isinstance(own, MultiScaleVQConfig)
    return FrequencyVQConfig(
        own.conv, own.vocab_size, own.code_channels, own.schedule, beta=own.beta, rate=own.rate, encoder=own.encoder,
        bands=bands,
    )  # fmt: skip

"""NFIG: VAR's generator, unchanged, over a tokenizer whose levels take bands of frequencies."""

from dataclasses import replace

from varkit.tokenizers.frequency import FrequencyVQConfig
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.recipe import Recipe, next_scale


def nfig(base: Recipe, bands: str = "nested_square") -> Recipe:
    """The base, but for its tokenizer's bands, by a rule, and phi, which it is without."""
    own, _ = next_scale(base)
    banded = FrequencyVQConfig(
        own.conv, own.vocab_size, own.code_channels, own.schedule, beta=own.beta, rate=own.rate, encoder=own.encoder,
        bands=bands,
    )  # fmt: skip
    return replace(base, tokenizer=replace(base.tokenizer, config=banded))


def nfig_digits() -> Recipe:
    """NFIG on the digits of `digit-scales`."""
    return replace(nfig(digit_scales()), name="nfig-digits")

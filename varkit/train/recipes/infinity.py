"""Infinity: bits instead of codes, and a generator taught to correct its own."""

from dataclasses import replace

from varkit.errors import UserError
from varkit.generators.infinity import InfinityConfig
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.train.recipes.recipe import Recipe, longer, next_scale
from varkit.train.recipes.scenes import scenes_small
from varkit.train.self_correction import SelfCorrection

BITS = 16
ENTROPY = 0.001
"""Weight of the bits' entropy. By 0.1 or 0.01 of it bits of scenes become even and say nothing of the picture."""

PULL = 0.002
"""Weight of the features' distance from sums of codes, in place of the paper's commitment. Without it features of
scenes grow to fifty times a code, and most scales repeat the same signs; 0.01 and more cost the picture more."""


def infinity(base: Recipe) -> Recipe:
    """The base's pyramid in bits. Raises `UserError` for pictures without captions, by which Infinity is told."""
    pyramid, var = next_scale(base)
    if not isinstance(var.condition, TextConfig):
        raise UserError(
            f"the pictures of {base.dataset!r} have no captions, which Infinity is told by; choose another system, "
            "such as var"
        )
    tokenizer = BitwiseConfig(
        replace(pyramid.conv, latent_channels=BITS),
        pyramid.schedule,
        entropy=ENTROPY,
        commitment=0.0,
        pull=PULL,
        encoder=pyramid.encoder,
    )
    generator = InfinityConfig(
        var.depth, var.width, var.heads, BITS, var.condition, levels=len(pyramid.schedule), drop_path=var.drop_path,
        gate_init=0.5, modulation_init=0.5,
    )  # fmt: skip
    part = replace(
        base.generator, config=generator, teach=SelfCorrection, settings=Settings(ramp=True, guidance=2.5)
    )
    return replace(base, tokenizer=replace(base.tokenizer, config=tokenizer), generator=part)


def infinity_scenes() -> Recipe:
    """Captioned scenes; the small text encoder stands in for flan-t5-xl."""
    return longer(replace(infinity(scenes_small()), name="infinity-scenes"), 2)

"""Digits over six scales: the base that next-scale methods are compared with, trained by steps, not minutes.

Equal steps over equal pictures are an equal budget on any machine, and a longer pyramid than that of `digits` leaves
methods something to differ in.
"""

from dataclasses import replace

from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.recipes.digits import digits
from varkit.train.recipes.recipe import PYRAMID, Recipe


def digit_scales() -> Recipe:
    """VAR on digits at 32 x 32 by class: 130 codes of 4 x 4 pixels."""
    base = digits()
    assert base.tokenizer.train is not None
    conv = ConvConfig(
        32, multipliers=(1, 2), res_blocks=1, latent_channels=32, attention=False, groups=8, patch=2
    )
    tokenizer = MultiScaleVQConfig(conv, vocab_size=256, code_channels=8, schedule=PYRAMID)
    # so few channels are twice as fast in float32 as in bfloat16 on a CPU
    train = replace(base.tokenizer.train, minutes=None, steps=1000, dtype="float32", channels_last=True)
    return replace(
        base,
        name="digit-scales",
        tokenizer=replace(base.tokenizer, config=tokenizer, train=train),
        generator=replace(
            base.generator, train=replace(base.generator.train, minutes=None, steps=1200), batch_size=32
        ),
    )

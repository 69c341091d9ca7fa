"""LlamaGen: one grid of codes, token by token."""

from dataclasses import replace

from varkit.generators.llamagen import LlamaGenConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.vq import VQConfig
from varkit.train.lessons import WholePlan
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.digits import digits
from varkit.train.recipes.recipe import Recipe, next_scale
from varkit.train.recipes.scenes import CONV, GENERATOR_TRAIN, small_scenes


def llamagen(base: Recipe) -> Recipe:
    """The base's finest scale alone, in raster order. A block has 12 C^2 weights, and VAR's 18 where it modulates by
    itself; so there are half as many again, which gives the parameters of `digits` within 7 %.
    """
    pyramid, var = next_scale(base)
    grid = VQConfig(
        pyramid.conv, pyramid.vocab_size, pyramid.code_channels, pyramid.schedule[-1], normalize=False,
        rate=pyramid.rate, encoder=pyramid.encoder,
    )  # fmt: skip
    depth = var.depth if var.shared_modulation else var.depth * 3 // 2
    generator = LlamaGenConfig(
        depth, var.width, var.heads, grid.vocab_size, var.condition, multiple_of=64, drop_path=var.drop_path
    )
    settings = replace(base.generator.settings, ramp=False, temperature=1.0)
    return replace(
        base,
        tokenizer=replace(base.tokenizer, config=grid),
        generator=replace(base.generator, config=generator, teach=WholePlan, settings=settings),
    )


def digits_raster() -> Recipe:
    """LlamaGen on the digits of `digits`."""
    return replace(llamagen(digits()), name="digits-raster")


def digit_grid() -> Recipe:
    """LlamaGen on the digits of `digit-scales`: a grid of 8 x 8."""
    return replace(llamagen(digit_scales()), name="digit-grid")


def llamagen_scenes() -> Recipe:
    """Behind the words of captions, at patches of 4 pixels: without coarser scales to add to, a code for 8 x 8 pixels
    says too little of a shape.
    """
    base = llamagen(small_scenes())
    conv = replace(CONV, multipliers=(1,))
    tokenizer = VQConfig(
        conv, vocab_size=1024, code_channels=8, grid=16, rate=1.0, encoder=PatchEncoderConfig()
    )
    part = replace(
        base.generator,
        train=replace(GENERATOR_TRAIN, steps=12_000, lr=1.5e-3),
        batch_size=32,
        pictures=192_000,
        settings=Settings(guidance=2.5, top_p=0.95),
    )
    return replace(
        base, name="llamagen-scenes", tokenizer=replace(base.tokenizer, config=tokenizer), generator=part
    )

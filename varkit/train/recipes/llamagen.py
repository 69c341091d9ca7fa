"""LlamaGen: one grid of codes, token by token."""

from dataclasses import replace

from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.vq import VQConfig
from varkit.train.lessons import WholePlan
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.digits import digits
from varkit.train.recipes.recipe import Recipe, next_scale
from varkit.train.recipes.scenes import scenes_small


def llamagen(base: Recipe) -> Recipe:
    """The base's finest scale alone, in raster order, in as many more blocks as makes up for their smaller size.

    A block has 12 C^2 weights, VAR's 6 C^2 more where it modulates by itself and 4 C^2 where it attends to words. So
    generator and head have the base's parameters within 7 % in the recipes here.
    """
    pyramid, var = next_scale(base)
    grid = VQConfig(
        pyramid.conv, pyramid.vocab_size, pyramid.code_channels, pyramid.schedule[-1], normalize=False,
        rate=pyramid.rate, encoder=pyramid.encoder,
    )  # fmt: skip
    block = 12 + (0 if var.shared_modulation else 6) + (4 if isinstance(var.condition, TextConfig) else 0)
    depth = round(var.depth * block / 12)
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
    base = llamagen(scenes_small())
    config = base.tokenizer.config
    assert isinstance(config, VQConfig)
    tokenizer = replace(
        config,
        conv=replace(config.conv, multipliers=(1,)),
        code_channels=8,
        grid=16,
        normalize=True,
        encoder=PatchEncoderConfig(width=192),
    )
    part = replace(base.generator, settings=Settings(guidance=1.5, top_p=0.95))
    return replace(
        base, name="llamagen-scenes", tokenizer=replace(base.tokenizer, config=tokenizer), generator=part
    )

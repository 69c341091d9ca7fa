"""scikit-learn's handwritten digits at 32 x 32, scale by scale and token by token."""

from dataclasses import replace

from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Settings
from varkit.plans.schedule import Side
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.vq import VQConfig
from varkit.train.recipes.recipe import GeneratorRecipe, Recipe, TokenizerRecipe
from varkit.train.task import TrainConfig


def digits() -> Recipe:
    """scikit-learn's handwritten digits at 32 x 32, by class."""
    side: tuple[Side, ...] = (1, 2, 3, 4)
    tokenizer = MultiScaleVQConfig(
        ConvConfig(48, multipliers=(1, 1, 2), res_blocks=1, latent_channels=32, attention=False, groups=8, patch=2),
        vocab_size=256, code_channels=8, schedule=side,
    )  # fmt: skip
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    generator = VARConfig(
        depth=4,
        width=128,
        heads=4,
        schedule=side,
        code_width=8,
        condition=ClassConfig(10, names),
        adaln_init=0.5,
        drop_path=0.1,
    )
    return Recipe(
        "digits",
        "digits",
        TokenizerRecipe(
            tokenizer,
            TrainConfig(minutes=2.5, lr=1.5e-3, weight_decay=1e-4, clip=1.0, final=0.02, dtype="bfloat16"),
        ),
        GeneratorRecipe(
            generator,
            TrainConfig(minutes=3.5, lr=2e-3, dtype="bfloat16", weight_decay=0.1, final=0.02),
            pictures=12_000,
            settings=Settings(ramp=True, guidance=2.0),
        ),
        prompts=tuple(range(10)),
    )


def digits_raster() -> Recipe:
    """The digits as one grid of tokens in raster order (LlamaGen), with the parameters of `digits`, within 7 %."""
    return rastered(digits(), "digits-raster")


def rastered(base: Recipe, name: str) -> Recipe:
    """A recipe of digits by scales as one grid, that of the finest scale, in raster order."""
    pyramid, condition = base.tokenizer.config, base.generator.config.condition
    assert isinstance(pyramid, MultiScaleVQConfig) and isinstance(condition, ClassConfig)
    grid = VQConfig(
        pyramid.conv, pyramid.vocab_size, pyramid.code_channels, grid=pyramid.schedule[-1], normalize=False
    )
    generator = LlamaGenConfig(
        depth=6,
        width=128,
        heads=4,
        vocab_size=grid.vocab_size,
        condition=condition,
        multiple_of=64,
        drop_path=0.1,
    )
    return replace(
        base,
        name=name,
        tokenizer=replace(base.tokenizer, config=grid),
        generator=replace(base.generator, config=generator, settings=Settings(guidance=2.0)),
    )

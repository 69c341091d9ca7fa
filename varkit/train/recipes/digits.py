"""scikit-learn's handwritten digits at 32 x 32, scale by scale: the bundled class model."""

from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Settings
from varkit.plans.schedule import Side
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
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

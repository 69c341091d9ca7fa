"""The survey's three families (arXiv 2411.05902): pixel by pixel, token by token, scale by scale.

Digits at 16 x 16, three minutes of training for each, tokenizers included. Likelihoods are not compared, since a pixel,
a token and a scale are different things to be surprised by.
"""

from dataclasses import replace

from varkit.catalog.experiment import All, Arm, AtMost, Experiment, Part
from varkit.catalog.measures import EVALUATIONS, PARAMETERS, SECONDS, digits_read, fid_to
from varkit.catalog.models import Trained
from varkit.generators.conditioning import ClassConfig
from varkit.generators.pixelcnn import PixelCNNConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.pixels import PixelsConfig
from varkit.tokenizers.vq import VQConfig
from varkit.train.recipes import GeneratorRecipe, Recipe, TokenizerRecipe, digits, digits_raster
from varkit.train.task import TrainConfig

SIDE, PICTURES = 16, 320
MINUTES = 3.0
CONV = ConvConfig(
    48, multipliers=(1, 2), res_blocks=1, latent_channels=32, attention=False, groups=8, patch=2
)


def pixels() -> Recipe:
    """PixelCNN++ as the sheet of the survey has it for small pictures."""
    base = digits()
    condition = base.generator.config.condition
    assert isinstance(condition, ClassConfig)
    generator = GeneratorRecipe(
        PixelCNNConfig(condition, grid=(SIDE, SIDE)),
        TrainConfig(minutes=MINUTES, lr=2e-3, final=0.02),
        batch_size=32,
        pictures=12_000,
        settings=Settings(guidance=1.0),
    )
    tokenizer = TokenizerRecipe(PixelsConfig((SIDE, SIDE)), train=None)
    return replace(base, name="digits-pixels-16", tokenizer=tokenizer, generator=generator)


def smaller(recipe: Recipe) -> Recipe:
    """A recipe of digits at 16 x 16, the grid of tokens as before, in half the time."""
    tokenizer, generator = recipe.tokenizer, recipe.generator
    assert tokenizer.train is not None and isinstance(tokenizer.config, MultiScaleVQConfig | VQConfig)
    return replace(
        recipe,
        name=f"{recipe.name}-16",
        tokenizer=replace(
            tokenizer,
            config=replace(tokenizer.config, conv=CONV),
            train=replace(tokenizer.train, minutes=0.4 * MINUTES),
        ),
        generator=replace(generator, train=replace(generator.train, minutes=0.6 * MINUTES)),
    )


FAMILIES = Part(
    name="pixel, token, scale",
    paper="FID 1.92 by scales (VAR-d30) against 15.78 by tokens (VQGAN 1.4B), ImageNet 256",
    arms=(
        Arm("pixel", lambda seed: Trained(pixels(), seed)),
        Arm("token", lambda seed: Trained(smaller(digits_raster()), seed)),
        Arm("scale", lambda seed: Trained(smaller(digits()), seed)),
    ),
    metrics=(PARAMETERS, EVALUATIONS, SECONDS, fid_to("digits", PICTURES), digits_read(10)),
    rule=All(
        (
            AtMost("evaluations", "token", "pixel", 1.0),
            AtMost("evaluations", "scale", "token", 1.0),
            AtMost("seconds a picture", "token", "pixel", 1.0),
            AtMost("seconds a picture", "scale", "token", 1.0),
            AtMost("FID", "scale", "token", 1.0),
        )
    ),
)

EXPERIMENT = Experiment(
    "survey",
    "PixelCNN++, LlamaGen and VAR on class-conditional digits at 16 x 16, three minutes of training each.",
    (FAMILIES,),
)

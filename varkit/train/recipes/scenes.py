"""Captioned scenes at 64 x 64: the bundled text model, and what text models of other families share with it."""

from dataclasses import replace
from functools import partial

from varkit.data.captions import WORDS
from varkit.generators.text import TextConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.train.lessons import WholePlan
from varkit.train.recipes.recipe import PYRAMID, GeneratorRecipe, Recipe, TokenizerRecipe
from varkit.train.task import TrainConfig

TEXT = TextConfig(vocabulary=tuple(WORDS), length=24, width=192, depth=4, heads=6)
CONV = ConvConfig(
    128, multipliers=(1, 1), res_blocks=1, latent_channels=32, attention=False, groups=0, patch=4
)
"""Patches of 8 pixels, by convolutions that normalise each position by itself, so that equal patches are equal."""

TOKENIZER_TRAIN = TrainConfig(
    steps=8000, lr=1.5e-3, weight_decay=1e-4, clip=1.0, final=0.02, dtype="bfloat16", channels_last=True
)
DECODER_TRAIN = replace(TOKENIZER_TRAIN, steps=2000, lr=7e-4)
GENERATOR_TRAIN = TrainConfig(
    steps=6000, lr=2e-3, dtype="bfloat16", warmup=200, schedule="wsd", final=0.02, optimizer="muon"
)
PROMPTS = (
    "two red circles on a beige background", "a green ring left of an orange heart", "three blue stars",
    "a small white cross above a large purple square on a navy background", "a yellow triangle",
    "four black diamonds", "a blue square and a red heart", "a white star on a teal background",
)  # fmt: skip


def scenes() -> Recipe:
    """VAR over a patch-wise residual pyramid: the bundled text model."""
    tokenizer = MultiScaleVQConfig(
        CONV, vocab_size=1024, code_channels=16, schedule=PYRAMID, rate=1.0, encoder=PatchEncoderConfig()
    )
    generator = VARConfig(
        depth=8,
        width=192,
        heads=3,
        schedule=PYRAMID,
        code_width=16,
        condition=TEXT,
        shared_modulation=True,
        adaln_init=0.5,
        reach=1,
    )
    part = GeneratorRecipe(
        generator,
        replace(GENERATOR_TRAIN, steps=3523, lr=2.5e-3),
        batch_size=256,
        pictures=400_000,
        teach=partial(WholePlan, step_power=0.5),
        settings=Settings(guidance=4.0, ramp=True, temperature=(1.0, 1.0, 1.0, 0.8, 0.5, 0.2), top_p=0.95),
    )
    return Recipe(
        "scenes",
        "scenes",
        TokenizerRecipe(tokenizer, TOKENIZER_TRAIN, batch_size=16, decoder=DECODER_TRAIN),
        part,
        prompts=PROMPTS,
    )


def scenes_tidy() -> Recipe:
    """The same over tidy scenes: what `scenes` is fine-tuned on to become the bundled model of that name."""
    return replace(scenes(), name="scenes-tidy", dataset="scenes-tidy")


def scenes_small() -> Recipe:
    """Tidy scenes at sizes that a CPU trains in under an hour: what other systems begin with."""
    base = scenes_tidy()
    config = base.tokenizer.config
    assert isinstance(config, MultiScaleVQConfig) and isinstance(base.generator.config, VARConfig)
    tokenizer = replace(
        base.tokenizer,
        config=replace(config, conv=replace(CONV, channels=96)),
        train=replace(TOKENIZER_TRAIN, steps=4000),
        decoder=replace(DECODER_TRAIN, steps=1000),
    )
    generator = replace(
        base.generator,
        config=replace(base.generator.config, depth=6),
        train=replace(GENERATOR_TRAIN, steps=1250, warmup=100),
        batch_size=32,
        pictures=40_000,
        teach=WholePlan,
        settings=replace(base.generator.settings, temperature=1.0),
    )
    return replace(base, name="scenes-small", tokenizer=tokenizer, generator=generator)

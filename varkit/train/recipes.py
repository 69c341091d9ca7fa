"""Recipes: everything that makes a model from pictures, by name. `folder_recipe` fits one to a folder of any size.

Sizes were chosen by measurement on two cores; `docs/log.md` tells what else was tried.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from varkit.data.base import Dataset
from varkit.data.folder import ImageFolder
from varkit.data.registry import BUILT_IN, open_dataset
from varkit.errors import UserError, unknown_name
from varkit.generators.conditioning import ClassConfig
from varkit.generators.infinity import InfinityConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.mar import MARConfig
from varkit.generators.pixelcnn import PixelCNNConfig
from varkit.generators.text import TextConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Settings
from varkit.plans.schedule import Side
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.kl import KLConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.pixels import PixelsConfig
from varkit.tokenizers.vq import VQConfig
from varkit.train.lessons import Lessons, WholePlan
from varkit.train.task import TrainConfig
from varkit.train.tokenizer_loss import TokenizerLossConfig


@dataclass(frozen=True)
class TokenizerRecipe:
    """How the tokenizer is built and trained, None for one that has nothing to learn. share: part of `--minutes` that
    it gets.

    decoder: how its decoder goes on alone afterwards, for the squared error; with `--minutes`, a fifth of the share.
    """

    config: MultiScaleVQConfig | VQConfig | BitwiseConfig | KLConfig | PixelsConfig
    train: TrainConfig | None
    loss: TokenizerLossConfig = TokenizerLossConfig()
    batch_size: int = 32
    share: float = 0.35
    decoder: TrainConfig | None = None


@dataclass(frozen=True)
class GeneratorRecipe:
    """How the generator is built and trained, and over how many encoded pictures.

    progressive: the part of the run by which all scales have joined (VAR's progressive training); 0 trains all at once.
    teach(tokenizer, plan) makes the lessons. settings: how the model samples by default.
    parts: configurations in place of the head or plan that the generator has by default, by name.
    """

    config: VARConfig | LlamaGenConfig | InfinityConfig | MARConfig | PixelCNNConfig
    train: TrainConfig
    batch_size: int = 64
    pictures: int = 4096
    condition_drop: float = 0.1
    progressive: float = 0.0
    teach: Callable[[Any, Any], Lessons] = WholePlan
    settings: Settings = Settings()
    parts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A name, the data set it is made from, and both stages. prompts: what sample grids ask for."""

    name: str
    dataset: str
    tokenizer: TokenizerRecipe
    generator: GeneratorRecipe
    prompts: tuple[str | int, ...] = field(default=())


LONGEST_CAPTION = 511
PYRAMID_8 = (1, 2, 3, 4, 6, 8)


def scenes() -> Recipe:
    """Captioned scenes at 64 x 64: the bundled text model."""
    from varkit.data.captions import WORDS

    side: tuple[Side, ...] = PYRAMID_8
    tokenizer = MultiScaleVQConfig(
        ConvConfig(128, multipliers=(1, 1), res_blocks=1, latent_channels=32, attention=False, groups=0, patch=4),
        vocab_size=1024, code_channels=16, schedule=side, rate=1.0, encoder=PatchEncoderConfig(),
    )  # fmt: skip
    text = TextConfig(vocabulary=tuple(WORDS), length=24, width=192, depth=4, heads=6)
    generator = VARConfig(
        depth=8,
        width=192,
        heads=3,
        schedule=side,
        code_width=16,
        condition=text,
        shared_modulation=True,
        adaln_init=0.5,
    )
    return Recipe(
        "scenes",
        "scenes",
        TokenizerRecipe(
            tokenizer,
            TrainConfig(
                steps=8000, lr=1.5e-3, weight_decay=1e-4, clip=1.0, final=0.02, dtype="bfloat16", channels_last=True
            ),
            batch_size=16,
            decoder=TrainConfig(
                steps=2000, lr=7e-4, weight_decay=1e-4, clip=1.0, final=0.02, dtype="bfloat16", channels_last=True
            ),
        ),
        GeneratorRecipe(
            generator,
            TrainConfig(
                steps=18_000, lr=2e-3, dtype="bfloat16", warmup=200, schedule="wsd", final=0.02, optimizer="muon"
            ),
            pictures=384_000,
            teach=partial(WholePlan, step_power=0.5),
            settings=Settings(ramp=True, guidance=2.5, top_p=0.95),
        ),
        prompts=(
            "two red circles on a beige background", "a green ring left of an orange heart", "three blue stars",
            "a small white cross above a large purple square on a navy background", "a yellow triangle",
            "four black diamonds", "a blue square and a red heart", "a white star on a teal background",
        ),
    )  # fmt: skip


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
    base = digits()
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
        name="digits-raster",
        tokenizer=replace(base.tokenizer, config=grid),
        generator=replace(base.generator, config=generator, settings=Settings(guidance=2.0)),
    )


def folder_recipe(spec: str, dataset: Dataset) -> Recipe:
    """A recipe for any data set: 64 x 64; text by bytes when there are captions, else by class (one when
    unlabelled).
    """
    probe = dataset.batch([0], (64, 64))
    side: tuple[Side, ...] = PYRAMID_8
    tokenizer = TokenizerRecipe(
        MultiScaleVQConfig(
            ConvConfig(64, multipliers=(1, 1, 2), res_blocks=1, latent_channels=32, attention=False, groups=8, patch=2),
            vocab_size=1024, code_channels=16, schedule=side,
        ),
        TrainConfig(minutes=10, lr=1.5e-3, weight_decay=1e-4, clip=1.0, final=0.02, dtype="bfloat16"),
        batch_size=16,
        decoder=TrainConfig(steps=1300, lr=7e-4, weight_decay=1e-4, clip=1.0, final=0.02, dtype="bfloat16"),
    )  # fmt: skip
    if probe.captions is not None:
        condition: ClassConfig | TextConfig = TextConfig(length=_text_length(dataset))
    else:
        names = tuple(dataset.class_names or ("all",))
        condition = ClassConfig(len(names), names)
    config = VARConfig(
        depth=6, width=192, heads=3, schedule=side, code_width=16, condition=condition, shared_modulation=True,
        adaln_init=0.5, drop_path=0.05,
    )  # fmt: skip
    size = dataset.size or 50_000
    generator = GeneratorRecipe(
        config,
        TrainConfig(minutes=20, lr=1e-3, dtype="bfloat16", weight_decay=0.1, final=0.02),
        pictures=max(size, min(16 * size, 8192)),
        settings=Settings(ramp=True, guidance=2.0, top_p=0.95),
    )
    if isinstance(condition, TextConfig):
        rows = list(range(min(8, dataset.size or 8)))
        prompts: tuple[str | int, ...] = tuple(dataset.batch(rows, (64, 64)).captions or ())
    else:
        prompts = tuple(i % condition.classes for i in range(8))
    return Recipe("folder", spec, tokenizer, generator, prompts)


def _text_length(dataset: Dataset) -> int:
    """Bytes of the longest caption, and the token that begins it; some room for prompts where captions are short."""
    entries = dataset.entries if isinstance(dataset, ImageFolder) else []
    sizes = {entry.name: len(entry.caption.encode()) for entry in entries}
    longest = max(sizes, key=sizes.__getitem__, default="")
    size = sizes.get(longest, 0)
    if size > LONGEST_CAPTION:
        raise UserError(
            f"the caption of {longest!r} has {size} bytes; a model made from a folder reads at most "
            f"{LONGEST_CAPTION}: shorten it"
        )
    return max(128, size + 1)


RECIPES = {"scenes": scenes, "digits": digits, "digits-raster": digits_raster}


def find_recipe(spec: str) -> tuple[Recipe, Dataset]:
    """The recipe called `spec`, or one for the data set (by name), folder or array file it names, with its data."""
    if spec in RECIPES:
        recipe = RECIPES[spec]()
        return recipe, open_dataset(recipe.dataset)
    try:
        dataset = open_dataset(spec)
    except UserError as error:
        if str(error).startswith("unknown dataset"):
            raise unknown_name(
                "recipe", spec, {*RECIPES, *BUILT_IN}, "A folder of pictures works too."
            ) from error
        raise
    return folder_recipe(spec, dataset), dataset

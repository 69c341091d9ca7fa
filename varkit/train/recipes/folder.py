"""A recipe for any data set, fitted to its size, captions and classes."""

from varkit.data.base import Dataset
from varkit.data.folder import ImageFolder
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Settings
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.recipes.recipe import PYRAMID, GeneratorRecipe, Recipe, TokenizerRecipe
from varkit.train.task import TrainConfig

LONGEST_CAPTION = 511


def folder_recipe(spec: str, dataset: Dataset) -> Recipe:
    """A recipe for any data set: 64 x 64; text by bytes when there are captions, else by class (one when
    unlabelled).
    """
    probe = dataset.batch([0], (64, 64))
    tokenizer = TokenizerRecipe(
        MultiScaleVQConfig(
            ConvConfig(64, multipliers=(1, 1, 2), res_blocks=1, latent_channels=32, attention=False, groups=8, patch=2),
            vocab_size=1024, code_channels=16, schedule=PYRAMID,
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
        depth=6, width=192, heads=3, schedule=PYRAMID, code_width=16, condition=condition, shared_modulation=True,
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

"""Published LlamaGen checkpoints as a whole pipeline and back; `varkit.hub.published` decides which files are these.

Nothing in the weights tells the grid, since rotary positions fit any. The pixels a side are those of the trainer's
arguments, where the file holds them; else those that a file's name ends in, if it is named as published
(`c2i_L_384.pt`, `t2i_XL_stage2_512.pt`); else 384 for the classes at XL, XXL and 3B, which were released so alone, and
256 for all others.

Nor do the weights tell whose codes they draw: published tokenizers of 8 and of 16 pixels a token, for classes and for
text, all have 16384 codes. Tokens of published sizes have 16 pixels unless the arguments or a name (`_ds8`) tell
others; and a tokenizer named as published (`vq_ds16_t2i.pt`) is taken for generators of its kind alone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import SIZES, LlamaGenConfig
from varkit.generators.text import TextConfig
from varkit.hub import llamagen
from varkit.hub.assemble import Files, assembled, states_of
from varkit.hub.keymap import check_told
from varkit.hub.pipeline import Pipeline, Settings
from varkit.tokenizers.vq import VQConfig

TOKENIZER_FILE, STRIDE = "vq_ds16_c2i.pt", 16

SETTINGS = {"c2i": Settings(guidance=4.0, top_k=2000), "t2i": Settings(guidance=7.5, top_k=1000)}
"""Published sampling, for pictures that please; figures are measured without top-k, at guidance 1.65 to 2."""

PUBLISHED = {size[:2] for size in SIZES.values()}
"""Depth and width of published sizes."""

LARGE = {SIZES[size][:2] for size in ("XL", "XXL", "3B")}
"""Depth and width of what was released for classes at 384 pixels alone."""


def pipeline(
    generator: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor], about: dict[str, Any]
) -> Pipeline:
    """The parts of a published generator and tokenizer."""
    config, head = llamagen.generator_configs(generator)
    told = llamagen.tokenizer_config(tokenizer)
    if told.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer has {told.vocab_size} codes and the generator {config.vocab_size}; give the tokenizer that "
            f"the generator was trained with, such as {_tokenizer_name(config)}"
        )
    _check_kind(config, about["converted_from"])
    _check_stride(generator, config, told.conv.stride, about["converted_from"])
    told = replace(told, grid=_grid(_pixels(generator, config, about["converted_from"]), told))
    configs = {"tokenizer": told, "generator": config, "head": head, "plan": config.fitted(told)["plan"]}
    weights = dict(
        zip(("generator", "head"), llamagen.generator_from_published(generator, (config, head)), strict=True)
    )
    weights["tokenizer"] = llamagen.tokenizer_from_published(tokenizer, told)
    return assembled(configs, weights, SETTINGS[_kind(config)], about)


def files(pipeline: Pipeline) -> Files:
    """What is published of a pipeline. Raises `UserError` for a model that the published layout cannot express."""
    own, head, tokenizer, plan = (pipeline.configs[n] for n in ("generator", "head", "tokenizer", "plan"))
    if not isinstance(tokenizer, VQConfig) or isinstance(own.condition, TextConfig):
        kinds = f"{type(tokenizer).__name__}, {type(own.condition).__name__}"
        raise UserError(
            f"only LlamaGen models of classes or text features over a VQ tokenizer have a published layout, not {kinds}"
        )
    _check_tokenizer(tokenizer)
    state = states_of(pipeline)
    generator = llamagen.generator_to_published(state["generator"], state["head"])
    told, told_head = llamagen.generator_configs(generator)
    trained = {name: getattr(own, name) for name in ("multiple_of", "dropout", "drop_path")}
    if isinstance(own.condition, ClassConfig):
        trained["condition"] = own.condition
    check_told("generator", replace(own, hidden=own.inner), replace(told, **trained))
    check_told("head", head, replace(told_head, init_scale=head.init_scale))
    pixels = pipeline.size[0]
    square = replace(tokenizer, grid=_grid(pixels, tokenizer))
    check_told("tokenizer", tokenizer, square)
    check_told("plan", plan, own.fitted(square)["plan"])
    autoencoder = llamagen.tokenizer_to_published(state["tokenizer"], tokenizer)
    stride = tokenizer.conv.stride
    unusual = f"_ds{stride}" if (own.depth, own.width) in PUBLISHED and stride != STRIDE else ""
    return {
        _tokenizer_name(own, stride): (autoencoder, ("model",)),
        f"{_kind(own)}_{_name(own)}{unusual}_{pixels}.pt": (generator, ("model",)),
    }


def _check_kind(config: LlamaGenConfig, names: Sequence[str]) -> None:
    """Raise `UserError` for a tokenizer that by its name is of text where the generator is of classes, or reversed."""
    for name in names:
        found = re.fullmatch(r"vq_ds\d+_([ct]2i)", Path(name).stem)
        if found and found[1] != _kind(config):
            raise UserError(
                f"the tokenizer {name!r} is by its name for {found[1]} and the generator is for {_kind(config)}; give "
                f"the tokenizer that the generator was trained with, such as {_tokenizer_name(config)}, or rename it"
            )


def _check_stride(
    state: Mapping[str, Tensor], config: LlamaGenConfig, stride: int, names: Sequence[str]
) -> None:
    """Raise `UserError` for a tokenizer of another stride than the generator's, by the rule above."""
    named = [re.search(r"_ds(\d+)(?:_|$)", Path(name).stem) for name in names if not name.startswith("vq_")]
    if llamagen.STRIDE in state:
        wanted = int(state[llamagen.STRIDE])
    elif told := next(filter(None, named), None):
        wanted = int(told[1])
    else:
        wanted = STRIDE if (config.depth, config.width) in PUBLISHED else stride
    if stride != wanted:
        raise UserError(
            f"the tokenizer's tokens have {stride} pixels a side and the generator's {wanted}; give the tokenizer that "
            f"the generator was trained with, such as {_tokenizer_name(config, wanted)}, or end the generator's name "
            f"in _ds{stride}"
        )


def _pixels(state: Mapping[str, Tensor], config: LlamaGenConfig, names: Sequence[str]) -> int:
    """Pixels a side, by the rule above."""
    if llamagen.IMAGE_SIZE in state:
        return int(state[llamagen.IMAGE_SIZE])
    for name in names:
        if found := re.fullmatch(r"[ct]2i_.*_(\d+)", Path(name).stem):
            return int(found[1])
    return 384 if _kind(config) == "c2i" and (config.depth, config.width) in LARGE else 256


def _grid(pixels: int, tokenizer: VQConfig) -> int:
    side, rest = divmod(pixels, tokenizer.conv.stride)
    if rest or not side:
        raise UserError(
            f"pictures of {pixels} pixels a side are no multiple of the tokenizer's {tokenizer.conv.stride}; give the "
            f"tokenizer that the generator was trained with, such as {TOKENIZER_FILE}"
        )
    return side


def _tokenizer_name(config: LlamaGenConfig, stride: int = STRIDE) -> str:
    return f"vq_ds{stride}_{_kind(config)}.pt"


def _kind(config: LlamaGenConfig) -> str:
    return "c2i" if isinstance(config.condition, ClassConfig) else "t2i"


def _name(config: LlamaGenConfig) -> str:
    known = {(depth, width): name for name, (depth, width, _) in SIZES.items()}
    return known.get((config.depth, config.width), f"layer{config.depth}")


def _check_tokenizer(config: VQConfig) -> None:
    """What the published autoencoder is always like."""
    conv = replace(config.conv, attention=True, groups=32, patch=1)
    check_told("tokenizer's convolutions", config.conv, conv)
    check_told("tokenizer", config, replace(config, normalize=True, rate=0.0, encoder=None))

"""Published Infinity checkpoints as a whole pipeline and back; `varkit.hub.published` decides which files are these.

The shapes do not tell how many pixels a generator was trained for last, nor its sampling. The pixels are those that its
name tells (`infinity_125M_256x256.pth`, `infinity_8b_512x512_weights`), else 1M from 2B on and 0.06M for smaller ones;
both may be asked for other sizes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from varkit.errors import UserError
from varkit.generators.infinity import SIZES, InfinityConfig
from varkit.generators.text import TextFeaturesConfig
from varkit.hub import infinity
from varkit.hub.assemble import Files, assembled, states_of
from varkit.hub.keymap import check_told
from varkit.hub.pipeline import Pipeline, Settings
from varkit.plans.ratios import BUDGETS, SCHEDULES, scales
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.bitwise import BitwiseConfig

SETTINGS = Settings(guidance=4.0, temperature=0.5, top_p=0.97)
"""Published sampling; cfg c + (1 - cfg) u is u + s (c - u). The 8B model has guidance 3 and temperature 1."""

STRIDE = 16
"""Pixels a side of a token in all that is published: of a tokenizer's convolutions, or of its patches of 2 x 2."""

TOKENIZERS = {
    16: "infinity_vae_d16.pth",
    32: "infinity_vae_d32reg.pth",
    56: "infinity_vae_d56_f8_14_patchify.pth",
}
"""Of generators, by the bits of a token."""

LARGE = 2048
"""Width from which released models make 1M pixels."""

SIDES = {SCHEDULES[1.0][levels - 1][0] * STRIDE: budget for budget, levels in BUDGETS.items()}
"""Number of pixels of a square picture, by its side."""

RELEASED = {"layer12": "125M", "2b": "2b_reg"}
"""What follows `infinity_` in the names of files, where it is not the size's own name."""


def pipeline(
    generator: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor], about: dict[str, Any]
) -> Pipeline:
    """The parts of a published generator and tokenizer."""
    _check_variant(about["converted_from"])
    config, head = infinity.generator_configs(generator)
    plan = scales(1.0, _budget(config, about["converted_from"]))
    told = infinity.tokenizer_config(tokenizer, plan.schedule)
    told = replace(told, patch=_patch(config.code_width, told.token_bits))
    _check_stride(config, told)
    configs: dict[str, Any] = {"tokenizer": told, "generator": config, "head": head, "plan": plan}
    weights = dict(zip(("generator", "head"), infinity.generator_from_published(generator), strict=True))
    weights["tokenizer"] = infinity.tokenizer_from_published(tokenizer, told)
    patched = replace(SETTINGS, guidance=3.0, temperature=1.0)
    return assembled(configs, weights, SETTINGS if told.patch == 1 else patched, about)


def _check_variant(names: Sequence[str]) -> None:
    """Raise `UserError` for the other tokenizer of 32 bits than a generator's, by their names: shapes tell nothing."""
    regular = [name for name in names if re.match(r"infinity_2b_reg\b", name)]
    other = [name for name in names if re.match(r"infinity_vae_d32(?!_?reg)", name)]
    if regular and other:
        raise UserError(
            f"the tokenizer {other[0]!r} is by its name not the one that {regular[0]!r} was trained with; give "
            f"{TOKENIZERS[32]}, or rename it"
        )


def _budget(config: InfinityConfig, names: Sequence[str]) -> str:
    """The number of pixels to draw unless asked for another, by the rule above."""
    for side in re.findall(r"_(\d+)x\1(?!\d)", " ".join(names)):
        if (budget := SIDES.get(int(side))) is not None:
            return budget
    return _usual(config)


def _usual(config: InfinityConfig) -> str:
    return "1M" if config.width >= LARGE else "0.06M"


def files(pipeline: Pipeline) -> Files:
    """What is published of a pipeline. Raises `UserError` for a model that the published layout cannot express."""
    own, head, tokenizer = (pipeline.configs[name] for name in ("generator", "head", "tokenizer"))
    if not isinstance(tokenizer, BitwiseConfig) or not isinstance(own.condition, TextFeaturesConfig):
        kinds = f"{type(tokenizer).__name__}, {type(own.condition).__name__}"
        raise UserError(
            f"only Infinity models of text features over a bitwise tokenizer have a published layout, not {kinds}"
        )
    _check_stride(own, tokenizer)
    state = states_of(pipeline)
    name, chunks = _name(own)
    generator = infinity.generator_to_published(state["generator"], state["head"], chunks)
    autoencoder = infinity.tokenizer_to_published(state["tokenizer"], tokenizer)
    told, told_head = infinity.generator_configs(generator)
    trained = {name: getattr(own, name) for name in ("drop_path", "gate_init", "modulation_init")}
    check_told("generator", own, replace(told, **trained))
    check_told("head", head, replace(told_head, init_scale=head.init_scale))
    told_tokenizer = infinity.tokenizer_config(autoencoder, tokenizer.schedule, tokenizer.patch)
    check_told("tokenizer's convolutions", tokenizer.conv, told_tokenizer.conv)
    weighed = {name: getattr(tokenizer, name) for name in ("entropy", "commitment", "pull")}
    check_told("tokenizer", tokenizer, replace(told_tokenizer, **weighed))
    return {
        _tokenizer_name(tokenizer): (autoencoder, ("vae",)),
        _file(name, own, pipeline.configs["plan"]): (generator, ()),
    }


def _patch(token_bits: int, bits: int) -> int:
    patch = math.isqrt(token_bits // bits)
    if patch**2 * bits != token_bits:
        raise UserError(
            f"the tokenizer's codes have {bits} bits and the generator's tokens {token_bits}; give the tokenizer that "
            f"the generator was trained with{_such_as(token_bits)}"
        )
    return patch


def _check_stride(generator: InfinityConfig, tokenizer: BitwiseConfig) -> None:
    """Raise `UserError` for a published size of generator over tokens of another size than published.

    A tokenizer of a quarter of the bits would else be taken for one whose codes are patched. Sizes of one's own may
    have any stride.
    """
    stride = tokenizer.conv.stride * tokenizer.patch
    if generator.width in infinity.DEPTHS and stride != STRIDE:
        raise UserError(
            f"with codes of {tokenizer.conv.latent_channels} bits a token of {tokenizer.token_bits} covers {stride} "
            f"pixels a side, and those of published generators of width {generator.width} cover {STRIDE}; give the "
            f"tokenizer that the generator was trained with{_such_as(tokenizer.token_bits)}"
        )


def _such_as(token_bits: int) -> str:
    name = TOKENIZERS.get(token_bits)
    return f", such as {name}" if name else ""


def _name(config: InfinityConfig) -> tuple[str, int]:
    """A generator's name, and the chunks that its blocks are published in."""
    known = {(depth, width): name for name, (depth, width, _, _) in SIZES.items()}
    name = known.get((config.depth, config.width), f"layer{config.depth}")
    chunks = 4 if name.startswith("layer") else 8
    return name, chunks if config.depth % chunks == 0 else 1


def _file(name: str, config: InfinityConfig, plan: ScalesConfig) -> str:
    """The generator's file, with the side that `_budget` finds again where it is not the usual one, or released so."""
    sides = [side for side, budget in SIDES.items() if plan == scales(1.0, budget)]
    told = [f"_{side}x{side}" for side in sides if SIDES[side] != _usual(config) or name == "layer12"]
    return f"infinity_{RELEASED.get(name, name)}{''.join(told)}.pth"


def _tokenizer_name(config: BitwiseConfig) -> str:
    bits = config.conv.latent_channels
    if config.patch == 1 and bits in TOKENIZERS:
        return TOKENIZERS[bits]
    if config.patch == 1:
        return f"infinity_vae_d{bits}.pth"
    return f"infinity_vae_d{config.token_bits}_f{config.conv.stride}_{bits}_patchify.pth"

"""Published MAR checkpoints as a whole pipeline and back; `varkit.hub.published` decides which files are these."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.mar import MARConfig
from varkit.hub import mar
from varkit.hub.assemble import Files, assembled, states_of
from varkit.hub.keymap import check_told
from varkit.hub.pipeline import Pipeline, Settings
from varkit.plans.masked import MaskedConfig
from varkit.tokenizers.kl import KLConfig

TOKENIZER_FILE, GENERATOR_FILE = "kl16.ckpt", "checkpoint-last.pth"
GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}
"""Published guidance of the released sizes, by width; it rises with the part of the picture that is known."""

ITERATIONS = 64
"""The published code's default; its best figures take 256, one position each."""


def pipeline(
    generator: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor], about: dict[str, Any]
) -> Pipeline:
    """The parts of a published generator and autoencoder."""
    config, head = mar.generator_configs(generator)
    assert isinstance(config.grid, int)
    told = _tokenizer_config(tokenizer, config)
    plan = MaskedConfig((config.grid, config.grid), min(ITERATIONS, config.grid**2), config.buffer)
    configs: dict[str, Any] = {"tokenizer": told, "generator": config, "head": head, "plan": plan}
    weights = dict(
        zip(("generator", "head"), mar.generator_from_published(generator, (config, head)), strict=True)
    )
    weights["tokenizer"] = mar.tokenizer_from_published(tokenizer, told)
    settings = Settings(guidance=GUIDANCE.get(config.width, 3.0), ramp=True)
    return assembled(configs, weights, settings, about)


def files(pipeline: Pipeline) -> Files:
    """What is published of a pipeline. Raises `UserError` for a model that the published layout cannot express."""
    own, head, tokenizer = (pipeline.configs[name] for name in ("generator", "head", "tokenizer"))
    if not isinstance(tokenizer, KLConfig) or not isinstance(own.condition, ClassConfig):
        kinds = f"{type(tokenizer).__name__}, {type(own.condition).__name__}"
        raise UserError(
            f"only class-conditional MAR models over a KL tokenizer have a published layout, not {kinds}"
        )
    scale = float(pipeline.tokenizer.scale)
    if not math.isclose(scale, KLConfig.scale, rel_tol=1e-6):
        raise UserError(
            f"the published layout cannot express this model: its latents are scaled by {scale:.6g}, published ones by "
            f"{KLConfig.scale}; keep the varkit folder"
        )
    state = states_of(pipeline)
    generator = mar.generator_to_published(state["generator"], state["head"])
    autoencoder = mar.tokenizer_to_published(state["tokenizer"])
    told, told_head = mar.generator_configs(generator)
    trained = {name: getattr(own, name) for name in ("condition", "dropout", "attention_dropout")}
    check_told("generator", own, replace(told, **trained))
    sampled = {name: getattr(head, name) for name in ("repeats", "sampling_steps", "noisiest")}
    check_told("head", head, replace(told_head, **sampled))
    check_told(
        "tokenizer",
        tokenizer,
        replace(_tokenizer_config(autoencoder, told), kl=tokenizer.kl, scale=tokenizer.scale),
    )
    return {
        TOKENIZER_FILE: (autoencoder, ("model",)),
        GENERATOR_FILE: (generator, ("model", "model_ema")),
    }


def _tokenizer_config(state: Mapping[str, Tensor], generator: MARConfig) -> KLConfig:
    """The autoencoder's configuration, with the grid and the patches that the generator was trained on."""
    config = mar.tokenizer_config(state, generator.grid)
    patch = math.isqrt(generator.channels // config.conv.latent_channels)
    if patch**2 * config.conv.latent_channels != generator.channels:
        raise UserError(
            f"the generator's tokens have {generator.channels} numbers, no square patches of the autoencoder's "
            f"{config.conv.latent_channels} channels; give the autoencoder that the generator was trained with, such "
            f"as {TOKENIZER_FILE}"
        )
    return replace(config, patch=patch)

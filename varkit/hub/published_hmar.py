"""Published HMAR checkpoints as a whole pipeline and back; the tokenizer is VAR's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.hub import hmar, var
from varkit.hub.assemble import Files, assembled, states_of
from varkit.hub.keymap import check_told
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.published_var import check_pair, check_tokenizer
from varkit.hub.states import State
from varkit.plans.refined import RefinedConfig, coarse_counts
from varkit.plans.schedule import Schedule
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

SAMPLING = {16: (1.7, 1000), 20: (1.9, 950), 24: (2.1, 900), 30: (1.6, 650)}
"""Guidance and top-k of the published evaluations by depth; guidance as t of (1 + t) c - t u, which ramps up to it."""

FINER: dict[int, dict[int, tuple[int, ...]]] = {2240: {16: (5, 11)}, 9451: {16: (3, 5, 8)}}
"""By the positions of a schedule: counts beside those of `coarse_counts`, at 512 and 1024 pixels. Whether coarser
levels are refined there as at 256 is unconfirmed."""


def settings(depth: int) -> Settings:
    """Published sampling of a size; that of depth 16 is also the default."""
    t, top_k = SAMPLING.get(depth, SAMPLING[16])
    return Settings(guidance=1 + t, ramp=True, top_k=top_k, top_p=0.99)


def plan(schedule: tuple[Any, ...]) -> RefinedConfig:
    """The order with the published counts of a schedule."""
    parsed = Schedule.parse(schedule)
    return RefinedConfig(schedule, counts=coarse_counts(parsed, FINER.get(parsed.total)))


def pipeline(
    generator: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor], about: dict[str, Any]
) -> Pipeline:
    """The parts of a published generator and tokenizer."""
    config, head = hmar.generator_configs(generator)
    told = var.tokenizer_config(tokenizer, config.schedule)
    check_pair(told, config, head.vocab_size)
    configs = {
        "tokenizer": told,
        "generator": config,
        "head": head,
        "head_mask": head,
        "plan": plan(config.schedule),
    }
    states = hmar.generator_from_published(generator)
    states["tokenizer"] = var.tokenizer_from_published(tokenizer, told)
    return assembled(configs, states, settings(config.depth), about)


def files(pipeline: Pipeline) -> Files:
    """What is published of a pipeline. Raises `UserError` for a model that the published layout cannot express."""
    tokenizer, generator = pipeline.configs["tokenizer"], pipeline.configs["generator"]
    if not isinstance(tokenizer, MultiScaleVQConfig) or not isinstance(generator.condition, ClassConfig):
        raise UserError(
            "only class-conditional HMAR over VAR's tokenizer has a published layout; this one is "
            f"{type(tokenizer).__name__}, {type(generator.condition).__name__}"
        )
    state, conv = states_of(pipeline), tokenizer.conv
    autoencoder = var.tokenizer_to_published(state["tokenizer"], tokenizer)
    transformer = hmar.generator_to_published(state, generator)
    _check_expressible(pipeline.configs, transformer)
    check_tokenizer(tokenizer, autoencoder, generator.schedule)
    return {
        f"vae_ch{conv.channels}v{tokenizer.vocab_size}z{tokenizer.code_channels}.pth": (autoencoder, ()),
        f"hmar-d{generator.depth}.pth": (transformer, ()),
    }


def _check_expressible(configs: Mapping[str, Any], generator: State) -> None:
    told, told_head = hmar.generator_configs(generator)
    own = configs["generator"]
    told = replace(told, drop_path=own.drop_path, adaln_init=own.adaln_init, condition=own.condition)
    check_told("generator", own, told)
    for name in ("head", "head_mask"):
        check_told(name, configs[name], replace(told_head, init_scale=configs[name].init_scale))

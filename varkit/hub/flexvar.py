"""Published FlexVAR checkpoints (jiaosiyu1999/FlexVAR: `FlexVAE.pth`, `FlexVARd16-epo179.pth` ...) <-> our parts.

The tokenizer has LlamaGen's layout, the generator VAR's without levels; its table of positions comes channels first.
Nothing in the files tells a schedule, which is a choice at run time; the mask that is kept in them is of whatever
schedule came last, and is dropped. Legend: C width, V codes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import llamagen, var
from varkit.hub.assemble import Files, assembled, states_of
from varkit.hub.keymap import check_depth, check_told, entry, from_published, joined, part, to_published
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.states import State, build_empty
from varkit.plans.flexible import PUBLISHED, FlexibleScalesConfig
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.map_vq import MapVQConfig

SETTINGS = Settings(guidance=3.5, ramp=True, top_k=900, top_p=0.95)
"""Published sampling; its cfg 2.5, (1 + t) c - t u with t up to 2.5, is u + s (c - u) with s up to 3.5."""

POSITION, SCALE = "pos_1LC", "blocks.0.attn.scale_mul_1H11"
WHOSE = "FlexVAR generator"
TOKENIZER_FILE = "FlexVAE.pth"

Configs = tuple[FlexVARConfig, CategoricalConfig]


def checkpoint_states(checkpoint: Mapping[str, Any]) -> dict[str, State]:
    """The published generator in a loaded file, {"generator": ...}, or nothing where the file is not of this family.

    Takes plain state dicts and trainer checkpoints, which nest it. The tokenizer's file cannot be told from LlamaGen's.
    """
    trainer = checkpoint.get("trainer")
    nested = trainer.get("var_wo_ddp") if isinstance(trainer, Mapping) else None
    state = nested if isinstance(nested, Mapping) else checkpoint
    position = state.get(POSITION)
    if isinstance(position, Tensor) and position.ndim == 4:
        return {"generator": dict(state)}
    return {}


def generator_configs(state: Mapping[str, Tensor], heads: int | None = None) -> Configs:
    """The configurations of generator and head that the shapes of a published generator tell."""
    classes, width = entry(state, "class_emb.weight", WHOSE).shape
    scale = state.get(SCALE)
    config = FlexVARConfig.published(
        check_depth(WHOSE, var.depth_of(state), width, var.DEPTHS),
        width=width,
        heads=heads or (width // var.HEAD_WIDTH if scale is None else scale.shape[1]),
        code_width=entry(state, "word_embed.weight", WHOSE).shape[1],
        condition=ClassConfig(classes - 1),
        table=entry(state, POSITION, WHOSE).shape[-1],
        mlp_ratio=entry(state, "blocks.0.ffn.fc1.weight", WHOSE).shape[0] / width,
        cosine=scale is not None,
        shared_modulation="shared_ada_lin.1.weight" in state,
    )
    return config, CategoricalConfig(width, entry(state, "head.weight", WHOSE).shape[0])


def generator_from_published(state: Mapping[str, Tensor], configs: Configs) -> tuple[State, State]:
    """A published generator's tensors as the states of `FlexVAR` and `CategoricalHead`."""
    generator, head = (build_empty(config.build).state_dict() for config in configs)
    weights = {n: t for n, t in state.items() if n != var.MASK and not n.endswith(var.KEY_BIAS)}
    ours = joined(generator=generator, head=head)
    found = from_published(weights, ours, var.GENERATOR_RULES, "the FlexVAR generator checkpoint")
    return part(found, "generator."), part(found, "head.")


def generator_to_published(
    state: Mapping[str, Tensor], head: Mapping[str, Tensor], config: FlexVARConfig, schedule: Schedule
) -> State:
    """The inverse, with the buffers that the published code expects; the mask is that of `schedule`."""
    level = schedule.level_of
    hidden = torch.zeros(schedule.total, schedule.total).masked_fill(level[:, None] < level, -torch.inf)
    buffers = {var.MASK: hidden[None, None]}
    buffers |= {f"blocks.{i}.attn{var.KEY_BIAS}": torch.zeros(config.width) for i in range(config.depth)}
    return to_published(joined(generator=state, head=head), var.GENERATOR_RULES) | buffers


def tokenizer_config(state: Mapping[str, Tensor], schedule: tuple[Side, ...] = PUBLISHED[10]) -> MapVQConfig:
    """The configuration that a published tokenizer's shapes tell; they do not tell the schedule."""
    told = llamagen.tokenizer_config(state)
    return MapVQConfig(told.conv, told.vocab_size, told.code_channels, schedule)


def tokenizer_from_published(state: Mapping[str, Tensor], config: MapVQConfig) -> State:
    """A published tokenizer's tensors as the state of `MapVQ`."""
    return llamagen.tokenizer_from_published(state, config)


def tokenizer_to_published(state: Mapping[str, Tensor], config: MapVQConfig) -> State:
    """The inverse."""
    return llamagen.tokenizer_to_published(state, config)


def pipeline(
    generator: Mapping[str, Tensor], tokenizer: Mapping[str, Tensor], about: dict[str, Any]
) -> Pipeline:
    """The parts of a published generator and tokenizer, in the default schedule of ten steps.

    The published sampler takes only this schedule's sides for seen, and draws maps of other sides greedily.
    """
    config, head = generator_configs(generator)
    told = tokenizer_config(tokenizer)
    for what, theirs, ours in (
        ("code width", told.code_channels, config.code_width),
        ("number of codes", told.vocab_size, head.vocab_size),
    ):
        if theirs != ours:
            raise UserError(
                f"the tokenizer's {what} is {theirs} and the generator's is {ours}; give the tokenizer that the "
                f"generator was trained with, such as {TOKENIZER_FILE}"
            )
    plan = FlexibleScalesConfig(told.schedule, seen=PUBLISHED[10])
    configs = {"tokenizer": told, "generator": config, "head": head, "plan": plan}
    states = dict(
        zip(("generator", "head"), generator_from_published(generator, (config, head)), strict=True)
    )
    states["tokenizer"] = tokenizer_from_published(tokenizer, told)
    return assembled(configs, states, SETTINGS, about)


def files(pipeline: Pipeline) -> Files:
    """What is published of a pipeline. Raises `UserError` for a model that the published layout cannot express."""
    own, head, tokenizer, plan = (pipeline.configs[n] for n in ("generator", "head", "tokenizer", "plan"))
    if not isinstance(tokenizer, MapVQConfig) or not isinstance(own.condition, ClassConfig):
        kinds = f"{type(tokenizer).__name__}, {type(own.condition).__name__}"
        raise UserError(
            f"only class-conditional FlexVAR models over maps have a published layout, not {kinds}"
        )
    state = states_of(pipeline)
    autoencoder = tokenizer_to_published(state["tokenizer"], tokenizer)
    schedule = Schedule.parse(plan.schedule)
    transformer = generator_to_published(state["generator"], state["head"], own, schedule)
    told, told_head = generator_configs(transformer)
    unsaid = {"drop_path": own.drop_path, "adaln_init": own.adaln_init, "condition": own.condition}
    check_told("generator", own, replace(told, **unsaid))
    check_told("head", head, replace(told_head, init_scale=head.init_scale))
    conv = replace(tokenizer_config(autoencoder), beta=tokenizer.beta, schedule=tokenizer.schedule)
    check_told("tokenizer's convolutions", tokenizer.conv, conv.conv)
    check_told("tokenizer", tokenizer, conv)
    return {TOKENIZER_FILE: (autoencoder, ("model",)), f"FlexVARd{own.depth}.pth": (transformer, ())}

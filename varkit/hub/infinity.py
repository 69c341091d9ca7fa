"""Published Infinity checkpoints (FoundationVision/Infinity: `infinity_2b_reg.pth`, `infinity_vae_d32reg.pth`) <-> our
parts.

Configurations are read off the shapes. The same model is published in several forms: blocks in a row or in chunks, the
scale of cosine attention laid out for one kernel or the other, the tokenizer's convolutions and norms within wrappers
(`.conv`, `.norm`) or not. All are first brought to one.
Legend: C width, H heads, d bits of a code.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.generators.infinity import SIZES, InfinityConfig
from varkit.generators.text import TextFeaturesConfig
from varkit.heads.bits import BitsConfig
from varkit.hub.keymap import Rule, check_depth, entry, from_published, grouped, joined, part, to_published
from varkit.hub.states import State, build_empty
from varkit.hub.var import GENERATOR_RULES as VAR_RULES
from varkit.hub.var import TOKENIZER_RULES as VAR_TOKENIZER_RULES
from varkit.hub.var import conv_config
from varkit.plans.ratios import SCHEDULES
from varkit.plans.schedule import Side
from varkit.tokenizers.bitwise import BitwiseConfig

TOKENIZER = "encoder.conv_in"

DEPTHS = {width: depth for depth, width, _, _ in SIZES.values()}
KEY_BIAS = ".zero_k_bias"
NOT_WEIGHTS = ("quantizer.", "quantize.", "lpips", "disc")
"""Beginnings of the tokenizer's entries that take no part: the masks of its bits, and the losses of its training."""

GENERATOR_RULES = (
    Rule(r"^generator\.conditioner\.null_features$", "cfg_uncond"),
    Rule(r"^generator\.conditioner\.norm\.", "text_norm."),
    Rule(r"^generator\.conditioner\.pool\.query$", "text_proj_for_sos.ca.mat_q", leading=1),
    Rule(r"^generator\.conditioner\.pool\.kv\.", "text_proj_for_sos.ca.mat_kv."),
    Rule(r"^generator\.conditioner\.pool\.out\.", "text_proj_for_sos.ca.proj."),
    Rule(r"^generator\.conditioner\.project\.up\.", "text_proj_for_ca.0."),
    Rule(r"^generator\.conditioner\.project\.down\.", "text_proj_for_ca.2."),
    *VAR_RULES,
    Rule(r"\.attn\.", ".sa."),
    Rule(r"\.cross_norm\.", ".ca_norm."),
    Rule(r"\.cross\.q\.", ".ca.mat_q."),
    Rule(r"\.cross\.kv\.", ".ca.mat_kv."),
    Rule(r"\.cross\.out\.", ".ca.proj."),
)


def checkpoint_states(checkpoint: Mapping[str, Any]) -> dict[str, State]:
    """The published states in a loaded file, {"tokenizer": ..., "generator": ...}, one of the two, or none.

    Takes plain state dicts (a shard may hold a part of one), trainer checkpoints, and the tokenizer's files.
    """
    trainer = checkpoint.get("trainer")
    if isinstance(trainer, Mapping) and isinstance(trainer.get("gpt_fsdp"), Mapping):
        return {"generator": dict(trainer["gpt_fsdp"])}
    for wrapper in ("ema", "vae"):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    names = [str(name) for name in checkpoint]
    if any(re.match(r"cfg_uncond|text_proj_for_|block_chunks\.|blocks\.\d+\.ca\.", name) for name in names):
        return {"generator": dict(checkpoint)}
    bitwise = any(name.startswith(("quantizer.lfq.", "quantize.lfq.")) for name in names)
    nested = f"{TOKENIZER}.conv.weight" in checkpoint
    return {"tokenizer": dict(checkpoint)} if bitwise or nested else {}


def tokenizer_config(
    state: Mapping[str, Tensor], schedule: tuple[Side, ...] = SCHEDULES[1.0], patch: int = 1
) -> BitwiseConfig:
    """The configuration that a published tokenizer's shapes tell; they do not tell the schedule and the patch, by
    default that of square pictures of 1M pixels, and none.
    """
    weights = _plain(state)
    latents = entry(weights, "encoder.conv_out.weight", "Infinity tokenizer").shape[0]
    conv = conv_config(weights, latents, False, "Infinity tokenizer")
    return BitwiseConfig(conv, schedule, patch)


def tokenizer_from_published(state: Mapping[str, Tensor], config: BitwiseConfig) -> State:
    """A published tokenizer's tensors as the state of `Bitwise`."""
    ours = build_empty(config.build).state_dict()
    return from_published(_plain(state), ours, VAR_TOKENIZER_RULES, "the Infinity tokenizer checkpoint")


def tokenizer_to_published(state: Mapping[str, Tensor], config: BitwiseConfig, nested: bool = True) -> State:
    """The inverse, with the masks of the bits, and by default with the wrappers' names."""
    published = to_published(state, VAR_TOKENIZER_RULES)
    if nested:
        published = {_wrapped(name): tensor for name, tensor in published.items()}
    mask = 2 ** torch.arange(config.conv.latent_channels - 1, -1, -1)
    return published | {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask.clone()}


def generator_configs(state: Mapping[str, Tensor]) -> tuple[InfinityConfig, BitsConfig]:
    """The configurations of generator and head that the shapes of a published generator tell."""
    state = _in_a_row(state)
    width, bits = entry(state, "word_embed.weight", "Infinity generator").shape
    length, features = entry(state, "cfg_uncond", "Infinity generator").shape
    config = InfinityConfig(
        depth=check_depth("Infinity generator", grouped(state, r"blocks\.(\d+)\."), width, DEPTHS),
        width=width,
        heads=entry(state, "blocks.0.sa.scale_mul_1H11", "Infinity generator").numel(),
        code_width=bits,
        condition=TextFeaturesConfig(features, length),
        levels=entry(state, "lvl_embed.weight", "Infinity generator").shape[0],
        mlp_ratio=entry(state, "blocks.0.ffn.fc1.weight", "Infinity generator").shape[0] / width,
    )
    return config, BitsConfig(width, bits)


def generator_from_published(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """A published generator's tensors as the states of `Infinity` and `BitsHead`."""
    config, head = generator_configs(state)
    weights = {}
    for name, tensor in _in_a_row(state).items():
        if name.endswith(KEY_BIAS):
            if bool(tensor.any()):
                raise UserError(f"{name} of the checkpoint is not zero; Infinity's keys have no bias")
        elif name.endswith(".ca.v_bias"):
            weights[name.replace("v_bias", "mat_kv.bias")] = torch.cat([torch.zeros_like(tensor), tensor])
        elif name.endswith("scale_mul_1H11"):
            weights[name] = tensor.reshape(1, -1, 1, 1)
        else:
            weights[name] = tensor
    ours = joined(generator=build_empty(config.build).state_dict(), head=build_empty(head.build).state_dict())
    found = from_published(weights, ours, GENERATOR_RULES, "the Infinity generator checkpoint")
    return part(found, "generator."), part(found, "head.")


def generator_to_published(
    state: Mapping[str, Tensor], head: Mapping[str, Tensor], chunks: int = 1, heads_last: bool = False
) -> State:
    """The inverse, in `chunks` of blocks (released: 8 for 2B and 8B, 4 for the small ones).

    heads_last: the scale of attention as (1, 1, H, 1), for the fused kernel. A bias of the prompt's keys is dropped: it
    adds the same to all scores of a query, so it changes nothing.
    """
    published: State = {}
    for name, tensor in to_published(joined(generator=state, head=head), GENERATOR_RULES).items():
        if name.endswith(".ca.mat_kv.bias"):
            base = name.removesuffix("mat_kv.bias")
            value = tensor.chunk(2)[1].clone()
            published |= {f"{base}v_bias": value, f"{base}{KEY_BIAS[1:]}": torch.zeros_like(value)}
        elif name.endswith(".sa.v_bias"):
            published |= {name: tensor, name.replace(".v_bias", KEY_BIAS): torch.zeros_like(tensor)}
        elif name.endswith("scale_mul_1H11") and heads_last:
            published[name] = tensor.transpose(1, 2)
        else:
            published[name] = tensor
    return _in_chunks(published, chunks)


def _in_a_row(state: Mapping[str, Tensor]) -> State:
    """Blocks named by their number: block_chunks.a.module.b of chunks of n is blocks.(a n + b)."""
    pattern = re.compile(r"block_chunks\.(\d+)\.module\.(\d+)\.")
    places = [(int(m[1]), int(m[2])) for m in map(pattern.match, state) if m]
    size = 1 + max((place for _, place in places), default=0)
    return {
        pattern.sub(lambda m: f"blocks.{int(m[1]) * size + int(m[2])}.", name): tensor
        for name, tensor in state.items()
    }


def _in_chunks(state: State, chunks: int) -> State:
    depth = grouped(state, r"blocks\.(\d+)\.")
    if chunks == 1:
        return state
    if depth % chunks:
        raise UserError(f"{depth} blocks do not split into {chunks} chunks; choose a divisor of {depth}")
    size = depth // chunks

    def name_of(m: re.Match[str]) -> str:
        chunk, place = divmod(int(m[1]), size)
        return f"block_chunks.{chunk}.module.{place}."

    return {re.sub(r"^blocks\.(\d+)\.", name_of, name): tensor for name, tensor in state.items()}


def _plain(state: Mapping[str, Tensor]) -> State:
    """A tokenizer's weights by their names without wrappers."""
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(NOT_WEIGHTS)}
    if f"{TOKENIZER}.conv.weight" not in weights:
        return weights
    return {re.sub(r"\.(?:conv|norm)\.(weight|bias)$", r".\1", name): t for name, t in weights.items()}


def _wrapped(name: str) -> str:
    """The name within wrappers: norms in `.norm`, convolutions in `.conv`."""
    kind = "norm" if re.search(r"norm\w*\.(weight|bias)$", name) else "conv"
    return re.sub(r"\.(weight|bias)$", rf".{kind}.\1", name)

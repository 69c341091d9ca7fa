"""Published VAR checkpoints (FoundationVision/VAR: `vae_ch160v4096z32.pth`, `var_d16.pth` ...) <-> our parts.

Configurations are read off the shapes. Buffers that the published code keeps in its checkpoints (level numbers,
attention mask, zero key bias, codebook usage) are dropped on the way in and made anew on the way out.
Legend: C width, L positions, K levels, V codes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub.keymap import Rule, check_depth, entry, from_published, grouped, joined, part, to_published
from varkit.hub.states import State, build_empty
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

SCHEDULES: dict[int, tuple[int, ...]] = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""The published schedules, by their number of positions."""

HEAD_WIDTH = 64

DEPTHS = {64 * depth: depth for depth in (16, 20, 24, 30, 32, 36)}
"""Blocks by width, of all that is published in this layout: VAR, HMAR, FlexVAR and M-VAR."""

USAGE, LEVELS, MASK, KEY_BIAS = "quantize.ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking", ".zero_k_bias"

GENERATOR_RULES = (
    Rule(r"^generator\.start$", "pos_start", leading=1),
    Rule(r"^generator\.position$", "pos_1LC", leading=1),
    Rule(r"^generator\.level\.", "lvl_embed."),
    Rule(r"^generator\.conditioner\.embed\.", "class_emb."),
    Rule(r"^generator\.embed\.", "word_embed."),
    Rule(r"^generator\.shared_modulation\.", "shared_ada_lin.1."),
    Rule(r"^generator\.final_modulation\.", "head_nm.ada_lin.1."),
    Rule(r"^generator\.blocks\.", "blocks."),
    Rule(r"\.attention\.norm\.log_scale$", ".attn.scale_mul_1H11", leading=1),
    Rule(r"\.attention\.qkv\.", ".attn.mat_qkv."),
    Rule(r"\.attention\.out\.", ".attn.proj."),
    Rule(r"\.attention\.([qv]_bias)$", r".attn.\1"),
    Rule(r"\.ffn\.up\.", ".ffn.fc1."),
    Rule(r"\.ffn\.down\.", ".ffn.fc2."),
    Rule(r"\.modulation\.", ".ada_lin.1."),
    Rule(r"\.modulation_offset$", ".ada_gss", leading=2),
    Rule(r"^head\.out\.", "head."),
)

TOKENIZER_RULES = (
    Rule(r"^(encoder)\.levels\.(\d+)\.", r"\1.down.\2."),
    Rule(r"^(decoder)\.levels\.(\d+)\.", r"\1.up.\2."),
    Rule(r"^(encoder\.down\.\d+)\.resample\.", r"\1.downsample.conv."),
    Rule(r"^(decoder\.up\.\d+)\.resample\.", r"\1.upsample.conv."),
    Rule(r"\.middle\.block([12])\.", r".mid.block_\1."),
    Rule(r"\.middle\.attention\.", ".mid.attn_1."),
    Rule(r"\.blocks\.", ".block."),
    Rule(r"\.attention\.", ".attn."),
    Rule(r"\.shortcut\.", ".nin_shortcut."),
    Rule(r"\.proj\.", ".proj_out."),
    Rule(r"^quantizer\.embedding\.", "quantize.embedding."),
)


def checkpoint_states(checkpoint: Mapping[str, Any]) -> dict[str, State]:
    """The published states in a loaded file, as {"tokenizer": ..., "generator": ...}, or one of the two.

    Takes plain state dicts and trainer checkpoints, which nest both under `trainer`.
    """
    trainer = checkpoint.get("trainer")
    if isinstance(trainer, Mapping):
        nested = {"tokenizer": trainer.get("vae_local"), "generator": trainer.get("var_wo_ddp")}
        found = {name: dict(state) for name, state in nested.items() if state}
    else:
        marks = {"tokenizer": "quantize.embedding.weight", "generator": "pos_1LC"}
        found = {name: dict(checkpoint) for name, mark in marks.items() if mark in checkpoint}
    return found


def conv_config(
    state: Mapping[str, Tensor],
    latents: int,
    attention: bool,
    whose: str,
    names: tuple[str, str] = ("down", "block"),
) -> ConvConfig:
    """The convolutions that a published autoencoder's shapes tell.

    names: of levels, and of blocks in a level; by default those of LDM's layout, which most families share.
    """
    first = entry(state, "encoder.conv_in.weight", whose).shape[0]
    level, block = names
    levels = range(grouped(state, rf"encoder\.{level}\.(\d+)\."))
    widths = [entry(state, f"encoder.{level}.{i}.{block}.0.conv1.weight", whose).shape[0] for i in levels]
    return ConvConfig(
        channels=first,
        multipliers=tuple(width // first for width in widths),
        res_blocks=grouped(state, rf"encoder\.{level}\.0\.{block}\.(\d+)\."),
        latent_channels=latents,
        attention=attention,
    )


def tokenizer_config(
    state: Mapping[str, Tensor], schedule: tuple[Side, ...] = SCHEDULES[680]
) -> MultiScaleVQConfig:
    """The configuration that the shapes of a published tokenizer tell; they do not tell the schedule."""
    vocab_size, code_channels = entry(state, "quantize.embedding.weight", "VAR tokenizer").shape
    latents = entry(state, "encoder.conv_out.weight", "VAR tokenizer").shape[0]
    conv = conv_config(state, latents, "encoder.mid.attn_1.qkv.weight" in state, "VAR tokenizer")
    partly = grouped(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    sharing = 1 if "quantize.quant_resi.qresi.weight" in state else partly
    return MultiScaleVQConfig(conv, vocab_size, code_channels, schedule, phi_sharing=sharing)


def tokenizer_from_published(state: Mapping[str, Tensor], config: MultiScaleVQConfig) -> State:
    """A published tokenizer's tensors as the state of `MultiScaleVQ`."""
    weights = {name: tensor for name, tensor in state.items() if name != USAGE}
    ours = build_empty(config.build).state_dict()
    return from_published(weights, ours, _tokenizer_rules(config), "the VAR tokenizer checkpoint")


def tokenizer_to_published(state: Mapping[str, Tensor], config: MultiScaleVQConfig) -> State:
    """The inverse; codebook usage, which only training knows, is zero."""
    usage = torch.zeros(len(config.schedule), config.vocab_size)
    return to_published(state, _tokenizer_rules(config)) | {USAGE: usage}


def _tokenizer_rules(config: MultiScaleVQConfig) -> tuple[Rule, ...]:
    shared = {0: r"quantize.quant_resi.\1.", 1: "quantize.quant_resi.qresi."}
    name = shared.get(config.phi_sharing, r"quantize.quant_resi.qresi_ls.\1.")
    return (*TOKENIZER_RULES, Rule(r"^quantizer\.phis\.(\d+)\.", name))


def generator_configs(
    state: Mapping[str, Tensor], schedule: tuple[Side, ...] | None = None
) -> tuple[VARConfig, CategoricalConfig]:
    """The configurations of generator and head that the shapes of a published generator tell.

    Without cosine attention they do not tell the heads, which are then 64 wide, as released.
    """
    classes, width = entry(state, "class_emb.weight", "VAR generator").shape
    scale = state.get("blocks.0.attn.scale_mul_1H11")
    config = VARConfig.published(
        check_depth("VAR generator", depth_of(state), width, DEPTHS),
        schedule or generator_schedule(state),
        width=width,
        heads=max(1, width // HEAD_WIDTH) if scale is None else scale.shape[1],
        code_width=entry(state, "word_embed.weight", "VAR generator").shape[1],
        condition=ClassConfig(classes - 1),
        mlp_ratio=entry(state, "blocks.0.ffn.fc1.weight", "VAR generator").shape[0] / width,
        cosine=scale is not None,
        shared_modulation="shared_ada_lin.1.weight" in state,
    )
    return config, CategoricalConfig(width, entry(state, "head.weight", "VAR generator").shape[0])


def depth_of(state: Mapping[str, Tensor]) -> int:
    """Blocks of a published generator."""
    return grouped(state, r"blocks\.(\d+)\.")


def generator_schedule(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The schedule of a published generator: from its level numbers, else by its number of positions."""
    total = entry(state, "pos_1LC", "VAR generator").shape[1]
    if LEVELS in state:
        sides = tuple(round(n**0.5) for n in torch.bincount(state[LEVELS].flatten()).tolist())
        if sum(side * side for side in sides) == total:
            return sides
    if total not in SCHEDULES:
        known = ", ".join(map(str, SCHEDULES))
        raise UserError(f"no published schedule has {total} positions (known: {known}); give the schedule")
    return SCHEDULES[total]


def generator_from_published(
    state: Mapping[str, Tensor], schedule: tuple[Side, ...] | None = None
) -> tuple[State, State]:
    """A published generator's tensors as the states of `VAR` and `CategoricalHead`."""
    return read_generator(state, generator_configs(state, schedule), GENERATOR_RULES, "VAR")


def read_generator(
    state: Mapping[str, Tensor],
    configs: tuple[VARConfig, CategoricalConfig],
    rules: Sequence[Rule],
    whose: str,
) -> tuple[State, State]:
    """The states of a generator and its head, for a layout like VAR's: without its buffers, by its rules."""
    weights = without_buffers(state, whose)
    generator, head = (build_empty(config.build).state_dict() for config in configs)
    found = from_published(
        weights, joined(generator=generator, head=head), rules, f"the {whose} generator checkpoint"
    )
    return part(found, "generator."), part(found, "head.")


def without_buffers(state: Mapping[str, Tensor], whose: str) -> State:
    """What is learnt of a published generator. Raises `UserError` for a bias of keys, which is a buffer of zeros."""
    for name, tensor in state.items():
        if name.endswith(KEY_BIAS) and bool(tensor.any()):
            raise UserError(
                f"{name} of the {whose} checkpoint is not zero; {whose}'s keys have no bias, so it is another model"
            )
    return {n: t for n, t in state.items() if n not in (LEVELS, MASK) and not n.endswith(KEY_BIAS)}


def hidden_by(history: int | None, schedule: Schedule) -> Tensor:
    """(L, L) bool: which slots (rows) do not see which, where a level sees so many coarser ones, None: all."""
    behind = schedule.level_of[:, None] - schedule.level_of
    return behind < 0 if history is None else (behind < 0) | (behind > history)


def history_of(state: Mapping[str, Tensor], schedule: Schedule, otherwise: int | None) -> int | None:
    """How many coarser levels a level sees by the published attention mask; `otherwise` where there is none.

    None: all of them (VAR); 0: block-diagonal (MVAR, HMAR's first stage), which the weights alone do not tell. Raises
    `UserError` for any other mask.
    """
    if MASK not in state:
        return otherwise
    hidden = state[MASK].reshape(state[MASK].shape[-2:]) != 0
    for history in (None, *range(len(schedule) - 1)):
        if torch.equal(hidden, hidden_by(history, schedule)):
            return history
    raise UserError(
        f"{MASK} of the checkpoint, {tuple(state[MASK].shape)}, is not that of scales which see so many coarser ones, "
        f"over {schedule.total} positions; leave it out, or give the schedule it was made for"
    )


def generator_to_published(
    state: Mapping[str, Tensor], head: Mapping[str, Tensor], config: VARConfig
) -> State:
    """The inverse, with the buffers that the published code expects."""
    buffers = generator_buffers(config, hidden=hidden_by(None, Schedule.parse(config.schedule)))
    return to_published(joined(generator=state, head=head), GENERATOR_RULES) | buffers


def generator_buffers(config: VARConfig, hidden: Tensor) -> State:
    """What the published code keeps beside weights; hidden (L, L) bool: which slots (rows) do not see which."""
    levels = Schedule.parse(config.schedule).level_of[None]
    biases = {f"blocks.{i}.attn{KEY_BIAS}": torch.zeros(config.width) for i in range(config.depth)}
    return {LEVELS: levels, MASK: published_mask(hidden), **biases}


def published_mask(hidden: Tensor) -> Tensor:
    """hidden (L, L) bool as it is added to logits, (1, 1, L, L)."""
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[None, None]

"""Published MAR checkpoints (LTH14/mar: `kl16.ckpt`, `checkpoint-last.pth` of each size) <-> our parts.

Configurations are read off the shapes; the heads of a generator's attention are not told by them. The published null
condition, `fake_latent`, is the last row of our table of classes.
Legend: C width, P buffer slots, L positions.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.mar import HEADS, SIZES, MARConfig
from varkit.heads.diffusion import DiffusionConfig
from varkit.hub.keymap import (
    Rule,
    check_depth,
    entry,
    from_published,
    fuse_qkv,
    grouped,
    joined,
    part,
    split_qkv,
    to_published,
)
from varkit.hub.states import State, build_empty, unwrapped
from varkit.hub.var import TOKENIZER_RULES, conv_config
from varkit.plans.schedule import Side
from varkit.tokenizers.kl import KLConfig

CLASSES, NULL, TABLE = "class_emb.weight", "fake_latent", "generator.conditioner.embed.weight"
HEAD_WIDTH = 64
SCALE = "scale"

GENERATOR_RULES = (
    Rule(r"^generator\.conditioner\.embed\.", "class_emb."),
    Rule(r"^generator\.embed\.", "z_proj."),
    Rule(r"^generator\.norm_in\.", "z_proj_ln."),
    Rule(r"^generator\.mask$", "mask_token", leading=2),
    Rule(r"^generator\.output_position$", "diffusion_pos_embed_learned", leading=1),
    Rule(r"^generator\.(encoder|decoder)_position$", r"\1_pos_embed_learned", leading=1),
    Rule(r"^generator\.(encoder|decoder)\.", r"\1_blocks."),
    Rule(r"^generator\.", ""),
    Rule(r"\.attention\.qkv\.", ".attn.qkv."),
    Rule(r"\.attention\.out\.", ".attn.proj."),
    Rule(r"\.ffn\.up\.", ".mlp.fc1."),
    Rule(r"\.ffn\.down\.", ".mlp.fc2."),
    Rule(r"^head\.net\.time\.up\.", "diffloss.net.time_embed.mlp.0."),
    Rule(r"^head\.net\.time\.down\.", "diffloss.net.time_embed.mlp.2."),
    Rule(r"^head\.net\.condition\.", "diffloss.net.cond_embed."),
    Rule(r"^head\.net\.embed\.", "diffloss.net.input_proj."),
    Rule(r"^head\.net\.blocks\.", "diffloss.net.res_blocks."),
    Rule(r"^head\.net\.out\.", "diffloss.net.final_layer.linear."),
    Rule(r"^head\.net\.modulation\.", "diffloss.net.final_layer.adaLN_modulation.1."),
    Rule(r"(\.res_blocks\.\d+)\.norm\.", r"\1.in_ln."),
    Rule(r"(\.res_blocks\.\d+)\.up\.", r"\1.mlp.0."),
    Rule(r"(\.res_blocks\.\d+)\.down\.", r"\1.mlp.2."),
    Rule(r"(\.res_blocks\.\d+)\.modulation\.", r"\1.adaLN_modulation.1."),
)

SMALL_HEAD = 3
"""Blocks of the head that the published code makes unless told otherwise, at any size."""

Configs = tuple[MARConfig, DiffusionConfig]


def checkpoint_states(checkpoint: Mapping[str, Any]) -> dict[str, State]:
    """The published states in a loaded file: {"generator": ...} (the averaged one) or {"tokenizer": ...}, or nothing
    where the file is not of this family.
    """
    checkpoint = unwrapped(checkpoint, ("model_ema", "model", "state_dict"))
    if any(str(name).startswith("diffloss.") for name in checkpoint):
        return {"generator": dict(checkpoint)}
    if "quant_conv.weight" in checkpoint and not any(str(n).startswith("quantize.") for n in checkpoint):
        ours = {n: t for n, t in checkpoint.items() if not str(n).startswith("loss.")}
        return {"tokenizer": ours}
    return {}


def generator_configs(state: Mapping[str, Tensor], heads: int | None = None) -> Configs:
    """The configurations of generator and head that the shapes tell; heads are those of the released size of the same
    width, else 64 wide.
    """
    classes, width = entry(state, CLASSES, "MAR generator").shape
    positions = entry(state, "diffusion_pos_embed_learned", "MAR generator").shape[1]
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise UserError(f"the MAR checkpoint has {positions} positions, which are not a square grid")
    depths = {grouped(state, rf"{half}_blocks\.(\d+)\.") for half in ("encoder", "decoder")}
    if len(depths) != 1:
        raise UserError(
            f"the MAR checkpoint's encoder and decoder differ in depth {sorted(depths)}; all released ones agree"
        )
    released = {w: h for _, w, h in SIZES.values()}
    channels = entry(state, "z_proj.weight", "MAR generator").shape[1]
    generator = MARConfig(
        depth=check_depth("MAR generator", depths.pop(), width, {w: depth for depth, w, _ in SIZES.values()}),
        width=width,
        heads=heads or released.get(width, width // HEAD_WIDTH),
        condition=ClassConfig(classes),
        grid=grid,
        channels=channels,
        buffer=entry(state, "encoder_pos_embed_learned", "MAR generator").shape[1] - positions,
        mlp_ratio=entry(state, "encoder_blocks.0.mlp.fc1.weight", "MAR generator").shape[0] / width,
    )
    mlp_width = entry(state, "diffloss.net.input_proj.weight", "MAR generator").shape[0]
    blocks = grouped(state, r"diffloss\.net\.res_blocks\.(\d+)\.")
    heads_of = {mlp: depth for size, (depth, mlp) in HEADS.items() if SIZES[size][1] == width}
    if blocks != SMALL_HEAD:
        check_depth("MAR generator's head", blocks, mlp_width, heads_of)
    return generator, DiffusionConfig(width, channels, mlp_width, blocks)


def generator_from_published(state: Mapping[str, Tensor], configs: Configs) -> tuple[State, State]:
    """A published generator's tensors as the states of `MAR` and `DiffusionHead`."""
    ours = joined(
        generator=build_empty(configs[0].build).state_dict(), head=build_empty(configs[1].build).state_dict()
    )
    table = torch.cat([entry(state, CLASSES, "MAR generator"), entry(state, NULL, "MAR generator")])
    weights = {name: tensor for name, tensor in state.items() if name != NULL} | {CLASSES: table}
    found = from_published(weights, ours, GENERATOR_RULES, "the MAR checkpoint")
    return part(found, "generator."), part(found, "head.")


def generator_to_published(state: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> State:
    """The inverse."""
    published = to_published(joined(generator=state, head=head), GENERATOR_RULES)
    table = published[CLASSES]
    return published | {CLASSES: table[:-1], NULL: table[-1:]}


def tokenizer_config(state: Mapping[str, Tensor], grid: Side = 16, patch: int = 1) -> KLConfig:
    """The configuration that the shapes of a published autoencoder tell; they do not tell how its latents are used."""
    latents = entry(state, "post_quant_conv.weight", "MAR autoencoder").shape[0]
    conv = conv_config(state, latents, "encoder.mid.attn_1.q.weight" in state, "MAR autoencoder")
    return KLConfig(conv, grid, patch)


def tokenizer_from_published(state: Mapping[str, Tensor], config: KLConfig) -> State:
    """A published autoencoder's tensors as the state of `KL`; its scale is the configuration's."""
    ours = build_empty(config.build).state_dict()
    scale = ours.pop(SCALE)
    fused = fuse_qkv(state)
    return from_published(fused, ours, TOKENIZER_RULES, "the KL autoencoder checkpoint") | {SCALE: scale}


def tokenizer_to_published(state: Mapping[str, Tensor]) -> State:
    """The inverse; the scale is nowhere in the published layout."""
    return split_qkv(to_published({n: t for n, t in state.items() if n != SCALE}, TOKENIZER_RULES))

"""Published LlamaGen checkpoints (FoundationVision/LlamaGen: `vq_ds16_c2i.pt`, `c2i_B_256.pt`, `t2i_XL_stage1_256.pt`
...) <-> our parts.

Configurations are read off the shapes; they do not tell the heads, which are those of the released size, nor the grid.
Legend: C width, D features of the text encoder, K codes.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import SIZES, LlamaGenConfig
from varkit.generators.text import TextFeaturesConfig
from varkit.heads.categorical import CategoricalConfig
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
from varkit.hub.var import conv_config
from varkit.plans.schedule import Side
from varkit.tokenizers.map_vq import MapVQConfig
from varkit.tokenizers.vq import VQConfig

CLASSES, NULL = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
ANGLES = "freqs_cis"
"""Rotary angles, which older files hold; they are computed anew."""

USAGE, USAGE_SHAPE = "quantize.codebook_used", (65536,)
IMAGE_SIZE, STRIDE = "args.image_size", "args.downsample_size"
"""Pixels a side of pictures and of tokens in a trainer's arguments, kept beside its weights: nothing else in a file
tells the grid, and which tokenizer the generator was trained with."""

HEAD_WIDTH = 64
DEPTHS = {width: depth for depth, width, _ in SIZES.values()}

RULES = (
    Rule(r"^generator\.conditioner\.embed\.", "cls_embedding.embedding_table."),
    Rule(r"^generator\.conditioner\.null_features$", NULL),
    Rule(r"^generator\.conditioner\.project\.up\.", "cls_embedding.cap_proj.fc1."),
    Rule(r"^generator\.conditioner\.project\.down\.", "cls_embedding.cap_proj.fc2."),
    Rule(r"^generator\.embed\.", "tok_embeddings."),
    Rule(r"^generator\.blocks\.", "layers."),
    Rule(r"\.attention\.qkv\.", ".attention.wqkv."),
    Rule(r"\.attention\.out\.", ".attention.wo."),
    Rule(r"\.ffn\.gate\.", ".feed_forward.w1."),
    Rule(r"\.ffn\.up\.", ".feed_forward.w3."),
    Rule(r"\.ffn\.down\.", ".feed_forward.w2."),
    Rule(r"\.norm1\.", ".attention_norm."),
    Rule(r"\.norm2\.", ".ffn_norm."),
    Rule(r"^generator\.norm\.", "norm."),
    Rule(r"^head\.out\.", "output."),
)

TOKENIZER_RULES = (
    Rule(r"^encoder\.levels\.", "encoder.conv_blocks."),
    Rule(r"^(encoder\.conv_blocks\.\d+)\.resample\.", r"\1.downsample.conv."),
    Rule(r"^(decoder\.conv_blocks\.\d+)\.resample\.", r"\1.upsample.conv."),
    Rule(r"\.middle\.block1\.", ".mid.0."),
    Rule(r"\.middle\.attention\.", ".mid.1."),
    Rule(r"\.middle\.block2\.", ".mid.2."),
    Rule(r"\.blocks\.", ".res."),
    Rule(r"\.attention\.", ".attn."),
    Rule(r"\.shortcut\.", ".nin_shortcut."),
    Rule(r"\.proj\.", ".proj_out."),
    Rule(r"^quantizer\.embedding\.", "quantize.embedding."),
)

Configs = tuple[LlamaGenConfig, CategoricalConfig]


def checkpoint_states(checkpoint: Mapping[str, Any]) -> dict[str, State]:
    """The published states in a loaded file, {"generator": ...} or {"tokenizer": ...} (the averaged one, where there is
    one), or nothing where the file is not of this family.

    Takes the files of DDP ("model"), DeepSpeed ("module") and other trainers ("state_dict"), and plain state dicts, as
    FSDP writes.
    """
    wrappers = ("model", "module", "state_dict")
    generator = unwrapped(checkpoint, wrappers)
    if _any(generator, r"cls_embedding\.|layers\.\d+\.attention\.wqkv\."):
        values = {name: getattr(checkpoint.get("args"), name[5:], None) for name in (IMAGE_SIZE, STRIDE)}
        told = {name: torch.tensor(value) for name, value in values.items() if isinstance(value, int)}
        return {"generator": {**generator, **told}}
    tokenizer = unwrapped(checkpoint, ("ema", *wrappers))
    return {"tokenizer": dict(tokenizer)} if _any(tokenizer, r"encoder\.conv_blocks\.") else {}


def generator_configs(state: Mapping[str, Tensor], heads: int | None = None) -> Configs:
    """The configurations of generator and head that the shapes tell.

    By default the heads are those of the released size of the same depth and width, else 64 wide.
    """
    whose = "LlamaGen generator"
    vocab_size, width = entry(state, "tok_embeddings.weight", whose).shape
    depth = check_depth(whose, grouped(state, r"layers\.(\d+)\."), width, DEPTHS)
    released = {(d, w): h for d, w, h in SIZES.values()}
    heads = heads or released.get((depth, width), width // HEAD_WIDTH)
    condition: ClassConfig | TextFeaturesConfig
    if NULL in state:
        length, features = state[NULL].shape
        condition = TextFeaturesConfig(features, length)
    else:
        condition = ClassConfig(entry(state, CLASSES, whose).shape[0] - 1)
    grouped_rows = entry(state, "layers.0.attention.wqkv.weight", whose).shape[0] - width
    config = LlamaGenConfig(
        depth=depth,
        width=width,
        heads=heads,
        vocab_size=vocab_size,
        condition=condition,
        kv_heads=None if grouped_rows == 2 * width else grouped_rows * heads // width // 2,
        hidden=entry(state, "layers.0.feed_forward.w1.weight", whose).shape[0],
        zero_prefix=True,
    )
    return config, CategoricalConfig(width, vocab_size, bias=False, init_scale=0.0)


def generator_from_published(state: Mapping[str, Tensor], configs: Configs) -> tuple[State, State]:
    """A published generator's tensors as the states of `LlamaGen` and `CategoricalHead`."""
    generator, head = (build_empty(config.build).state_dict() for config in configs)
    weights = {name: tensor for name, tensor in state.items() if name not in (ANGLES, IMAGE_SIZE, STRIDE)}
    found = from_published(weights, joined(generator=generator, head=head), RULES, "the LlamaGen checkpoint")
    return part(found, "generator."), part(found, "head.")


def generator_to_published(state: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> State:
    """The inverse."""
    return to_published(joined(generator=state, head=head), RULES)


def tokenizer_config(state: Mapping[str, Tensor], grid: Side = 16) -> VQConfig:
    """The configuration that a published tokenizer's shapes tell; they do not tell the grid."""
    whose = "LlamaGen tokenizer"
    vocab_size, code_channels = entry(state, "quantize.embedding.weight", whose).shape
    latents = entry(state, "encoder.conv_out.weight", whose).shape[0]
    conv = conv_config(state, latents, True, whose, ("conv_blocks", "res"))
    return VQConfig(conv, vocab_size, code_channels, grid)


def tokenizer_from_published(state: Mapping[str, Tensor], config: VQConfig | MapVQConfig) -> State:
    """A published tokenizer's tensors as the state of `VQ`, or of FlexVAR's, which has the same parts."""
    weights = fuse_qkv({name: tensor for name, tensor in state.items() if name != USAGE})
    ours = build_empty(config.build).state_dict()
    return from_published(weights, ours, _tokenizer_rules(config), "the LlamaGen tokenizer checkpoint")


def tokenizer_to_published(state: Mapping[str, Tensor], config: VQConfig | MapVQConfig) -> State:
    """The inverse; the record of the codes last used, which only training knows, is zero."""
    published = split_qkv(to_published(state, _tokenizer_rules(config)))
    return published | {USAGE: torch.zeros(USAGE_SHAPE)}


def _tokenizer_rules(config: VQConfig | MapVQConfig) -> tuple[Rule, ...]:
    """The published decoder counts its levels from the lowest resolution, ours from the finest, as the encoder's."""
    last = len(config.conv.multipliers) - 1
    turned = [Rule(rf"^decoder\.levels\.{i}\.", f"decoder.conv_blocks.{last - i}.") for i in range(last + 1)]
    return (*turned, *TOKENIZER_RULES)


def _any(state: Mapping[str, Any], beginning: str) -> bool:
    return any(re.match(beginning, str(name)) for name in state)

"""Published HMAR checkpoints (nvidia/HMAR: `hmar-d16.pth` ...) <-> our parts, and the two stages they are merged from.

A merged checkpoint has `base_blocks`, `ns_blocks` and `mask_blocks` with a head for each branch. The stages have VAR's
names: the first is a VAR, the second one whose last blocks were trained on, and whose embedding has its bias apart.
Written from the published layout alone; the code's licence is non-commercial.
Legend: C width.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.generators.hmar import HMARConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import var
from varkit.hub.keymap import Rule, from_published, grouped, joined, part, to_published
from varkit.hub.states import State, build_empty
from varkit.plans.schedule import Schedule, Side

BASE, FIRST, MASK = "base_blocks.", "ns_blocks.", "mask_blocks."
BIAS, EMBED = "word_embed_bias", "mask_embed.weight"
HEADS = ("head.", "head_nm.")

RULES = (
    Rule(r"^generator\.blocks\.", BASE),
    Rule(r"^generator\.main_blocks\.", FIRST),
    Rule(r"^generator\.mask_blocks\.", MASK),
    Rule(r"^generator\.embed\.bias$", BIAS),
    Rule(r"^generator\.mask_embed$", EMBED),
    Rule(r"^generator\.final_modulation\.", "ns_head_nm.ada_lin.1."),
    Rule(r"^generator\.mask_modulation\.", "mask_head_nm.ada_lin.1."),
    Rule(r"^head\.out\.", "ns_head."),
    Rule(r"^head_mask\.out\.", "mask_head."),
    *var.GENERATOR_RULES,
)


def checkpoint_states(checkpoint: Mapping[str, Any]) -> dict[str, State]:
    """The published state in a loaded file, as {"generator": ...}; nothing if it is no merged HMAR."""
    for state in (checkpoint, *checkpoint.values()):
        if isinstance(state, Mapping) and EMBED in state and any(str(key).startswith(MASK) for key in state):
            return {"generator": dict(state)}
    return {}


def split(merged: Mapping[str, Tensor]) -> tuple[State, State]:
    """The checkpoints of both stages that a merged one was made of; what stage 2 left alone is in both."""
    trunk = grouped(merged, r"base_blocks\.(\d+)\.")
    own = ("ns_", "mask_", *(BASE, BIAS, EMBED))
    shared = {name: tensor for name, tensor in merged.items() if not name.startswith(own)}
    shared |= {f"blocks.{name.removeprefix(BASE)}": t for name, t in merged.items() if name.startswith(BASE)}
    first = {
        _renumbered(name.removeprefix("ns_"), trunk): t
        for name, t in merged.items()
        if name.startswith("ns_")
    }
    second = {
        _renumbered(name.removeprefix("mask_"), trunk): t
        for name, t in merged.items()
        if name.startswith("mask_") and name != EMBED
    }
    bias = merged[BIAS]
    return shared | first | {"word_embed.bias": bias}, shared | second | {BIAS: bias, EMBED: merged[EMBED]}


def merge(first: Mapping[str, Tensor], second: Mapping[str, Tensor], own: int = 8) -> State:
    """One checkpoint of both stages' (`split`'s inverse); `own` is how many last blocks each branch has for itself."""
    trunk = grouped(first, r"blocks\.(\d+)\.") - own
    if trunk < 1:
        raise UserError(
            f"{own} blocks of a branch leave no trunk of the {trunk + own} that stage 1 has; use fewer"
        )
    merged: State = {BIAS: first["word_embed.bias"], EMBED: second[EMBED]}
    for prefix, stage in (("ns_", first), ("mask_", second)):
        for name, tensor in stage.items():
            block = re.match(r"blocks\.(\d+)\.(.*)", name)
            if block and int(block[1]) >= trunk:
                merged[f"{prefix}blocks.{int(block[1]) - trunk}.{block[2]}"] = tensor
            elif name.startswith(HEADS):
                merged[prefix + name] = tensor
            elif prefix == "ns_" and block:
                merged[f"base_{name}"] = tensor
            elif prefix == "ns_" and name != "word_embed.bias":
                merged[name] = tensor
    return merged


def _renumbered(name: str, trunk: int) -> str:
    """A branch's own block, as a block of the whole."""
    return re.sub(r"^blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) + trunk}", name)


def generator_configs(
    state: Mapping[str, Tensor], schedule: tuple[Side, ...] | None = None
) -> tuple[HMARConfig, CategoricalConfig]:
    """The configurations of generator and heads that the shapes of a merged checkpoint tell."""
    config, head = var.generator_configs(split(state)[0], schedule)
    own = grouped(state, r"mask_blocks\.(\d+)\.")
    told = {field.name: getattr(config, field.name) for field in fields(VARConfig)}
    return HMARConfig(**told, mask_depth=own), head


def generator_from_published(
    state: Mapping[str, Tensor], schedule: tuple[Side, ...] | None = None
) -> dict[str, State]:
    """A merged checkpoint's tensors as the states of the parts `generator`, `head` and `head_mask`."""
    weights = var.without_buffers(state, "HMAR")
    config, head = generator_configs(state, schedule)
    empty = build_empty(head.build).state_dict()
    ours = joined(generator=build_empty(config.build).state_dict(), head=empty, head_mask=empty)
    found = from_published(weights, ours, RULES, "the HMAR checkpoint")
    return {name: part(found, f"{name}.") for name in ("generator", "head", "head_mask")}


def generator_to_published(states: Mapping[str, State], config: HMARConfig) -> State:
    """The inverse, with the buffers that the published code expects."""
    schedule = Schedule.parse(config.schedule)
    mask = var.published_mask(var.hidden_by(0, schedule))
    buffers = {var.LEVELS: schedule.level_of[None], var.MASK: mask}
    own = config.mask_depth
    for stack, count in ((BASE, config.depth - own), (FIRST, own), (MASK, own)):
        buffers |= {f"{stack}{i}.attn{var.KEY_BIAS}": torch.zeros(config.width) for i in range(count)}
    names = ("generator", "head", "head_mask")
    return to_published(joined(**{name: states[name] for name in names}), RULES) | buffers

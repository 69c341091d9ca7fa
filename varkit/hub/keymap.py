"""Renaming between our state dicts and published ones, both ways, from one list of rules.

Rules rewrite our names into published ones; the other direction is the same map read backwards, so that the two can
never disagree. Published tensors may carry leading dimensions of 1 that ours do not have.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.hub.states import State, check_state


@dataclass(frozen=True)
class Rule:
    """Replace the pattern `ours` in a name; `leading` ones stand before our shape in the published tensor."""

    ours: str
    published: str
    leading: int = 0


def published_name(name: str, rules: Sequence[Rule]) -> tuple[str, int]:
    """The published name of ours, all rules applied in order, and its leading ones."""
    leading = 0
    for rule in rules:
        name, count = re.subn(rule.ours, rule.published, name)
        leading += rule.leading * count
    return name, leading


def from_published(
    state: Mapping[str, Tensor], ours: Mapping[str, Tensor], rules: Sequence[Rule], where: str
) -> State:
    """Published tensors under the names and shapes of `ours` (whose values, possibly meta, are not read).

    Raises `UserError` in published names for what is missing, left over or misshapen.
    """
    names = {name: published_name(name, rules) for name in ours}
    wanted = {published: ours[name][(None,) * leading] for name, (published, leading) in names.items()}
    check_state(wanted, state, where)
    return {name: state[published].reshape(ours[name].shape) for name, (published, _) in names.items()}


def to_published(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> State:
    """Our tensors under published names and shapes."""
    names = {name: published_name(name, rules) for name in state}
    return {published: state[name][(None,) * leading] for name, (published, leading) in names.items()}


def part(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def joined(**parts: Mapping[str, Tensor]) -> State:
    """Several states as one, each under its keyword: the inverse of `part`."""
    return {f"{prefix}.{name}": tensor for prefix, state in parts.items() for name, tensor in state.items()}


def fuse_qkv(state: Mapping[str, Tensor]) -> State:
    """Projections to queries, keys and values that have a name each, `.q.`, `.k.` and `.v.`, as one, `.qkv.`."""
    fused = dict(state)
    for name in [name for name in state if name.endswith(".q.weight")]:
        stem = name.removesuffix("q.weight")
        for kind in ("weight", "bias"):
            pieces = [fused.get(f"{stem}{letter}.{kind}") for letter in "qkv"]
            if all(piece is not None for piece in pieces):
                fused[f"{stem}qkv.{kind}"] = torch.cat(pieces)  # type: ignore[arg-type]
                for letter in "qkv":
                    del fused[f"{stem}{letter}.{kind}"]
    return fused


def split_qkv(state: Mapping[str, Tensor]) -> State:
    """The inverse."""
    split = dict(state)
    for name in [name for name in state if ".qkv." in name]:
        for letter, piece in zip("qkv", split.pop(name).chunk(3), strict=True):
            split[name.replace(".qkv.", f".{letter}.")] = piece
    return split


def grouped(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many values the group of `pattern` takes among the names: layers, for one."""
    return len({m[1] for m in (re.match(pattern, name) for name in state) if m})


def check_depth(whose: str, depth: int, width: int, published: Mapping[int, int]) -> int:
    """The depth, unless the width is that of a published size of another depth (`published`, width -> depth).

    Without its last block a file looks like a smaller model. Widths of no published size tell nothing.
    """
    wanted = published.get(width, depth)
    if depth != wanted:
        raise UserError(
            f"the {whose} has {depth} blocks of width {width}, and the published one of that width {wanted}; fetch the "
            "whole checkpoint with all its shards, or keep a model of your own as a varkit folder"
        )
    return depth


def entry(state: Mapping[str, Tensor], name: str, whose: str) -> Tensor:
    """A tensor that a checkpoint must have, such as `whose` "VAR tokenizer"."""
    if name not in state:
        raise UserError(
            f"the {whose} checkpoint lacks {name}; check that it is a published {whose}, with all its shards"
        )
    return state[name]


def check_told(what: str, own: Any, told: Any) -> None:
    """Raise `UserError` unless the configuration that published shapes tell is the model's own."""
    for field in fields(own):
        value, published = getattr(own, field.name), getattr(told, field.name)
        if value != published:
            raise UserError(
                f"the published layout cannot express this model: {field.name} of the {what} is {value}, which would "
                f"be read back as {published}; keep the varkit folder"
            )

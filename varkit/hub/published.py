"""Published checkpoints of the families below as whole pipelines and back: what `varkit convert` does.

Which file is which is told by its keys, never by its name. On the way out everything that the published layout cannot
say is refused, by reading the configuration off the written shapes and comparing it with the model's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError, unknown_name
from varkit.files import StrPath, atomic_folder
from varkit.generators.flexvar import FlexVARConfig
from varkit.generators.hmar import HMARConfig
from varkit.generators.infinity import InfinityConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.generators.m_var import MVarConfig
from varkit.generators.mar import MARConfig
from varkit.generators.var import VARConfig
from varkit.hub import (
    flexvar,
    hmar,
    infinity,
    llamagen,
    m_var,
    mar,
    published_hmar,
    published_infinity,
    published_llamagen,
    published_m_var,
    published_mar,
    published_var,
    var,
)
from varkit.hub.assemble import Files
from varkit.hub.folder import DTYPES
from varkit.hub.pipeline import Pipeline
from varkit.hub.released import expanded
from varkit.hub.shards import check_complete, told_name
from varkit.hub.states import State, build_empty, load_state, read_checkpoint, unwrapped
from varkit.tokenizers.base import Tokenizer
from varkit.tokenizers.conv import ConvConfig

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
"""What data parallelism and the compiler put before every name."""

OTHERS: dict[str, str] = {
    "x_embedder.": "DiT",
    "conditioner.": "a part of a varkit folder, which needs no conversion",
    "quantizer.": "a part of a varkit folder, which needs no conversion",
    "loss.discriminator.": "a VQGAN in training",
}
"""Beginnings of keys that no family here has, and what has them."""


@dataclass(frozen=True)
class Family:
    """How a family's checkpoints are told, read and written. tokenizer, generator: files that users may look for.

    shares: the family whose tokenizer it takes, or whose tokenizers have the same layout as its own, so that they are
    told by its name.
    """

    states: Callable[[Mapping[str, Any]], dict[str, State]]
    read: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], dict[str, Any]], Pipeline]
    write: Callable[[Pipeline], Files]
    config: type
    tokenizer: str
    generator: str
    shares: str = ""


FAMILIES = {
    "MAR": Family(
        mar.checkpoint_states, published_mar.pipeline, published_mar.files, MARConfig,
        published_mar.TOKENIZER_FILE, published_mar.GENERATOR_FILE,
    ),
    "HMAR": Family(
        hmar.checkpoint_states, published_hmar.pipeline, published_hmar.files, HMARConfig,
        published_var.TOKENIZER_FILE, "hmar-d16.pth", shares="VAR",
    ),
    "Infinity": Family(
        infinity.checkpoint_states, published_infinity.pipeline, published_infinity.files, InfinityConfig,
        "infinity_vae_d32reg.pth", "infinity_2b_reg.pth",
    ),
    "FlexVAR": Family(
        flexvar.checkpoint_states, flexvar.pipeline, flexvar.files, FlexVARConfig,
        flexvar.TOKENIZER_FILE, "FlexVARd16-epo179.pth", shares="LlamaGen",
    ),
    "LlamaGen": Family(
        llamagen.checkpoint_states, published_llamagen.pipeline, published_llamagen.files, LlamaGenConfig,
        published_llamagen.TOKENIZER_FILE, "c2i_B_256.pt",
    ),
    "M-VAR": Family(
        m_var.checkpoint_states, published_m_var.pipeline, published_m_var.files, MVarConfig,
        published_var.TOKENIZER_FILE, "d16.pth", shares="VAR",
    ),
    "VAR": Family(
        var.checkpoint_states, published_var.pipeline, published_var.files, VARConfig,
        published_var.TOKENIZER_FILE, "var_d16.pth",
    ),
}  # fmt: skip
"""By name; VAR comes last, since what it does not know it refuses."""

NAMES = ", ".join(sorted(FAMILIES))

TOKENIZERS: dict[str, tuple[Callable[[State], Any], Callable[[State, Any], State]]] = {
    "VAR": (var.tokenizer_config, var.tokenizer_from_published),
    "LlamaGen": (llamagen.tokenizer_config, llamagen.tokenizer_from_published),
    "Infinity": (infinity.tokenizer_config, infinity.tokenizer_from_published),
    "MAR": (mar.tokenizer_config, mar.tokenizer_from_published),
}
"""By the family that a tokenizer's keys tell: its configuration from its shapes, and its tensors in our names."""


def pipeline_from_published(paths: Sequence[StrPath], dtype: str | None = None) -> Pipeline:
    """The published tokenizer and generator in `paths`, in any order, or a trainer checkpoint of both.

    A folder stands for the published files in it, such as all shards of a generator.
    Tensors stay memory-mapped, at their own dtypes, or are cast to `dtype` one by one. Every problem is a `UserError`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    pipeline = _read_pipeline(paths, mapped=dtype is None)
    return pipeline if dtype is None else pipeline.to(DTYPES[dtype])


def _read_pipeline(given: Sequence[StrPath], mapped: bool) -> Pipeline:
    paths = [path for one in given for path in expanded(one)]
    check_complete(paths)
    family, states = _read_states(paths, mapped)
    about = {"converted_from": [told_name(path) for path in paths]}
    return FAMILIES[family].read(states["generator"], states["tokenizer"], about)


def tokenizer_from_published(path: StrPath) -> Tokenizer:
    """A published tokenizer by itself, for those that no generator was released with (VQ-8, Infinity's d24 and d64).

    What shapes do not tell is as in the family's released models: the schedule of the largest pictures, no patches.
    Raises `UserError` where the file holds none.
    """
    family, states = _states_of(path, mapped=True)
    if "tokenizer" not in states or family not in TOKENIZERS:
        raise UserError(f"{str(path)!r} holds no tokenizer; give one of {', '.join(TOKENIZERS)}")
    told, read = TOKENIZERS[family]
    config = told(states["tokenizer"])
    tokenizer = build_empty(config.build)
    load_state(tokenizer, read(states["tokenizer"], config), "the tokenizer")
    return tokenizer


def save_published(pipeline: Pipeline, folder: StrPath) -> list[Path]:
    """Write the tokenizer and the generator as their family publishes them, into a new folder; returns both files.

    Raises `UserError` for a model that the published layout cannot express.
    """
    generator = pipeline.configs["generator"]
    family = next((f for f in FAMILIES.values() if isinstance(generator, f.config)), None)
    if family is None:
        raise UserError(f"a {type(generator).__name__} has no published layout here; those of {NAMES} have")
    conv = getattr(pipeline.configs["tokenizer"], "conv", None)
    if conv is not None and conv.groups != ConvConfig.groups:  # of which no shape tells
        raise UserError(
            f"the published layout cannot express this model: its tokenizer normalises {conv.groups} groups of "
            f"channels, published ones {ConvConfig.groups}; keep the varkit folder"
        )
    return _write(family.write(pipeline), folder)


def _write(files: Files, folder: StrPath) -> list[Path]:
    with atomic_folder(folder) as building:
        for name, (published, wrappers) in files.items():
            _save_pickle(published, building / name, wrappers)
    return [Path(folder) / name for name in files]


def _read_states(paths: Sequence[StrPath], mapped: bool) -> tuple[str, dict[str, State]]:
    """The family, and both parts of it."""
    states: dict[str, State] = {}
    origin: dict[str, StrPath] = {}
    families: dict[str, str] = {}
    for path in paths:
        family, found = _states_of(path, mapped)
        for what, state in found.items():
            shard = what in states and families[what] == family and not states[what].keys() & state.keys()
            if shard:
                state = states[what] | state
            elif what in states:
                raise UserError(
                    f"{str(origin[what])!r} and {str(path)!r} both hold a {what}; give one of each"
                )
            states[what], origin[what], families[what] = state, path, family
    for what in ("tokenizer", "generator"):
        if what not in states:
            given = ", ".join(repr(str(path)) for path in paths) or "nothing"
            example = getattr(FAMILIES[next(iter(families.values()), "VAR")], what)
            alone = (
                "" if what == "tokenizer" else ", or read the tokenizer alone in Python (docs/checkpoints.md)"
            )
            raise UserError(f"no {what} is in {given}; give its file too, such as {example}{alone}")
    if families["tokenizer"] not in (families["generator"], FAMILIES[families["generator"]].shares):
        raise UserError(
            f"the tokenizer is {families['tokenizer']}'s and the generator {families['generator']}'s; give the "
            f"tokenizer that the generator was trained with, such as {FAMILIES[families['generator']].tokenizer}"
        )
    return families["generator"], states


def _states_of(path: StrPath, mapped: bool) -> tuple[str, dict[str, State]]:
    """The family of a file, and the parts in it."""
    for checkpoint in _layers(read_checkpoint(path, mapped)):
        for name in ("MAR", "Infinity", "FlexVAR", "LlamaGen", "HMAR"):
            if states := FAMILIES[name].states(checkpoint):
                return name, _checked(states, path)
    # What was innermost is told of.
    for beginning, family in OTHERS.items():
        if any(str(key).startswith(beginning) for key in checkpoint):
            raise UserError(f"{str(path)!r} is no checkpoint of {NAMES}; it looks like {family}")
    if "quantize.embedding.weight" in checkpoint and not any("quant_resi" in str(key) for key in checkpoint):
        raise UserError(f"{str(path)!r} is not VAR's tokenizer; it looks like a single-scale VQGAN")
    for name in ("M-VAR", "VAR"):
        if states := FAMILIES[name].states(checkpoint):
            return name, _checked(states, path)
    held = ", ".join(map(str, list(checkpoint)[:5])) or "nothing"
    raise UserError(
        f"{str(path)!r} is no checkpoint of {NAMES}: it holds {held}; give a published file, or the state dict alone"
    )


def _layers(checkpoint: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A checkpoint, then what is in its usual wrappers; without what wrapping modules put before all names."""
    inner: Mapping[str, Any] | None = checkpoint
    while inner is not None:
        checkpoint = _bare(inner)
        yield checkpoint
        found = unwrapped(checkpoint, WRAPPERS)
        inner = None if found is checkpoint else found


def _bare(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    for prefix in PREFIXES:
        if all(str(name).startswith(prefix) for name in checkpoint):
            checkpoint = {str(name).removeprefix(prefix): entry for name, entry in checkpoint.items()}
    return checkpoint


def _checked(states: dict[str, State], path: StrPath) -> dict[str, State]:
    """The states, if they hold tensors alone."""
    for what, state in states.items():
        odd = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
        if odd:
            raise UserError(
                f"the {what} in {str(path)!r} has entries that are no tensors ({odd[0]} ...); save its state dict alone"
            )
    return states


def _save_pickle(state: State, path: Path, wrappers: Sequence[str] = ()) -> None:
    """`torch.save` through a Python file, whose errors say what went wrong with the disk.

    With `wrappers` the file holds the one state under each of these names.
    """
    compact = {name: _alone(tensor.detach().cpu()) for name, tensor in state.items()}
    with open(path, "wb") as file:
        torch.save({name: compact for name in wrappers} or compact, file)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is part of a larger one, all of which would be written."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

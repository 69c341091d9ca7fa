"""Published VAR, MAR and Infinity checkpoints as whole pipelines and back: what `varkit convert` does.

Which file is which is told by its keys, never by its name. On the way out everything that the published layout cannot
say is refused, by reading the configuration off the written shapes and comparing it with the model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.files import StrPath, atomic_folder
from varkit.generators.conditioning import ClassConfig
from varkit.generators.infinity import InfinityConfig
from varkit.generators.mar import MARConfig
from varkit.generators.var import VARConfig
from varkit.hub import infinity, mar, published_infinity, published_mar, var
from varkit.hub.keymap import check_told
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.states import State, build_empty, load_state, read_checkpoint
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

SETTINGS = Settings(guidance=2.5, ramp=True, top_k=900, top_p=0.96)
"""VAR's published sampling; its cfg 1.5, (1 + t) c - t u with t up to 1.5, is u + s (c - u) with s up to 2.5."""

WRAPPERS = ("state_dict", "model")

OTHERS: dict[str, str] = {
    "cls_embedding.": "LlamaGen's generator",
    "encoder.conv_blocks.": "LlamaGen's tokenizer",
    "x_embedder.": "DiT",
    "conditioner.": "a part of a varkit folder, which needs no conversion",
    "quantizer.": "a part of a varkit folder, which needs no conversion",
    "loss.discriminator.": "a VQGAN in training",
}
"""Beginnings of keys that no family here has, and what has them."""

EXAMPLES = {
    "VAR": {"tokenizer": "vae_ch160v4096z32.pth", "generator": "var_d16.pth"},
    "MAR": {"tokenizer": published_mar.TOKENIZER_FILE, "generator": published_mar.GENERATOR_FILE},
    "Infinity": {"tokenizer": "infinity_vae_d32reg.pth", "generator": "infinity_2b_reg.pth"},
}


def pipeline_from_published(paths: Sequence[StrPath]) -> Pipeline:
    """The published tokenizer and generator in `paths`, in any order, or a trainer checkpoint of both.

    Tensors stay memory-mapped, at their own dtypes. Every problem is a `UserError`.
    """
    family, states = _read_states(paths)
    about = {"converted_from": [Path(path).name for path in paths]}
    if family == "MAR":
        return published_mar.pipeline(states["generator"], states["tokenizer"], about)
    if family == "Infinity":
        return published_infinity.pipeline(states["generator"], states["tokenizer"], about)
    config, head_config = var.generator_configs(states["generator"])
    tokenizer_config = var.tokenizer_config(states["tokenizer"], config.schedule)
    _check_pair(tokenizer_config, config, head_config.vocab_size)
    generator, head = var.generator_from_published(states["generator"])
    tokenizer = var.tokenizer_from_published(states["tokenizer"], tokenizer_config)
    plan = ScalesConfig(config.schedule)
    configs: dict[str, Any] = {
        "tokenizer": tokenizer_config, "generator": config, "head": head_config, "plan": plan,
    }  # fmt: skip
    parts = {name: build_empty(part.build) for name, part in configs.items()}
    for name, state in (("tokenizer", tokenizer), ("generator", generator), ("head", head)):
        load_state(parts[name], state, f"the {name}")
    return Pipeline(parts, configs, SETTINGS, about)


def save_published(pipeline: Pipeline, folder: StrPath) -> list[Path]:
    """Write the tokenizer and the generator as their family publishes them, into a new folder; returns both files.

    Raises `UserError` for a model that the published layout cannot express.
    """
    tokenizer, generator = pipeline.configs["tokenizer"], pipeline.configs["generator"]
    if isinstance(generator, MARConfig):
        return _write(published_mar.files(pipeline), folder)
    if isinstance(generator, InfinityConfig):
        return _write(published_infinity.files(pipeline), folder)
    if not (
        isinstance(tokenizer, MultiScaleVQConfig)
        and isinstance(generator, VARConfig)
        and isinstance(generator.condition, ClassConfig)
    ):
        kinds = f"{type(tokenizer).__name__}, {type(generator).__name__}, {type(pipeline.condition).__name__}"
        raise UserError(
            f"only class-conditional VAR and MAR models have a published layout; this one is {kinds}"
        )
    state = {name: part.state_dict() for name, part in pipeline.parts.items() if isinstance(part, nn.Module)}
    conv = tokenizer.conv
    files = {
        f"vae_ch{conv.channels}v{tokenizer.vocab_size}z{tokenizer.code_channels}.pth": (
            var.tokenizer_to_published(state["tokenizer"], tokenizer)
        ),
        f"var_d{generator.depth}.pth": var.generator_to_published(
            state["generator"], state["head"], generator
        ),
    }
    _check_expressible(pipeline.configs, *files.values())
    return _write({name: (published, ()) for name, published in files.items()}, folder)


def _write(files: Mapping[str, tuple[State, tuple[str, ...]]], folder: StrPath) -> list[Path]:
    with atomic_folder(folder) as building:
        for name, (published, wrappers) in files.items():
            _save_pickle(published, building / name, wrappers)
    return [Path(folder) / name for name in files]


def _read_states(paths: Sequence[StrPath]) -> tuple[str, dict[str, State]]:
    """The family, and both parts of it."""
    states: dict[str, State] = {}
    origin: dict[str, StrPath] = {}
    families: dict[str, str] = {}
    for path in paths:
        if Path(path).is_dir():
            raise UserError(f"{str(path)!r} is a folder; give the checkpoint files in it")
        family, found = _states_of(path)
        for what, state in found.items():
            if what in states and not states[what].keys() & state.keys():
                state = states[what] | state  # shards of one
            elif what in states:
                raise UserError(
                    f"{str(origin[what])!r} and {str(path)!r} both hold a {what}; give one of each"
                )
            states[what], origin[what], families[what] = state, path, family
    for what in ("tokenizer", "generator"):
        if what not in states:
            given = ", ".join(repr(str(path)) for path in paths) or "nothing"
            example = EXAMPLES[next(iter(families.values()), "VAR")][what]
            raise UserError(f"no {what} is in {given}; give its file too, such as {example}")
    if families["tokenizer"] != families["generator"]:
        raise UserError(
            f"the tokenizer is {families['tokenizer']}'s and the generator {families['generator']}'s; give the "
            "tokenizer that the generator was trained with"
        )
    return families["generator"], states


def _states_of(path: StrPath) -> tuple[str, dict[str, State]]:
    """The family of a file, and the parts in it."""
    checkpoint: Mapping[str, Any] = read_checkpoint(path)
    states = mar.checkpoint_states(checkpoint)
    if states:
        return "MAR", _checked(states, path)
    states = infinity.checkpoint_states(checkpoint)
    if states:
        return "Infinity", _checked(states, path)
    for wrapper in WRAPPERS:
        inner = checkpoint.get(wrapper)
        if isinstance(inner, Mapping):
            checkpoint = inner
    for beginning, family in OTHERS.items():
        if any(str(key).startswith(beginning) for key in checkpoint):
            raise UserError(f"{str(path)!r} is no VAR or MAR checkpoint; it looks like {family}")
    if "quantize.embedding.weight" in checkpoint and not any("quant_resi" in str(key) for key in checkpoint):
        raise UserError(f"{str(path)!r} is not VAR's tokenizer; it looks like a single-scale VQGAN")
    try:
        states = var.checkpoint_states(checkpoint)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from error
    return "VAR", _checked(states, path)


def _checked(states: dict[str, State], path: StrPath) -> dict[str, State]:
    """The states, if they hold tensors alone."""
    for what, state in states.items():
        odd = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
        if odd:
            raise UserError(
                f"the {what} in {str(path)!r} has entries that are no tensors ({odd[0]} ...); save its state dict alone"
            )
    return states


def _check_pair(tokenizer: MultiScaleVQConfig, generator: VARConfig, vocab_size: int) -> None:
    for what, theirs, ours in (
        ("code width", tokenizer.code_channels, generator.code_width),
        ("number of codes", tokenizer.vocab_size, vocab_size),
    ):
        if theirs != ours:
            raise UserError(
                f"the tokenizer's {what} is {theirs} and the generator's is {ours}; give the tokenizer that the "
                "generator was trained with"
            )


def _check_expressible(configs: Mapping[str, Any], tokenizer: State, generator: State) -> None:
    """Compare what the published shapes tell with the configurations; what only training uses may differ."""
    told, told_head = var.generator_configs(generator)
    own = configs["generator"]
    told = replace(told, drop_path=own.drop_path, adaln_init=own.adaln_init, condition=own.condition)
    check_told("generator", own, told)
    check_told("head", configs["head"], replace(told_head, init_scale=configs["head"].init_scale))
    own = configs["tokenizer"]
    told_tokenizer = replace(var.tokenizer_config(tokenizer, told.schedule), beta=own.beta)
    check_told("tokenizer's convolutions", own.conv, told_tokenizer.conv)
    check_told("tokenizer", own, told_tokenizer)


def _save_pickle(state: State, path: Path, wrappers: Sequence[str] = ()) -> None:
    """`torch.save` through a Python file, whose errors say what went wrong with the disk.

    With `wrappers` the file holds the one state under each of these names.
    """
    compact = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    with open(path, "wb") as file:
        torch.save({name: compact for name in wrappers} or compact, file)

"""Published VAR checkpoints as whole pipelines and back: what `varkit convert` does.

Which file is which is told by its keys, never by its name. On the way out everything that the published layout cannot
say is refused, by reading the configuration off the written shapes and comparing it with the model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.files import StrPath, atomic_folder
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.hub import var
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
    "text_proj_for_sos.": "Infinity's generator",
    "diffloss.": "MAR's generator",
    "x_embedder.": "DiT",
    "conditioner.": "a part of a varkit folder, which needs no conversion",
    "quantizer.": "a part of a varkit folder, which needs no conversion",
    "loss.discriminator.": "a VQGAN in training",
}
"""Beginnings of keys that VAR does not have, and what has them."""


def pipeline_from_published(paths: Sequence[StrPath]) -> Pipeline:
    """The published tokenizer and generator in `paths`, in any order, or a trainer checkpoint of both.

    Tensors stay memory-mapped, at their own dtypes. Every problem is a `UserError`.
    """
    states = _read_states(paths)
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
    return Pipeline(parts, configs, SETTINGS, {"converted_from": [Path(path).name for path in paths]})


def save_published(pipeline: Pipeline, folder: StrPath) -> list[Path]:
    """Write the tokenizer and the generator as VAR publishes them, into a new folder; returns both files.

    Raises `UserError` for a model that the published layout cannot express.
    """
    tokenizer, generator = pipeline.configs["tokenizer"], pipeline.configs["generator"]
    if not (
        isinstance(tokenizer, MultiScaleVQConfig)
        and isinstance(generator, VARConfig)
        and isinstance(generator.condition, ClassConfig)
    ):
        kinds = f"{type(tokenizer).__name__}, {type(generator).__name__}, {type(pipeline.condition).__name__}"
        raise UserError(f"only class-conditional VAR models have a published layout; this one is {kinds}")
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
    with atomic_folder(folder) as building:
        for name, published in files.items():
            _save_pickle(published, building / name)
    return [Path(folder) / name for name in files]


def _read_states(paths: Sequence[StrPath]) -> dict[str, State]:
    states: dict[str, State] = {}
    origin: dict[str, StrPath] = {}
    for path in paths:
        if Path(path).is_dir():
            raise UserError(f"{str(path)!r} is a folder; give the checkpoint files in it")
        for what, state in _states_of(path).items():
            if what in states:
                raise UserError(
                    f"{str(origin[what])!r} and {str(path)!r} both hold a {what}; give one of each"
                )
            states[what], origin[what] = state, path
    for what, example in (("tokenizer", "vae_ch160v4096z32.pth"), ("generator", "var_d16.pth")):
        if what not in states:
            given = ", ".join(repr(str(path)) for path in paths) or "nothing"
            raise UserError(f"no {what} is in {given}; give its file too, such as {example}")
    return states


def _states_of(path: StrPath) -> dict[str, State]:
    checkpoint: Mapping[str, Any] = read_checkpoint(path)
    for wrapper in WRAPPERS:
        inner = checkpoint.get(wrapper)
        if isinstance(inner, Mapping):
            checkpoint = inner
    for beginning, family in OTHERS.items():
        if any(str(key).startswith(beginning) for key in checkpoint):
            raise UserError(f"{str(path)!r} is not a VAR checkpoint; it looks like {family}")
    if "quantize.embedding.weight" in checkpoint and not any("quant_resi" in str(key) for key in checkpoint):
        raise UserError(f"{str(path)!r} is not VAR's tokenizer; it looks like a single-scale VQGAN")
    try:
        states = var.checkpoint_states(checkpoint)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from error
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
    _compare("generator", own, told)
    _compare("head", configs["head"], replace(told_head, init_scale=configs["head"].init_scale))
    own = configs["tokenizer"]
    told_tokenizer = replace(var.tokenizer_config(tokenizer, told.schedule), beta=own.beta)
    _compare("tokenizer's convolutions", own.conv, told_tokenizer.conv)
    _compare("tokenizer", own, told_tokenizer)


def _compare(what: str, own: Any, told: Any) -> None:
    for field in fields(own):
        value, published = getattr(own, field.name), getattr(told, field.name)
        if value != published:
            raise UserError(
                f"the published layout cannot express this model: {field.name} of the {what} is {value}, which would "
                f"be read back as {published}; keep the varkit folder"
            )


def _save_pickle(state: State, path: Path) -> None:
    """`torch.save` through a Python file, whose errors say what went wrong with the disk."""
    compact = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    with open(path, "wb") as file:
        torch.save(compact, file)

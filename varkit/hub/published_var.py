"""Published VAR checkpoints as a whole pipeline and back; `varkit.hub.published` decides which files are these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import var
from varkit.hub.assemble import Files, assembled, states_of
from varkit.hub.keymap import check_told
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.states import State
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig

TOKENIZER_FILE = "vae_ch160v4096z32.pth"

SETTINGS = Settings(guidance=2.5, ramp=True, top_k=900, top_p=0.96)
"""Published sampling; its cfg 1.5, (1 + t) c - t u with t up to 1.5, is u + s (c - u) with s up to 2.5."""


@dataclass(frozen=True)
class Layout:
    """How generators of a kind over VAR's tokenizer are published: configurations told by shapes, tensors in and out.

    history: that of the plan, unless the checkpoint's attention mask tells another. file: the generator's name, by
    depth. training: fields that only training uses, of which shapes tell nothing.
    """

    configs: Callable[..., tuple[VARConfig, CategoricalConfig]] = var.generator_configs
    read: Callable[..., tuple[State, State]] = var.generator_from_published
    write: Callable[..., State] = var.generator_to_published
    history: int | None = None
    file: str = "var_d{}.pth"
    training: tuple[str, ...] = ("drop_path", "adaln_init")


VAR = Layout()


def pipeline(
    generator: Mapping[str, Tensor],
    tokenizer: Mapping[str, Tensor],
    about: dict[str, Any],
    layout: Layout = VAR,
) -> Pipeline:
    """The parts of a published generator and tokenizer."""
    config, head = layout.configs(generator)
    told = var.tokenizer_config(tokenizer, config.schedule)
    check_pair(told, config, head.vocab_size)
    history = var.history_of(generator, Schedule.parse(config.schedule), layout.history)
    plan = ScalesConfig(config.schedule, history=history)
    configs = {"tokenizer": told, "generator": config, "head": head, "plan": plan}
    states = dict(zip(("generator", "head"), layout.read(generator), strict=True))
    states["tokenizer"] = var.tokenizer_from_published(tokenizer, told)
    return assembled(configs, states, SETTINGS, about)


def files(pipeline: Pipeline, layout: Layout = VAR) -> Files:
    """What is published of a pipeline. Raises `UserError` for a model that the published layout cannot express."""
    tokenizer, generator = pipeline.configs["tokenizer"], pipeline.configs["generator"]
    if type(tokenizer) is not MultiScaleVQConfig or not isinstance(generator.condition, ClassConfig):
        kinds = f"{type(tokenizer).__name__}, {type(generator.condition).__name__}"
        raise UserError(
            "only class-conditional VAR and MAR models, LlamaGen's, and Infinity's over text features have a published "
            f"layout; this one is {kinds}"
        )
    state, conv = states_of(pipeline), tokenizer.conv
    autoencoder = var.tokenizer_to_published(state["tokenizer"], tokenizer)
    transformer = layout.write(state["generator"], state["head"], generator)
    plan = pipeline.configs["plan"]
    if isinstance(plan, ScalesConfig) and layout.history is None:  # M-VAR's code is not told by its mask
        hidden = var.hidden_by(plan.history, Schedule.parse(generator.schedule))
        transformer[var.MASK] = var.published_mask(hidden)
    _check_expressible(pipeline.configs, autoencoder, transformer, layout)
    return {
        f"vae_ch{conv.channels}v{tokenizer.vocab_size}z{tokenizer.code_channels}.pth": (autoencoder, ()),
        layout.file.format(generator.depth): (transformer, ()),
    }


def check_pair(tokenizer: MultiScaleVQConfig, generator: VARConfig, vocab_size: int) -> None:
    """Raise `UserError` for a tokenizer whose codes are not those of the generator."""
    for what, theirs, ours in (
        ("code width", tokenizer.code_channels, generator.code_width),
        ("number of codes", tokenizer.vocab_size, vocab_size),
    ):
        if theirs != ours:
            raise UserError(
                f"the tokenizer's {what} is {theirs} and the generator's is {ours}; give the tokenizer that the "
                f"generator was trained with, such as {TOKENIZER_FILE}"
            )


def _check_expressible(
    configs: Mapping[str, Any], tokenizer: State, generator: State, layout: Layout
) -> None:
    """Compare what the published shapes tell with the configurations; what only training uses may differ."""
    told, told_head = layout.configs(generator)
    own = configs["generator"]
    told = replace(told, condition=own.condition, **{name: getattr(own, name) for name in layout.training})
    check_told("generator", own, told)
    history = var.history_of(generator, Schedule.parse(told.schedule), layout.history)
    check_told("plan", configs["plan"], ScalesConfig(told.schedule, history=history))
    check_told("head", configs["head"], replace(told_head, init_scale=configs["head"].init_scale))
    check_tokenizer(configs["tokenizer"], tokenizer, told.schedule)


def check_tokenizer(own: MultiScaleVQConfig, published: State, schedule: tuple[Side, ...]) -> None:
    """Raise `UserError` unless the published shapes tell the tokenizer's own configuration."""
    told = replace(var.tokenizer_config(published, schedule), beta=own.beta)
    check_told("tokenizer's convolutions", own.conv, told.conv)
    check_told("tokenizer", own, told)

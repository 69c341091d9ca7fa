"""Published M-VAR generators (OliverRensu/MVAR: `d16.pth` ...) <-> our parts. Their tokenizer is VAR's.

The layout is VAR's with a mixer under `mamba` in each block, nine modulation vectors, and for each block a buffer with
the slots of each scale, which is dropped on the way in and made anew on the way out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.errors import UserError
from varkit.generators.m_var import MVarConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.hub import var
from varkit.hub.keymap import Rule, entry, joined, to_published
from varkit.hub.states import State
from varkit.nn.mamba import Mamba2Config
from varkit.plans.schedule import Schedule, Side

WHOSE = "M-VAR"
MIXER = "blocks.0.mamba"
SIDES = ".patch_nums"

RULES = (
    Rule(r"\.scan\.into\.", ".mamba.in_proj."),
    Rule(r"\.scan\.conv\.", ".mamba.conv1d."),
    Rule(r"\.scan\.out\.", ".mamba.out_proj."),
    Rule(r"\.scan\.norm\.gain$", ".mamba.norm.weight"),
    Rule(r"\.scan\.log_a$", ".mamba.A_log"),
    Rule(r"\.scan\.skip$", ".mamba.D"),
    Rule(r"\.scan\.dt_bias$", ".mamba.dt_bias"),
    *var.GENERATOR_RULES,
)


def checkpoint_states(checkpoint: Mapping[str, Any]) -> dict[str, State]:
    """What `varkit.hub.var.checkpoint_states` finds, if its generator has mixers; else nothing."""
    trainer = checkpoint.get("trainer")
    generator = trainer.get("var_wo_ddp") if isinstance(trainer, Mapping) else checkpoint
    return var.checkpoint_states(checkpoint) if f"{MIXER}.in_proj.weight" in (generator or {}) else {}


def generator_configs(
    state: Mapping[str, Tensor], schedule: tuple[Side, ...] | None = None
) -> tuple[MVarConfig, CategoricalConfig]:
    """The configurations of generator and head that the shapes of a published generator tell."""
    config, head = var.generator_configs(state, schedule)
    if config.shared_modulation:
        raise UserError("the M-VAR checkpoint shares its modulation, which the published code breaks at")
    inner = entry(state, f"{MIXER}.norm.weight", WHOSE).shape[0]
    convolved, _, kernel = entry(state, f"{MIXER}.conv1d.weight", WHOSE).shape
    scan = Mamba2Config(
        state=(convolved - inner) // 2,
        head_width=inner // entry(state, f"{MIXER}.dt_bias", WHOSE).shape[0],
        expand=inner // config.width,
        kernel=kernel,
    )
    return MVarConfig(**vars(config), scan=scan, published_start=True), head


def generator_from_published(
    state: Mapping[str, Tensor], schedule: tuple[Side, ...] | None = None
) -> tuple[State, State]:
    """A published generator's tensors as the states of `MVar` and `CategoricalHead`."""
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(SIDES)}
    return var.read_generator(weights, generator_configs(state, schedule), RULES, WHOSE)


def generator_to_published(
    state: Mapping[str, Tensor], head: Mapping[str, Tensor], config: MVarConfig
) -> State:
    """The inverse, with the buffers that the published code expects."""
    schedule = Schedule.parse(config.schedule)
    lengths = torch.tensor(schedule.lengths, dtype=torch.int32)
    buffers = var.generator_buffers(config, hidden=var.hidden_by(0, schedule))
    buffers |= {f"blocks.{i}.attn{SIDES}": lengths for i in range(config.depth)}
    return to_published(joined(generator=state, head=head), RULES) | buffers

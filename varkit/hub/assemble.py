"""A pipeline from configurations and states, and its states again: what every converter does at its end."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.states import State, build_empty, load_state

Files = dict[str, tuple[State, tuple[str, ...]]]
"""What is published of a pipeline: {file: (state, the names that it has in the file)}."""


def assembled(
    configs: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    settings: Settings,
    about: dict[str, Any],
) -> Pipeline:
    """The parts of `configs`, holding the tensors of `states` as they are."""
    parts = {name: build_empty(config.build) for name, config in configs.items()}
    for name, state in states.items():
        load_state(parts[name], state, f"the {name}")
    return Pipeline(parts, dict(configs), settings, about)


def states_of(pipeline: Pipeline) -> dict[str, State]:
    """The state of each part that has one."""
    return {name: part.state_dict() for name, part in pipeline.parts.items() if isinstance(part, nn.Module)}

"""What users ask for, as a model reads it: labels, ids of words, or features that a text encoder gives of words.

    {"label": (1, B)},    {"text": (1, B, T)},    {"features": (1, B, T, D), "mask": (1, B, T)}

Each prompt is encoded alone, so what it becomes does not depend on its neighbours; padding is put on afterwards, behind
it, and masked. Legend: B samples, T tokens, D features of a token.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.errors import UserError, unknown_name
from varkit.generators.base import Condition
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig, TextFeaturesConfig

Prompt = str | int
ConditionConfig = ClassConfig | TextConfig | TextFeaturesConfig


class TextSource(Protocol):
    """Where features of words come from: a text encoder, or a file of what one gave."""

    @property
    def width(self) -> int:
        """D."""
        ...

    def count(self, prompt: str) -> int:
        """T of a prompt."""
        ...

    def encode(self, prompt: str) -> Tensor:
        """Features (T, D) of a prompt, on the CPU."""
        ...


def condition_of(
    config: ConditionConfig,
    prompts: Sequence[Prompt],
    source: TextSource | None = None,
    tokens: int | None = None,
) -> Condition:
    """Labels, class names or captions -> the condition of a model, on the CPU.

    Features are padded to `tokens`, or to the longest of these prompts. Raises `UserError` for what the model does not
    know.
    """
    if isinstance(config, ClassConfig):
        return {"label": torch.tensor([[label_of(config, prompt) for prompt in prompts]])}
    words = [_words(prompt) for prompt in prompts]
    if isinstance(config, TextConfig) or source is None:
        return {"text": config.encode(words)[None]}
    longest = max(tokens or 0, longest_prompt(config, words, source))
    rows = {prompt: source.encode(prompt).float() for prompt in dict.fromkeys(words)}
    return padded([rows[prompt] for prompt in words], longest)


def padded(rows: Sequence[Tensor], tokens: int | None = None) -> Condition:
    """Features (T_i, D) of each prompt -> a condition of `tokens` tokens, by default as many as the longest has."""
    longest = tokens or max(map(len, rows))
    features = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return {"features": features[None], "mask": mask[None]}


def longest_prompt(config: TextFeaturesConfig, prompts: Sequence[Prompt], source: TextSource) -> int:
    """Tokens of the longest prompt; none is encoded. Raises `UserError` for one that the model is too short for."""
    counts = {prompt: source.count(prompt) for prompt in dict.fromkeys(map(_words, prompts))}
    for prompt, count in counts.items():
        if count > config.length:
            raise UserError(
                f"prompt {prompt[:60]!r} has {count} tokens; this model reads at most {config.length}: shorten it"
            )
    return max(counts.values())


def nothing(config: ConditionConfig, batch: int) -> Condition:
    """A condition (1, B, ...), on the CPU, of the shape that asks for nothing: what it holds does not matter."""
    if isinstance(config, ClassConfig):
        return {"label": torch.zeros(1, batch, dtype=torch.int64)}
    if isinstance(config, TextConfig):
        return {"text": config.encode([""] * batch)[None]}
    return padded([torch.zeros(1, config.width)] * batch)


def check_source(config: ConditionConfig, source: TextSource) -> None:
    """Raise `UserError` unless the model takes features of this width."""
    if not isinstance(config, TextFeaturesConfig):
        reads = "labels" if isinstance(config, ClassConfig) else "words by itself"
        raise UserError(f"this model reads {reads} and takes no features; leave the text encoder out")
    if source.width != config.width:
        raise UserError(
            f"text features of {source.width} channels do not fit this model, which takes {config.width}; use the text "
            "encoder that it was trained with"
        )


def label_of(config: ClassConfig, prompt: Prompt) -> int:
    """The label that a number or the name of a class stands for."""
    if isinstance(prompt, str) and prompt in config.names:
        return config.names.index(prompt)
    if isinstance(prompt, str) and not re.fullmatch(r"-?\d+", prompt):
        names = config.names or tuple(str(i) for i in range(config.classes))
        raise unknown_name("class", prompt, names, f"(or a label from 0 to {config.classes - 1})")
    label = int(prompt)
    if not 0 <= label < config.classes:
        raise UserError(f"label {label} is out of range; this model knows 0 to {config.classes - 1}")
    return label


def _words(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise UserError(f"label {prompt!r} was given to a text model; give a caption such as 'a red circle'")
    return prompt

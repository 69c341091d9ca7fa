"""A tiny transformer that accepts any plan: values, coordinates, levels, segments and noise times are all just
embedded.
"""

import torch
from torch import Tensor, nn

from varkit.generators.base import Condition, Generator, Prepared, rows
from varkit.generators.conditioning import ClassCondition, ClassConfig
from varkit.nn.attention import NoNorm, SelfAttention
from varkit.nn.ports import through
from varkit.plans.step import Step


class ToyGenerator(Generator):
    """Two plain blocks over ids (vocabulary `vocab`) or vectors (`channels` wide)."""

    def __init__(self, width: int = 16, vocab: int = 0, channels: int = 0, depth: int = 2) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.conditioner = ClassCondition(ClassConfig(4), width)
        self.embed: nn.Module = nn.Embedding(vocab, width) if vocab else nn.Linear(channels, width)
        self.name = "ids" if vocab else "vectors"
        self.place = nn.Linear(4, width)
        self.start = nn.Parameter(torch.randn(width))
        self.attention = nn.ModuleList(SelfAttention(width, 2, NoNorm()) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def prepare(self, condition: Condition) -> Prepared:
        return {"vector": self.conditioner.embed(condition["label"])}

    def forward(self, fed: dict[str, Tensor], step: Step, prepared: Prepared, window, ports=None) -> Tensor:
        vector = prepared["vector"].flatten(0, 1)
        values = fed[self.name]
        repeats = vector.shape[0] // values.shape[0]
        slots = step.feed
        time = torch.zeros(slots.ids.shape) if slots.time is None else slots.time
        where = torch.stack([slots.coords[..., 0], slots.coords[..., -1], slots.level, time], dim=-1)
        h = self.embed(values.to(self.start.dtype) if self.name == "vectors" else values)
        blank = (slots.shows < 0)[..., None]
        h = torch.where(blank, self.start.expand_as(h), h)
        place = self.place(where.to(self.start.dtype))
        h = rows(h + place, repeats) + vector[:, None]
        for layer in range(self.depth):
            h = h + self.attention[layer](h, window, layer)
            h = h + torch.tanh(self.mlp[layer](h))
            h = through(ports, "block", layer, h, step, prepared)
        return h

"""The default features: a small network that learned here what is in a picture and how the picture was damaged.

Classes alone would let a feature forget blur and noise, which is just what a distance between sets of pictures has to
see; so the network also tells how much a picture was faded, blurred, noised. `varkit train features --out RUN` makes
the weights (`varkit/train/features_task.py`).
Legend: B batch, C channels.
"""

from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from varkit.data.real import PHOTOGRAPHS
from varkit.data.render import BACKGROUNDS, COLOURS, SHAPES

SIDE, FEATURES = 64, 192
WIDTHS = (32, 64, 128)
"""Channels at 32, 16 and 8 pixels a side."""

THINGS = (
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"digit {digit}" for digit in range(10)),
    *PHOTOGRAPHS,
)
"""The classes: coloured shapes, digits, and the photograph that a patch is from."""

COUNTS = 4
DAMAGES = ("fade", "blur", "noise")
GROUPS = 8


class Heads(NamedTuple):
    """What training reads off: logits of things (B, 87), background (B, 4), number of objects (B, 4); damage (B, 3)."""

    things: Tensor
    background: Tensor
    number: Tensor
    damage: Tensor


class Residual(nn.Module):
    """x + two normalised 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class SmallFeatures(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> features (B, 192) and probabilities (B, 87) of things."""

    size, side, antialias = FEATURES, SIDE, True

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 4, stride=2, padding=1)
        body: list[nn.Module] = [Residual(WIDTHS[0])]
        for width, next_width in pairwise(WIDTHS):
            body += [nn.Conv2d(width, next_width, 3, stride=2, padding=1), Residual(next_width)]
        self.body = nn.Sequential(*body)
        self.norm = nn.GroupNorm(GROUPS, WIDTHS[-1])
        self.out = nn.Conv2d(WIDTHS[-1], FEATURES, 1)
        self.things = nn.Linear(FEATURES, len(THINGS))
        self.background = nn.Linear(FEATURES, len(BACKGROUNDS))
        self.number = nn.Linear(FEATURES, COUNTS)
        self.damage = nn.Linear(FEATURES, len(DAMAGES))

    def features(self, images: Tensor) -> Tensor:
        """The pooled activations that every head reads."""
        return F.silu(self.out(F.silu(self.norm(self.body(self.stem(images)))))).mean(dim=(2, 3))

    def heads(self, images: Tensor) -> Heads:
        """What training compares with the truth."""
        h = self.features(images)
        return Heads(self.things(h), self.background(h), self.number(h), self.damage(h))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(images)
        return h, self.things(h).softmax(dim=1)

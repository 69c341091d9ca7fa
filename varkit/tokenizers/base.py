"""What every tokenizer promises: pixels <-> named latents, at a schedule given as data.

Legend: B batch, H W image, h w latent grid, L positions of the schedule, D latent channels.
"""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from varkit.canvases.base import Canvas
from varkit.errors import UserError
from varkit.plans.schedule import Schedule

Latents = dict[str, Tensor]
"""Named tensors with positions on dimension 1: `ids` (B, L) int64, `bits` (B, L, D) uint8, `vectors` (B, L, D)."""


class Tokenizer(nn.Module, ABC):
    """Pixels <-> latents. `schedule` is the default; any other with a legal finest grid may be given to each call.

    Images are float (B, 3, H, W) in [-1, 1]; H and W are `stride` times the schedule's finest grid.
    """

    stride: int
    schedule: Schedule

    @abstractmethod
    def encode(self, images: Tensor, schedule: Schedule | None = None) -> Latents:
        """(B, 3, H, W) in [-1, 1] -> latents over all positions of the schedule."""

    def training_latents(self, images: Tensor) -> Latents:
        """What a generator's training keeps of pictures: their latents, and whatever else its lessons may ask for."""
        return self.encode(images)

    @abstractmethod
    def decode(self, latents: Latents, schedule: Schedule | None = None, levels: int | None = None) -> Tensor:
        """Latents -> images (B, 3, H, W) clamped to [-1, 1]; with `levels`, from the first levels alone (a preview)."""

    @abstractmethod
    def canvas(self, batch: int, schedule: Schedule | None = None) -> Canvas:
        """An empty canvas for `batch` samples on this tokenizer's latent layout."""

    def image_size(self, schedule: Schedule | None = None) -> tuple[int, int]:
        """(H, W) in pixels that a schedule decodes to."""
        h, w = (schedule or self.schedule).last
        return h * self.stride, w * self.stride

    def check_images(self, images: Tensor, schedule: Schedule | None = None) -> None:
        """Raise `UserError` unless `images` is (B, 3, H, W) of the schedule's size."""
        expected = self.image_size(schedule)
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != expected:
            raise UserError(
                f"images of shape {tuple(images.shape)} do not fit this tokenizer; the schedule's finest grid "
                f"{(schedule or self.schedule).last} at stride {self.stride} needs (B, 3, {expected[0]}, {expected[1]})"
            )


class TokenizerConfig(Protocol):
    """What describes a tokenizer: plain values in a frozen dataclass."""

    def build(self) -> Tokenizer:
        """The network, freshly initialised."""

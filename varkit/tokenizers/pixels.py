"""The tokenizer that does nothing: pixels are their own latents, for models that predict them one by one (PixelCNN++).

Values are rounded to the 256 levels of a byte, k / 127.5 - 1, so that a likelihood over them is one of pictures as they
are stored. There is nothing to train. Legend: B batch, H W image, L = H W positions, row after row.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varkit.plans.schedule import Schedule, Side
from varkit.tokenizers.base import Latents, Tokenizer

if TYPE_CHECKING:
    from varkit.canvases.base import Canvas

LEVELS = 256


def to_levels(values: Tensor) -> Tensor:
    """Numbers in [-1, 1] -> the nearest of the 256 levels, int64; what lies outside goes to the ends."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().long()


def from_levels(levels: Tensor) -> Tensor:
    """Levels 0 to 255 -> float32 in [-1, 1]."""
    return levels.float() / 127.5 - 1


@dataclass(frozen=True)
class PixelsConfig:
    """size: the picture's side in pixels, or (height, width)."""

    size: Side

    def __post_init__(self) -> None:
        if not isinstance(self.size, int):
            object.__setattr__(self, "size", tuple(self.size))
        Schedule.of(self.size)  # validates

    def build(self) -> "Pixels":
        """Make the tokenizer."""
        return Pixels(self)


class Pixels(Tokenizer):
    """Images <-> {"pixels": (B, L, 3) float32 in [-1, 1]}, each of 256 levels."""

    stride = 1

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config, self.schedule = config, Schedule.of(config.size)
        self.register_buffer(
            "place", torch.empty(0), persistent=False
        )  # follows `.to`: where canvases are made

    def encode(self, images: Tensor, schedule: Schedule | None = None) -> Latents:
        self.check_images(images, schedule)
        return {"pixels": from_levels(to_levels(images.flatten(2).mT))}

    def decode(self, latents: Latents, schedule: Schedule | None = None, levels: int | None = None) -> Tensor:
        return latents["pixels"].mT.unflatten(2, self.image_size(schedule)).clamp(-1, 1)

    def canvas(self, batch: int, schedule: Schedule | None = None) -> "Canvas":
        from varkit.canvases.grid import GridCanvas

        schedule = schedule or self.schedule
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"pixels": ((3,), torch.float32)}
        return GridCanvas.empty(
            batch,
            schedule.total,
            fields,
            show=lambda latents: self.decode(latents, schedule),
            device=self.place.device,  # type: ignore[arg-type]
        )

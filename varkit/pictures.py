"""Pictures at the edges of the library: tensors in [-1, 1] inside, PIL outside, and grids to look at."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkit.errors import no_numbers


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_array(images: Tensor) -> np.ndarray:
    """Float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded to nearest. Raises `UserError` for NaN."""
    images = images.detach().float()
    if bool(images.sum().isnan()):
        raise no_numbers("a picture")
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Float (B, 3, H, W) in [-1, 1] -> B pictures."""
    return [Image.fromarray(row) for row in to_array(images)]


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures of one size in rows of `columns`, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet

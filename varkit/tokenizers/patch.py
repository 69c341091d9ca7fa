"""A patch-wise encoder: each p x p patch becomes one latent position, and no patch knows of the others.

Equal patches get equal features wherever they lie, so a plain background costs a generator next to nothing. The decoder
beside it is the convolutional one, which sees around. Legend: B batch, H W image, h w latent grid, p patch, C width.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError


@dataclass(frozen=True)
class PatchEncoderConfig:
    """`depth` residual two-layer perceptrons of `width` over each patch."""

    width: int = 384
    depth: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 0:
            raise UserError(
                f"a patch encoder of width {self.width} and depth {self.depth} cannot be; use at least 1 and 0"
            )


class PatchBlock(nn.Module):
    """x + down(gelu(up(LN(x)))), twice as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class PatchEncoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, latent_channels, H / p, W / p)."""

    def __init__(self, config: PatchEncoderConfig, patch: int, latent_channels: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch**2, config.width)
        self.blocks = nn.Sequential(*(PatchBlock(config.width) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, latent_channels)

    def forward(self, images: Tensor) -> Tensor:
        x = F.pixel_unshuffle(images, self.patch).permute(0, 2, 3, 1)
        return self.out(self.norm(self.blocks(self.embed(x)))).permute(0, 3, 1, 2)

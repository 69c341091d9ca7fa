"""The convolutional encoder and decoder of VQGAN (arXiv 2012.09841), which VAR and LlamaGen share.

Residual blocks at each resolution, halved by stride-2 convolutions and doubled by nearest-neighbour
upsampling, with single-head attention where the grid is small. Level i works at 1 / 2**i of the image in
both directions, so `encoder.levels[i]` and `decoder.levels[i]` see the same grid; the decoder runs its
levels from the last to the first.
Legend: B batch, H W image, h w latent grid, C channels of a level.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.tokenizers.tiled import halo, in_tiles

EPS = 1e-6


@dataclass(frozen=True)
class ConvConfig:
    """Sizes of the encoder and of its mirror image. The defaults are VAR's published tokenizer.

    `attention` puts attention after each block of the lowest level and in the middle; small grids do without
    it. `groups` is that of the normalisation (a narrower level has one a channel). Keep 4 or more channels in
    each: a group of one channel forgets its mean, and with it the colour of a plain background. 0 normalises each
    position by itself, so that equal surroundings give equal features wherever they are. `patch` folds
    p x p pixels into channels before the first convolution and back after the last, so that no layer works at
    full resolution: small tokenizers train several times faster so.
    """

    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent_channels: int = 32
    attention: bool = True
    groups: int = 32
    patch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(
                f"multipliers {self.multipliers} must be one or more integers >= 1, e.g. (1, 2, 4)"
            )
        for name, least in (
            ("channels", 1), ("res_blocks", 1), ("latent_channels", 1), ("groups", 0), ("patch", 1)
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for width in self.widths:
            if self.groups and width % min(self.groups, width):
                raise UserError(
                    f"a level of {width} channels does not split into {self.groups} normalisation groups; "
                    f"choose groups that divide channels, {self.channels}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def stride(self) -> int:
        """Pixels a latent position covers in each direction."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))


class PositionNorm(nn.LayerNorm):
    """Layer normalisation of each position's channels, (B, C, h, w): no position knows of the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normalisation(channels: int, groups: int) -> nn.Module:
    """Normalisation over (at most) `groups` groups of channels and all positions, or with 0 of each position."""
    if groups == 0:
        return PositionNorm(channels, eps=EPS)
    return nn.GroupNorm(min(groups, channels), channels, eps=EPS)


def initialize(module: nn.Module) -> None:
    """Start a convolution so that it keeps the variance of its input; for `Module.apply`.

    PyTorch's own start shrinks it to a third each time, and a tokenizer then takes long to see its images.
    """
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = normalisation(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = normalisation(outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Single-head attention between all positions of a feature map, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = normalisation(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1)
        h = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return x + self.proj(h.squeeze(1).mT.reshape(x.shape))


class Downsample(nn.Conv2d):
    """Halve both sides. Zeros are padded below and to the right only, as in every VQGAN descendant."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Double both sides: each value is repeated 2 x 2, then convolved."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, each with attention where asked, then the change of resolution."""

    def __init__(self, widths: list[int], groups: int, attention: bool, resample: nn.Module) -> None:
        super().__init__()
        pairs = zip(widths, widths[1:], strict=False)
        self.blocks = nn.ModuleList(ResBlock(inputs, outputs, groups) for inputs, outputs in pairs)
        self.attention = nn.ModuleList(
            Attention(width, groups) if attention else nn.Identity() for width in widths[1:]
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = attention(block(x))
        return self.resample(x)


def laid_out(x: Tensor) -> Tensor:
    """x, channels last unless gradients are wanted; what follows keeps the layout.

    One picture of VAR's decoder so, on two Zen 4 cores: 2.19 s in place of 2.41 in float32, 0.98 in place of 1.10 in
    bfloat16. A training says for itself which layout suits it.
    """
    return x if torch.is_grad_enabled() else x.contiguous(memory_format=torch.channels_last)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, groups)
        self.attention = Attention(channels, groups) if attention else nn.Identity()
        self.block2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, latent_channels, H / stride, W / stride)."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else config.channels
            down = Downsample(width) if i < last else nn.Identity()
            self.levels.append(
                Level(
                    [before] + [width] * config.res_blocks,
                    config.groups,
                    config.attention and i == last,
                    down,
                )
            )
        self.middle = Middle(widths[-1], config.groups, config.attention)
        self.norm_out = normalisation(widths[-1], config.groups)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(laid_out(F.pixel_unshuffle(images, self.patch)))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Features (B, latent_channels, h, w) -> images (B, 3, h * stride, w * stride), not clamped.

    level_attention: whether the lowest level attends too, as a VQGAN's, or the middle alone. `tile` > 0 draws the
    levels above the lowest in tiles of so many latent positions a side, in less memory; attention is all below them.
    """

    def __init__(self, config: ConvConfig, level_attention: bool = True) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], config.groups, config.attention)
        self.levels = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i + 1] if i < last else width
            up = Upsample(width) if i > 0 else nn.Identity()
            # One block more than the encoder's, as published.
            self.levels.append(
                Level(
                    [before] + [width] * (config.res_blocks + 1),
                    config.groups,
                    config.attention and level_attention and i == last,
                    up,
                )
            )
        self.norm_out = normalisation(widths[0], config.groups)
        self.patch, self.stride = config.patch, config.stride
        self.tile, self.halo = 0, halo(len(widths), config.res_blocks)
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch**2, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.levels[-1](self.middle(self.conv_in(laid_out(features))))
        if not self.tile:
            return self.upper(x)
        up = x.shape[-1] // features.shape[-1]
        return in_tiles(self.upper, x, self.tile * up, self.halo, self.stride // up)

    def upper(self, x: Tensor) -> Tensor:
        """What the lowest level gives, at twice its resolution -> images."""
        for level in reversed(self.levels[:-1]):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)

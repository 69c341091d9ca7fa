"""Large pictures in little memory: the upper levels of a convolutional decoder, tile after tile.

Those levels hold nearly all of a decoder's memory and work, and none of its attention. Each tile is drawn from a window
that is wider by the decoder's reach (`halo`), and what is not the tile's is cut off. So a tile equals its part of the
whole picture wherever the layers are local; group normalisation is not, since it averages over the window instead of
the picture.
Legend: B batch, C channels, h w grid, s pixels a position.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from varkit.errors import UserError


def halo(levels: int, res_blocks: int) -> int:
    """How many positions around its own a pixel depends on, on the grid that the lowest of the levels gives.

    Counted backwards from the pixel: 1 for a 3 x 3 convolution, half as many (rounded up) below each doubling.
    """
    blocks = 2 * (res_blocks + 1)  # a decoder has one block more than its encoder, of two convolutions
    if levels == 1:
        return 1
    reach = 1 + blocks
    for _ in range(levels - 2):
        reach = -(-(reach + 1) // 2) + blocks
    return reach


def in_tiles(decode: Callable[[Tensor], Tensor], x: Tensor, tile: int, reach: int, scale: int) -> Tensor:
    """decode(x), x (B, C, h, w) -> (B, 3, h s, w s), `tile` x `tile` positions at a time."""
    height, width = x.shape[2:]
    picture = x.new_empty(len(x), 3, height * scale, width * scale)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            above, before = min(top, reach), min(left, reach)
            window = x[:, :, top - above : top + tile + reach, left - before : left + tile + reach]
            drawn = decode(window)[:, :, above * scale :, before * scale :]
            own = picture[:, :, top * scale : (top + tile) * scale, left * scale : (left + tile) * scale]
            own.copy_(drawn[:, :, : own.shape[2], : own.shape[3]])
    return picture


def set_tile(tokenizer: nn.Module, pixels: int) -> None:
    """Let a tokenizer decode in tiles of pixels x pixels. Raises `UserError` for a size that its grid does not have."""
    decoder: Any = getattr(tokenizer, "decoder", None)
    if not hasattr(decoder, "tile"):
        raise UserError(f"a {type(tokenizer).__name__} tokenizer has no decoder to tile; leave tile out")
    if pixels < 1 or pixels % decoder.stride:
        raise UserError(
            f"tile {pixels} must be a multiple of {decoder.stride}, the pixels that a latent covers"
        )
    decoder.tile = pixels // decoder.stride

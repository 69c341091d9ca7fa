"""A steered block with a scan between attention and feed-forward (M-VAR, arXiv 2411.10433).

What attention sees is the window's affair; the scan runs over all slots in the order they are fed, from what it carried
out of earlier steps, so that attention may stay within a step and information still goes from step to step.
"""

from dataclasses import dataclass

from torch import Tensor

from varkit.nn.adaln import AdaLNBlock, BlockConfig
from varkit.nn.attention import Window
from varkit.nn.mamba import Mamba2, Mamba2Config


@dataclass(frozen=True)
class ScanBlockConfig(BlockConfig):
    """A block with a Mamba-2 mixer."""

    scan: Mamba2Config = Mamba2Config()

    def build(self, condition_width: int, drop_path_rate: float = 0.0) -> "ScanBlock":
        """Make the block."""
        return ScanBlock(self, condition_width, drop_path_rate)


class ScanBlock(AdaLNBlock):
    """x += g1 * Attn(..); x += g2 * Mamba2(LN(x) (1 + s2) + b2); x += g3 * FFN(..), with nine vectors.

    Their order is that of six: the gates, the scales, the shifts (g1, g2, g3, s1, s2, s3, b1, b2, b3).
    """

    branches = 3

    def __init__(self, config: ScanBlockConfig, condition_width: int, drop_path_rate: float = 0.0) -> None:
        super().__init__(config, condition_width, drop_path_rate)
        self.scan = Mamba2(config.width, config.scan)

    def _between(self, x: Tensor, vectors: Tensor, window: Window, layer: int) -> Tensor:
        return self._added(x, vectors, 1, window.carry(layer, self._modulated(x, vectors, 1), self.scan))

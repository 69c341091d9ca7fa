"""Canvas over maps that do not add up (FlexVAR, arXiv 2502.20313): the last one drawn is the picture.

Legend: B samples, N positions of the finest grid, D code width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.canvases.pyramid import PyramidCanvas
from varkit.devices import sent


class MapsCanvas(PyramidCanvas):
    """f_hat (B, N, D) holds the last map; `show` decodes maps (B, D, h, w) of any grid."""

    @property
    def drawn(self) -> Tensor:
        """(B,) int64: maps known of each sample, counted from the coarsest."""
        starts = torch.tensor(self.schedule.offsets[:-1])
        return self.known[:, starts].long().cumprod(dim=1).sum(dim=1)

    def preview(self) -> Tensor:
        """Each sample's last map, decoded at its own size and enlarged; samples may stand at different ones."""
        if self.show is None:
            raise TypeError("this canvas has no decoder, so it cannot show a picture")
        counts = self.drawn
        pictures: dict[int, Tensor] = {}
        for count in counts.unique().tolist():
            side = self.schedule.sides[count - 1]  # nothing yet: zeros at the finest grid
            maps = self.f_hat[self._rows(counts == count)][:, : side[0] * side[1]]
            pictures[count] = self.show(maps.mT.reshape(len(maps), -1, *side))
        h, w = self.schedule.last
        any_count, any_picture = next(iter(pictures.items()))
        stride = any_picture.shape[2] // self.schedule.sides[any_count - 1][0]
        shown = any_picture.new_empty(self.batch, 3, h * stride, w * stride)
        for count, picture in pictures.items():
            if picture.shape[2:] != shown.shape[2:]:
                picture = F.interpolate(picture, shown.shape[2:], mode="bicubic").clamp(-1, 1)
            shown[self._rows(counts == count)] = picture
        return shown

    def _rows(self, chosen: Tensor) -> Tensor:
        """Numbers of the samples chosen, where the maps are."""
        return sent(chosen.nonzero()[:, 0], self.f_hat.device)

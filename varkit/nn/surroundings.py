"""What lies around a slot on its own grid, so that an embedding can read shapes and not only points.

A linear map over it is a convolution over each scale's map, for any set of whole maps, in any order, one scale at a
time or all packed. It spares the first blocks from finding each slot's neighbours by attention.
Legend: B rows, L slots, D width, K places around a slot, itself included.
"""

import torch
from torch import Tensor, nn

from varkit.plans.schedule import Schedule


class Surroundings(nn.Module):
    """vectors (B, L, D) of whole maps, at slots `ids`, (L,) or (B, L) -> (B, L, K x D), zeros beyond the border.

    reach: grid steps in each direction; K = (2 reach + 1)^2.
    """

    offsets: Tensor
    inside: Tensor

    def __init__(self, schedule: Schedule, reach: int) -> None:
        super().__init__()
        self.places = (2 * reach + 1) ** 2
        maps = [_map(h, w, reach) for h, w in schedule.sides]
        self.register_buffer("offsets", torch.cat([offsets for offsets, _ in maps]), persistent=False)
        self.register_buffer("inside", torch.cat([inside for _, inside in maps]), persistent=False)

    def forward(self, vectors: Tensor, ids: Tensor) -> Tensor:
        rows, slots = vectors.shape[:2]
        at = torch.arange(slots, device=ids.device)[:, None] + self.offsets[ids]
        at = at.clamp(0, slots - 1)
        if at.ndim == 2:
            around = vectors[:, at]
        else:
            around = vectors[torch.arange(rows, device=at.device)[:, None, None], at]
        return (around * self.inside[ids][..., None].to(around.dtype)).flatten(-2)


def _map(h: int, w: int, reach: int) -> tuple[Tensor, Tensor]:
    """For each position of a grid, how far the places around it are in reading order, and whether they exist."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    span = torch.arange(-reach, reach + 1)
    dy, dx = (t.flatten() for t in torch.meshgrid(span, span, indexing="ij"))
    ny, nx = y.flatten()[:, None] + dy, x.flatten()[:, None] + dx
    inside = (ny >= 0) & (ny < h) & (nx >= 0) & (nx < w)
    return torch.where(inside, dy * w + dx, 0), inside

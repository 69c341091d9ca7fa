"""How much each scale counts in the loss (HMAR, arXiv 2506.04421).

With rho_k = side_k / side_K, "lognorm" gives scale k the standard normal density at the k-th of the reversed ratios,
z_k = (rho_{K+1-k} - mean) / deviation, so that middle scales count most: in spite of its name a normal density, as
released. A scale's weight is shared equally by its tokens.
Legend: K scales, L tokens.
"""

import torch
from torch import Tensor

from varkit.errors import unknown_name
from varkit.plans.schedule import Schedule

WEIGHTS = ("lognorm", "equal", "none")


def scale_weights(kind: str, schedule: Schedule) -> Tensor:
    """(K,) float64, summing to 1: "lognorm", "equal", or "none", where every token counts the same."""
    if kind not in WEIGHTS:
        raise unknown_name("scale weights", kind, WEIGHTS)
    sizes = torch.tensor(schedule.lengths, dtype=torch.float64)
    if kind == "none":
        return sizes / sizes.sum()
    if kind == "equal" or len(sizes) == 1:
        return torch.full_like(sizes, 1 / len(sizes))
    ratios = (sizes.sqrt() / sizes[-1].sqrt()).flip(0)  # the side of a square, for any shape
    z = (ratios - ratios.mean()) / ratios.std()
    density = (-z.square() / 2).exp()
    return density / density.sum()


def token_weights(kind: str, schedule: Schedule) -> Tensor:
    """(L,) float64, summing to 1: each scale's weight over its tokens."""
    sizes = torch.tensor(schedule.lengths)
    return (scale_weights(kind, schedule) / sizes).repeat_interleave(sizes)

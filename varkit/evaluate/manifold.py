"""Precision and recall of generated pictures (Kynkaanniemi et al. 2019, arXiv 1904.06991).

A set's manifold is the union of balls around its rows, each reaching to the row's k-th nearest neighbour. Precision is
the share of samples on the reference's manifold (do pictures look real?), recall the share of the reference on the
samples' manifold (is everything drawn?). Computed blockwise, so the matrix of distances is never whole.
Legend: N samples, M reference rows, D features.
"""

from typing import NamedTuple

import numpy as np

from varkit.errors import UserError

Array = np.ndarray

K = 3
BLOCK = 1024
ROUNDING = 1e-12
"""Squared distances below this share of the squared norms are rounding of |a|^2 + |b|^2 - 2 a.b, and taken as 0."""


class Membership(NamedTuple):
    """precise (N,): is the sample on the reference's manifold? recalled (M,): is the reference row on the samples'?"""

    precise: Array
    recalled: Array

    @property
    def precision(self) -> float:
        return float(self.precise.mean())

    @property
    def recall(self) -> float:
        return float(self.recalled.mean())


def membership(samples: Array, reference: Array, k: int = K) -> Membership:
    """Which rows of (N, D) and (M, D) lie on the other set's manifold."""
    middle = reference.mean(axis=0)
    samples, reference = samples - middle, reference - middle
    sample_radii, reference_radii = squared_radii(samples, k), squared_radii(reference, k)
    precise, recalled = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for start in range(0, len(samples), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = _squared_distances(samples[rows], reference)
        precise[rows] = (distances <= reference_radii).any(axis=1)
        recalled |= (distances <= sample_radii[rows, None]).any(axis=0)
    return Membership(precise, recalled)


def squared_radii(rows: Array, k: int = K) -> Array:
    """The squared distance (N,) of each row of (N, D) to its k-th nearest neighbour."""
    if len(rows) <= k:
        raise UserError(
            f"the {k} nearest neighbours of a picture need more than {k} pictures; there are {len(rows)}"
        )
    radii = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        block = slice(start, start + BLOCK)
        # The row itself, at 0, is the nearest of all.
        radii[block] = np.partition(_squared_distances(rows[block], rows), k, axis=1)[:, k]
    return radii


def _squared_distances(a: Array, b: Array) -> Array:
    norms = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    distances = norms - 2 * (a @ b.T)
    distances[distances < ROUNDING * norms] = 0
    return distances

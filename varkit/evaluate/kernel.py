"""The kernel inception distance (KID, arXiv 1801.01401): squared MMD under k(x, y) = (x.y / D + 1)^3, unbiased.

The published figure is a mean over random subsets. The trick: over all subsets, the mean of the unbiased estimate *is*
the estimate over all pairs, so that is computed, and subsets only give the published spread.
Legend: N samples, M reference rows, D features, R resamples. Everything is float64.
"""

from collections.abc import Iterator

import numpy as np

Array = np.ndarray

BLOCK = 1024
SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(samples: Array, reference: Array) -> float:
    """The unbiased estimate from (N, D) and (M, D): near 0, also below it, for sets of one distribution."""
    across = sum(_kernel(block, reference).sum() for _, block in _blocks(samples))
    between = across / (len(samples) * len(reference))
    return float(_own_mean(samples) + _own_mean(reference) - 2 * between)


def subset_size(samples: Array, reference: Array) -> int:
    """The published 1000, or half of the smaller set where there are not twice as many rows."""
    return max(2, min(SUBSET_SIZE, len(samples) // 2, len(reference) // 2))


def subset_spread(samples: Array, reference: Array, seed: int = 0, subsets: int = SUBSETS) -> float:
    """The standard deviation of the estimate over random subsets of `subset_size` rows of each set."""
    size, rng = subset_size(samples, reference), np.random.default_rng(seed)

    def subset(rows: Array) -> Array:
        return rows[rng.choice(len(rows), size, replace=False)]

    return float(np.std([kernel_distance(subset(samples), subset(reference)) for _ in range(subsets)]))


def kernel_resamples(samples: Array, reference: Array, counts: Array) -> Array:
    """The estimate (R,) of resamples; `counts` (R, N) says how often each row of `samples` is taken.

    A row and its own copies are no pair, or repeated rows would pass for likeness.
    """
    counts = counts.astype(np.float64)
    n = counts.sum(axis=1)
    own, across = np.zeros(len(counts)), np.zeros(len(counts))
    for start, block in _blocks(samples):
        rows = slice(start, start + len(block))
        kernel = _kernel(block, samples)
        kernel[np.arange(len(block)), np.arange(len(samples))[rows]] = 0
        own += (counts[:, rows] * (counts @ kernel.T)).sum(axis=1)
        across += counts[:, rows] @ _kernel(block, reference).mean(axis=1)
    pairs = np.maximum(1, n**2 - (counts**2).sum(axis=1))  # 0 where one row was drawn throughout
    return own / pairs + _own_mean(reference) - 2 * across / n


def _own_mean(rows: Array) -> float:
    """Mean kernel over the pairs of different rows."""
    total = sum(_kernel(block, rows).sum() for _, block in _blocks(rows))
    diagonal = (((rows**2).sum(axis=1) / rows.shape[1] + 1) ** 3).sum()
    return float((total - diagonal) / (len(rows) * (len(rows) - 1)))


def _kernel(a: Array, b: Array) -> Array:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _blocks(rows: Array) -> Iterator[tuple[int, Array]]:
    for start in range(0, len(rows), BLOCK):
        yield start, rows[start : start + BLOCK]

"""The Frechet distance of two Gaussians (FID, arXiv 1706.08500), and the statistics it needs.

    d^2 = |mu_a - mu_b|^2 + Tr S_a + Tr S_b - 2 Tr (S_a S_b)^(1/2)

The trick: with S = R R' the last trace is the sum of singular values of R_a' R_b. Both roots come from symmetric
eigenproblems, so there is no complex root, no multiple of the identity to add, and singular covariances are exact.
Legend: N pictures, D features, S spatial features, R resamples. Everything is float64.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from varkit.errors import UserError
from varkit.files import StrPath, atomic_write

Array = np.ndarray


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D)."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, rows: Array) -> Self:
        """Of rows (N, D), N at least 2; the covariance is divided by N - 1."""
        moments = Moments()
        moments.update(rows)
        gaussian = moments.gaussian()
        return cls(gaussian.mean, gaussian.covariance)


class Moments:
    """Mean and scatter of rows that come in batches; those of two parts merge into those of the whole (Chan 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros(0)
        self.scatter: Array = np.zeros((0, 0))

    def update(self, rows: Array) -> None:
        """Take rows (B, D) in."""
        rows = np.asarray(rows, np.float64)
        batch = Moments()
        batch.count, batch.mean = len(rows), rows.mean(axis=0)
        centred = rows - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Take in what another has seen."""
        if not self.count:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
        elif other.count:
            total = self.count + other.count
            apart = other.mean - self.mean
            scatter = self.scatter + other.scatter
            self.scatter = scatter + np.outer(apart, apart) * (self.count * other.count / total)
            self.mean = self.mean + apart * (other.count / total)
            self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and covariance of all rows seen."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 pictures; there are {self.count}")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """d^2 above, never below 0."""
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared; take both with the same "
            "features"
        )
    apart = a.mean - b.mean
    overlap = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    return max(0.0, float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap))


def frechet_resamples(rows: Array, reference: Gaussian, counts: Array) -> Array:
    """The distance (R,) of resamples of `rows` (N, D) to `reference`; `counts` (R, N) says how often each row is taken.

    Rows are projected onto the reference's root once; a resample then costs one weighted Gram matrix and its
    eigenvalues.
    """
    centred = rows - reference.mean
    projected = centred @ _root(reference.covariance)
    squares = (centred**2).sum(axis=1)
    own = np.trace(reference.covariance)
    distances = np.empty(len(counts))
    for i, count in enumerate(counts):
        n = count.sum()
        mean, shift = count @ centred / n, count @ projected / n
        taken = count > 0
        weighted = projected[taken] * np.sqrt(count[taken, None])
        gram = (weighted.T @ weighted - n * np.outer(shift, shift)) / (n - 1)
        overlap = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum()
        spread = (count @ squares - n * (mean @ mean)) / (n - 1)
        distances[i] = mean @ mean + spread + own - 2 * overlap
    return distances


def _root(covariance: Array) -> Array:
    """R (D, rank) with R R' = S; eigenvalues that are zero but for rounding are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


@dataclass(frozen=True)
class Statistics:
    """All that FID needs to know of a set of pictures.

    spatial: the same of spatial features, for sFID. features, pictures: which network, how many pictures; None in files
    that do not say.
    """

    pool: Gaussian
    spatial: Gaussian | None = None
    features: str | None = None
    pictures: int | None = None


def save_statistics(path: StrPath, statistics: Statistics) -> None:
    """Write an .npz with pytorch-fid's keys `mu` and `sigma`.

    With spatial features it also has `mu_s` and `sigma_s`, which the evaluator of guided-diffusion asks for as well.
    `features` and `pictures` are ours, and those two pass over them.
    """
    arrays = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    if statistics.features is not None:
        arrays["features"] = np.array(statistics.features)
    if statistics.pictures is not None:
        arrays["pictures"] = np.array(statistics.pictures)
    if Path(path).suffix != ".npz":
        raise UserError(f"statistics are an .npz file; {str(path)!r} ends otherwise: choose another name")
    with atomic_write(path) as part:
        np.savez_compressed(part, **arrays)  # type: ignore[arg-type]


def load_statistics(path: StrPath) -> Statistics:
    """Read statistics of ours, of pytorch-fid or of guided-diffusion; pickles are refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = arrays.files
            pool = _gaussian(arrays["mu"], arrays["sigma"], path)
            spatial = _gaussian(arrays["mu_s"], arrays["sigma_s"], path) if "mu_s" in keys else None
            features = str(arrays["features"]) if "features" in keys else None
            pictures = int(arrays["pictures"]) if "pictures" in keys else None
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file {str(path)!r}; check the path") from None
    except Exception as error:  # damaged files meet the readers of zip, zlib and headers with any exception
        why = " ".join(str(error).split())[:120]
        raise UserError(
            f"{str(path)!r} is not a file of statistics ({why}); it needs the arrays mu (D,) and sigma (D, D)"
        ) from error
    return Statistics(pool, spatial, features, pictures)


def has_statistics(path: StrPath) -> bool:
    """Whether `path` is an .npz file with the array `mu`, rather than pictures."""
    if Path(path).suffix.lower() != ".npz" or not Path(path).is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return "mu" in arrays.files
    except (OSError, ValueError):
        return False


def _gaussian(mean: Array, covariance: Array, path: StrPath) -> Gaussian:
    size = mean.size
    if mean.ndim != 1 or covariance.shape != (size, size):
        raise UserError(
            f"{str(path)!r} has a mean of shape {mean.shape} and a covariance of {covariance.shape}; they are (D,) "
            "and (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{str(path)!r} has numbers that are not finite; make the statistics again")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    return Gaussian(mean, (covariance + covariance.T) / 2)

"""Two sets of pictures compared: FID, KID, precision and recall, and a score of the classifier, with their intervals.

Intervals are 95 % bootstrap percentiles: the rows of features are drawn anew, with repeats, `resamples` times. What is
averaged is resampled and nothing else: the samples for FID, KID, precision and the inception score, the reference for
recall, pairs for rFID; the other set, and for precision and recall both manifolds, stay as they are.

The trap: a resample knows fewer different pictures than the samples, so its FID is higher by about the bias that the
figure itself has, and its plain percentiles can lie wholly above the figure. They are moved to have their mean at the
figure (they tell how it scatters at this number of pictures), and the move is reported as `bias`: about how far the
figure lies above that of endless samples.

The floor is the same comparison between real pictures: as many of the reference as there are samples (half of it, where
that is less) against its others.
Legend: N samples, M pictures of the reference, D features, R resamples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkit.errors import UserError
from varkit.evaluate.features import Collector, Features, FeatureSet, collect
from varkit.evaluate.frechet import Gaussian, Statistics, frechet_distance, frechet_resamples
from varkit.evaluate.inception_score import inception_score, score_resamples
from varkit.evaluate.kernel import kernel_distance, kernel_resamples, subset_size, subset_spread
from varkit.evaluate.manifold import K, membership
from varkit.evaluate.sources import Source
from varkit.pictures import grid, to_array, to_pil, to_tensor

Array = np.ndarray

RESAMPLES = 200
LEAST = K + 1
TAIL = 0.025
SHOWN, PER_ROW = 48, 16


@dataclass(frozen=True)
class Figure:
    """A metric's value, its interval (None without resamples), and what else is told of it."""

    value: float
    interval: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
        } | self.details


@dataclass(frozen=True)
class Comparison:
    """Figures by name, and all they depend on; `reference_pictures` is None for statistics that do not say."""

    features: str
    dimension: int
    pictures: int
    reference_pictures: int | None
    figures: dict[str, Figure]
    resamples: int
    seed: int

    def warnings(self) -> list[str]:
        """Why the figures may mean little."""
        few = [n for n in (self.pictures, self.reference_pictures) if n is not None and n <= self.dimension]
        return [
            f"{n} pictures are no more than the {self.dimension} numbers of a feature: the covariance is singular "
            f"and FID means little; take several times {self.dimension}"
            for n in few[:1]
        ]

    def summary(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "features": self.features,
            "dimension": self.dimension,
            "pictures": self.pictures,
            "reference_pictures": self.reference_pictures,
            "resamples": self.resamples,
            "resampling_seed": self.seed,
            **{name: figure.summary() for name, figure in self.figures.items()},
        }


@dataclass(frozen=True)
class DistributionReport:
    """The comparison, the same between real pictures (None for statistics or a small reference), pictures to show."""

    comparison: Comparison
    floor: Comparison | None
    reference: Statistics
    shown: list[Tensor] = field(default_factory=list, repr=False)

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        summary = self.comparison.summary() | {"warnings": self.comparison.warnings(), "floor": None}
        if self.floor is None:
            return summary
        sizes = {"pictures": self.floor.pictures, "reference_pictures": self.floor.reference_pictures}
        return summary | {"floor": sizes | {name: f.value for name, f in self.floor.figures.items()}}

    def sheet(self) -> Image.Image:
        """Rows of samples, then rows of the reference."""
        full = [pictures[: max(1, len(pictures) // PER_ROW) * PER_ROW] for pictures in self.shown]
        columns = min(PER_ROW, *(len(pictures) for pictures in full))
        rows = [
            image for pictures in full for image in to_pil(pictures[: len(pictures) // columns * columns])
        ]
        return grid(rows, columns)


def evaluate_distribution(
    samples: Source,
    reference: Source | Statistics,
    features: Features,
    resamples: int = RESAMPLES,
    seed: int = 0,
    advance: Callable[[int], Any] = lambda n: None,
) -> DistributionReport:
    """Read both sources through `features` and compare them; `seed` is that of resampling and of the floor's halves."""
    shown: list[Tensor] = []
    if isinstance(reference, Statistics):
        real: FeatureSet | Statistics = reference
    else:
        real = collect(features, _watched(reference, shown, advance))
    statistics = real.statistics() if isinstance(real, FeatureSet) else real
    _check_features(features.name, statistics)
    fake = collect(features, _watched(samples, shown, advance))
    among_real = floor(real, len(fake), seed) if isinstance(real, FeatureSet) else None
    return DistributionReport(compare(fake, real, resamples, seed), among_real, statistics, shown[::-1])


def compare(
    samples: FeatureSet, reference: FeatureSet | Statistics, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Every figure that both sides allow: statistics give Frechet distances only; no resamples, no intervals."""
    if len(samples) < LEAST:
        raise UserError(f"{len(samples)} pictures are too few to compare; give at least {LEAST} of each kind")
    real = reference if isinstance(reference, FeatureSet) else None
    statistics = reference if isinstance(reference, Statistics) else reference.statistics()
    _check_features(samples.name, statistics)
    counts = _counts(len(samples), resamples, [seed, 0])
    figures = {"fid": fid(samples, statistics, counts)}
    own = samples.spatial
    if own is not None and statistics.spatial is not None:
        figures["sfid"] = Figure(frechet_distance(own, statistics.spatial))
    if real is not None:
        figures["kid"] = _kid(samples, real, counts, seed)
        figures |= _manifolds(samples, real, counts, _counts(len(real), resamples, [seed, 1]))
    if samples.probabilities is not None:
        value, again = inception_score(samples.probabilities), score_resamples(samples.probabilities, counts)
        figures["inception_score"] = Figure(value, interval(value, again, least=1.0))
    size = samples.rows.shape[1]
    return Comparison(samples.name, size, len(samples), statistics.pictures, figures, resamples, seed)


def fid(samples: FeatureSet, reference: Statistics, counts: Array) -> Figure:
    """The Frechet distance; `counts` (R, N) are the resamples."""
    value = frechet_distance(samples.statistics().pool, reference.pool)
    again = frechet_resamples(samples.rows, reference.pool, counts)
    return Figure(value, interval(value, again, least=0.0), _bias(value, again))


def floor(reference: FeatureSet, n: int, seed: int = 0) -> Comparison | None:
    """n pictures of the reference, at most half of it, against its others; None where that leaves too few."""
    order = np.random.default_rng([seed, 2]).permutation(len(reference))
    cut = min(n, len(reference) // 2)
    if cut < LEAST:
        return None
    return compare(reference.take(order[:cut]), reference.take(order[cut:]), resamples=0, seed=seed)


def reconstruction_fid(
    originals: FeatureSet, rebuilt: FeatureSet, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """rFID: reconstructions against the very pictures that they are of; a resample takes both of a pair."""
    size = rebuilt.rows.shape[1]
    value = _distance(originals.rows, rebuilt.rows)
    rng = np.random.default_rng([seed, 0])
    drawn = [rng.integers(0, len(rebuilt), len(rebuilt)) for _ in range(resamples)]
    again = np.array([_distance(originals.rows[rows], rebuilt.rows[rows]) for rows in drawn])
    figures = {"rfid": Figure(value, interval(value, again, least=0.0), _bias(value, again))}
    return Comparison(rebuilt.name, size, len(rebuilt), len(originals), figures, resamples, seed)


def _distance(a: Array, b: Array) -> float:
    return frechet_distance(Gaussian.of(a), Gaussian.of(b))


def _bias(value: float, resampled: Array) -> dict[str, float]:
    return {"bias": float(resampled.mean() - value)} if len(resampled) else {}


class Pairs:
    """Pictures and their reconstructions, for rFID; these are rounded first, as they would be in files."""

    def __init__(self, features: Features) -> None:
        self.originals, self.rebuilt = Collector(features), Collector(features)

    def add(self, images: Tensor, rebuilt: Tensor) -> None:
        """Take both, (B, 3, H, W) in [-1, 1]."""
        self.originals.add(images)
        self.rebuilt.add(to_tensor(to_array(rebuilt)))

    def compare(self, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
        """rFID of all pairs."""
        return reconstruction_fid(self.originals.result(), self.rebuilt.result(), resamples, seed)


def interval(
    value: float, resampled: Array, least: float = -np.inf, most: float = np.inf
) -> tuple[float, float] | None:
    """The middle 95 % of the resampled figures (R,), moved to have their mean at `value`; None if there are none."""
    if not len(resampled):
        return None
    low, high = np.quantile(resampled - resampled.mean() + value, (TAIL, 1 - TAIL))
    return float(max(low, least)), float(min(high, most))


def _kid(samples: FeatureSet, reference: FeatureSet, counts: Array, seed: int) -> Figure:
    value = kernel_distance(samples.rows, reference.rows)
    again = kernel_resamples(samples.rows, reference.rows, counts) if len(counts) else np.zeros(0)
    details = {
        "subset_spread": subset_spread(samples.rows, reference.rows, seed),
        "subset_size": subset_size(samples.rows, reference.rows),
    }
    return Figure(value, interval(value, again), details)


def _manifolds(
    samples: FeatureSet, reference: FeatureSet, counts: Array, real_counts: Array
) -> dict[str, Figure]:
    """Precision over the samples, recall over the reference; a repeated row would have a ball without extent."""
    found = membership(samples.rows, reference.rows)
    precise = counts @ found.precise / max(1, len(samples))
    recalled = real_counts @ found.recalled / max(1, len(reference))
    return {
        "precision": Figure(found.precision, interval(found.precision, precise, 0.0, 1.0)),
        "recall": Figure(found.recall, interval(found.recall, recalled, 0.0, 1.0)),
    }


def _counts(n: int, resamples: int, seed: list[int]) -> Array:
    """How often each of n rows is taken, for each resample: (R, n)."""
    rng = np.random.default_rng(seed)
    drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples)]
    return np.array(drawn, np.float64).reshape(resamples, n)


def _check_features(name: str, statistics: Statistics) -> None:
    if statistics.features not in (None, name):
        raise UserError(
            f"the statistics are of the features {statistics.features}, and these pictures are read by {name}; use "
            "the same --features for both"
        )


def _watched(source: Source, shown: list[Tensor], advance: Callable[[int], Any]) -> Iterator[Tensor]:
    """The batches, the first pictures kept to be shown."""
    kept: list[Tensor] = []
    for batch in source.batches():
        kept += list(batch[: SHOWN - len(kept)])
        advance(len(batch))
        yield batch
    shown.append(torch.stack(kept))

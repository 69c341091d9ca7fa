"""Features: the network through which pictures are compared, and the one place where pictures are resized for it.

    small             the default, trained by this repository's recipe (`varkit/evaluate/small_features.py`)
    inception:PATH    the Inception network of published FIDs (`varkit/evaluate/inception.py`); its weights are yours to
                      bring. A bare PATH works too: which network a file is for shows in its keys.

Resizing. A picture goes to the network's side as a whole (bilinear, half-pixel centres, no crop, so it is stretched if
it is not square): with antialiasing for the small network, without for Inception, since published figures were made so.
Legend: B batch, H W picture, N pictures, D features, C classes, S spatial features.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.errors import UserError
from varkit.evaluate.frechet import Gaussian, Moments, Statistics
from varkit.evaluate.inception import InceptionV3
from varkit.evaluate.small_features import SmallFeatures
from varkit.files import StrPath
from varkit.hub.pipeline import WEIGHTS
from varkit.hub.states import build_empty, load_state, read_checkpoint

SMALL = WEIGHTS / "features" / "small.safetensors"
BATCH = 32


class FeatureBatch(NamedTuple):
    """features (B, D); probabilities (B, C) of a classifier, or None; spatial (B, S) where sFID is defined."""

    features: Tensor
    probabilities: Tensor | None = None
    spatial: Tensor | None = None


class Features(Protocol):
    """Pictures (B, 3, `side`, `side`) in [-1, 1] -> `size` features each.

    `name` says which network, and with which weights.
    """

    name: str
    size: int
    side: int
    antialias: bool

    def __call__(self, images: Tensor) -> FeatureBatch: ...


class NetworkFeatures:
    """A network with `size`, `side` and `antialias`, whose outputs are those of a `FeatureBatch`, as features."""

    def __init__(self, name: str, network: nn.Module) -> None:
        self.name, self.network = name, network.eval()
        self.size: int = network.size  # type: ignore[assignment]
        self.side: int = network.side  # type: ignore[assignment]
        self.antialias: bool = network.antialias  # type: ignore[assignment]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> FeatureBatch:
        return FeatureBatch(*self.network(images))


@dataclass(frozen=True)
class FeatureSet:
    """What the metrics read of N pictures, float64: rows (N, D), probabilities (N, C) or None, spatial or None.

    `name` is that of the features.
    """

    name: str
    rows: np.ndarray
    probabilities: np.ndarray | None = None
    spatial: Gaussian | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: np.ndarray) -> "FeatureSet":
        """Some of the pictures; spatial features are known only of all together."""
        probabilities = None if self.probabilities is None else self.probabilities[rows]
        return FeatureSet(self.name, self.rows[rows], probabilities)

    def statistics(self) -> Statistics:
        """What FID needs of them."""
        return Statistics(Gaussian.of(self.rows), self.spatial, self.name, len(self))


class Collector:
    """Makes a `FeatureSet` of pictures that come in batches of any size."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.waiting: list[Tensor] = []
        self.rows: list[np.ndarray] = []
        self.probabilities: list[np.ndarray] = []
        self.spatial: Moments | None = None

    def add(self, images: Tensor) -> None:
        """Take pictures (B, 3, H, W) in [-1, 1]."""
        self.waiting += list(resized(images, self.features))
        while len(self.waiting) >= BATCH:
            self._read(BATCH)

    def result(self) -> FeatureSet:
        """All pictures so far."""
        if self.waiting:
            self._read(len(self.waiting))
        if not self.rows:
            raise UserError("there are no pictures to measure")
        probabilities = np.concatenate(self.probabilities) if self.probabilities else None
        spatial = self.spatial.gaussian() if self.spatial is not None and self.spatial.count > 1 else None
        return FeatureSet(self.features.name, np.concatenate(self.rows), probabilities, spatial)

    def _read(self, count: int) -> None:
        """Batches are always full (repeating the last picture): a network's sums may round by the batch's shape."""
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        output = self.features(torch.stack([*taken, *taken[-1:] * (BATCH - count)]))
        self.rows.append(_float64(output.features, count))
        if output.probabilities is not None:
            self.probabilities.append(_float64(output.probabilities, count))
        if output.spatial is not None:
            self.spatial = self.spatial or Moments()
            self.spatial.update(_float64(output.spatial, count))


def collect(features: Features, batches: Iterable[Tensor]) -> FeatureSet:
    """Features of pictures in batches (B, 3, H, W) in [-1, 1]."""
    collector = Collector(features)
    for images in batches:
        collector.add(images)
    return collector.result()


def resized(images: Tensor, features: Features) -> Tensor:
    """Pictures (B, 3, H, W) at the features' side; see the head of this file."""
    side = (features.side, features.side)
    if tuple(images.shape[2:]) == side:
        return images
    return F.interpolate(images, side, mode="bilinear", align_corners=False, antialias=features.antialias)


def load_features(spec: str = "small") -> Features:
    """Features by name or path; raises `UserError` in one line for a name, file or layout that is not known."""
    kind, _, rest = spec.partition(":")
    if spec == "small":
        if not SMALL.is_file():
            raise UserError(
                "the default features are not part of this installation; make them with `varkit train features --out "
                "RUN` and add --features RUN/features.safetensors"
            )
        return _from_file(SMALL, "small")
    if rest and kind in BUILDERS:
        return _from_file(rest, kind)
    if Path(spec).exists() or len(Path(spec).parts) > 1 or Path(spec).suffix:
        return _from_file(spec, None)
    raise UserError(
        f"unknown features {spec!r}; take small, inception:PATH, or the path of a file with either's weights"
    )


BUILDERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "small": ("stem.weight", SmallFeatures),
    "inception": ("Conv2d_1a_3x3.conv.weight", InceptionV3),
}
"""By name: a key by which its files are told, and the network."""


def _from_file(path: StrPath, kind: str | None) -> Features:
    state = read_checkpoint(path)
    state = {name: value for name, value in state.items() if name not in _counters(state)}
    if kind is None:
        kind = next((name for name, (key, _) in BUILDERS.items() if key in state), None)
    if kind is None:
        keys = " or ".join(key for key, _ in BUILDERS.values())
        raise UserError(
            f"{str(path)!r} holds no features that are known: it has no {keys}; its first key is "
            f"{next(iter(state), 'missing')!r}"
        )
    network = build_empty(BUILDERS[kind][1])
    load_state(network, state | _counters(network.state_dict()), f"{str(path)!r}")
    return NetworkFeatures(f"{kind}-{_digest(path)}", network.float())


def _counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batch normalisation's counts of training steps: unused, and in some files only."""
    return {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}


def _digest(path: StrPath) -> str:
    """The beginning of the file's SHA-256, which is also in the published file's own name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def _float64(values: Tensor, count: int) -> np.ndarray:
    return values[:count].double().cpu().numpy()

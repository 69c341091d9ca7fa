"""What becomes of each frequency of a picture: power by radius, and what a tokenizer keeps of each third (NFIG).

X(u, v) is a picture's Fourier transform over its pixels, Y that of its reconstruction, divided by sqrt(H W), so that
white noise of variance s^2 has the power |X|^2 = s^2 everywhere. Frequencies are cycles a pixel; radii go from 0 to
sqrt(1/2), the corner, and are told apart by `RINGS` rings of one width, or by thirds: low, mid and high.

    kept  = sum min(|X|, |Y|) / sum |X|           amplitude that is there, wherever its phase (1: all, 0: none)
    error = sum |X - Y|^2 / sum |X|^2             energy of the difference (0: none, 1: as much as of black pictures)
    PSD distance = rms over rings of ln P_Y - ln P_X, where P is the ring's mean power and the rounding noise of 8 bits

NFIG's "frequency keep score" and "PSD distance" have no published formula; these are plain ones of that meaning.
Legend: B batch, C channels, H W image.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

RINGS = 16
CORNER = 0.5**0.5
THIRDS = ("low", "mid", "high")
ROUNDING = (2 / 255) ** 2 / 12
"""Variance of rounding to 8 bits over [-1, 1]: what is below it no picture shows."""


def radius(height: int, width: int) -> np.ndarray:
    """Cycles a pixel of each entry of a Fourier transform, (H, W), in its order."""
    return np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))


def radial_power(images: Tensor, rings: int = RINGS) -> np.ndarray:
    """Mean power |X|^2 of images (B, C, H, W) in each ring, (rings,); NaN where a small picture has no frequency."""
    power = _transform(images).abs().square().mean(dim=(0, 1)).numpy()
    return _ring_means(power, rings)


@dataclass(frozen=True)
class Kept:
    """Share of the amplitude that is kept, and of the energy that the difference has, at some frequencies."""

    kept: float
    error: float


@dataclass(frozen=True)
class Spectrum:
    """Figures over all pictures. power: (original, reconstruction) in each ring that has a frequency."""

    psd_distance: float
    all: Kept
    low: Kept
    mid: Kept
    high: Kept
    power: tuple[tuple[float, float], ...]

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        return asdict(self)


class Spectra:
    """Counts pictures and their reconstructions, batch after batch of one size."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._planes = 0

    def add(self, images: Tensor, rebuilt: Tensor) -> None:
        """Both (B, C, H, W) in [-1, 1]."""
        x, y = _transform(images), _transform(rebuilt)
        maps = [x.abs(), torch.minimum(x.abs(), y.abs()), x.abs() ** 2, y.abs() ** 2, (x - y).abs() ** 2]
        sums = torch.stack(maps).sum(dim=(1, 2))
        self._sums = sums if self._sums is None else self._sums + sums
        self._planes += images.shape[0] * images.shape[1]

    def result(self) -> Spectrum:
        """The figures; there must have been pictures."""
        assert self._sums is not None, "there were no pictures"
        amplitude, common, before, after, difference = (self._sums / self._planes).numpy()
        rows = np.stack([_ring_means(power, RINGS) for power in (before, after)])
        rows = rows[:, ~np.isnan(rows[0])]
        logs = np.log(rows + ROUNDING)
        third = np.minimum(radius(*amplitude.shape) / CORNER * len(THIRDS), len(THIRDS) - 1).astype(int)
        parts = {"all": np.full(third.shape, True)} | {name: third == i for i, name in enumerate(THIRDS)}
        found = {
            name: Kept(
                kept=_share(common[mask].sum(), amplitude[mask].sum(), nothing=1.0),
                error=_share(difference[mask].sum(), before[mask].sum(), nothing=0.0),
            )
            for name, mask in parts.items()
        }
        distance = float(np.sqrt(np.mean((logs[1] - logs[0]) ** 2)))
        return Spectrum(distance, **found, power=tuple((float(x), float(y)) for x, y in rows.T))


def log_spectra(maps: Sequence[Tensor], decades: float = 4.0) -> np.ndarray:
    """Power spectra of maps (B, D, h, w) as grey pictures (N, h, w) uint8, DC in the middle.

    White is the largest power of any map; black is `decades` powers of ten below it, and less.
    """
    power = np.stack([_transform(m).abs().square().mean(dim=(0, 1)).numpy() for m in maps])
    shifted = np.fft.fftshift(power, axes=(1, 2)) / max(float(power.max()), np.finfo(float).tiny)
    level = 1 + np.log10(np.maximum(shifted, 10.0**-decades)) / decades
    return (level * 255).round().astype(np.uint8)


def _transform(images: Tensor) -> Tensor:
    return torch.fft.fft2(images.detach().cpu().double(), norm="ortho")


def _ring_means(power: np.ndarray, rings: int) -> np.ndarray:
    ring = np.minimum(radius(*power.shape) / CORNER * rings, rings - 1).astype(int)
    counts = np.bincount(ring.ravel(), minlength=rings)
    sums = np.bincount(ring.ravel(), power.ravel(), minlength=rings)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _share(part: float, whole: float, nothing: float) -> float:
    """part / whole, or `nothing` where there is nothing to keep."""
    return float(part / whole) if whole > 0 else nothing

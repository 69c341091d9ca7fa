"""NFIG's tokenizer, FR-VAE (arXiv 2503.07076): a residual pyramid whose levels take bands of the features' spectrum.

Band i of the features, f_i = Re IFFT(M_i FFT(f)), is quantised at level i together with the error that earlier levels
left: T_i = R_{i-1} + f_i, u_i = up(VQ(down(T_i))), R_i = T_i - u_i. The sum telescopes to
T_i = (f_1 + ... + f_i) - f_hat_{i-1}, so the only difference to VAR's pyramid is what the levels up to i are to add up
to: the low-passed features, not all of them. Decoding is the same sum. A level whose band has no frequency codes
carried error alone.

Two rules say which frequencies a band holds. `nested_square`, the default, gives a level the frequencies that its grid
can show: |u| <= h_i // 2 and |v| <= w_i // 2. `radial` is the paper's as quoted by reproductions: rings whose widths
go by the levels' numbers of positions, up to the corner of the spectrum (the corner is unconfirmed); on 16 x 16 it
leaves four bands empty. `whole` gives everything to the first band, which makes it VAR's own procedure.

The paper's loss has ||f - f_hat||^2 at the end; as in VAR's released code it is taken after each level here, against
what that level was to reach, and averaged. The encoder starts from random weights, not from DINOv2.
Legend: B batch, D code channels, h w latent grid, K levels, u v whole waves along rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from varkit.errors import unknown_name
from varkit.plans.schedule import Schedule
from varkit.tokenizers.multiscale_vq import MultiScaleQuantizer, MultiScaleVQConfig


def waves(n: int) -> np.ndarray:
    """Signed whole waves (n,) int64 of a Fourier transform's entries, in its order: 0, 1, ..., -2, -1."""
    k = np.arange(n)
    return np.where(k <= (n - 1) // 2, k, k - n)


def nested_square(schedule: Schedule) -> np.ndarray:
    """The first level whose grid can show a frequency; the last takes what none can."""
    h, w = schedule.last
    u, v = np.abs(waves(h))[:, None], np.abs(waves(w))
    too_small = [(u > rows // 2) | (v > columns // 2) for rows, columns in schedule.sides[:-1]]
    return np.sum(too_small, axis=0, dtype=np.int64) + np.zeros((h, w), np.int64)


def radial(schedule: Schedule) -> np.ndarray:
    """Rings: sigma_i = sigma_{i-1} + h_i w_i / sum_j h_j w_j * sigma_max, band i has sigma_{i-1} <= R < sigma_i.

    R is in cycles a position, so that a ring is one in the picture also where h and w differ, and sigma_max the corner.
    """
    h, w = schedule.last
    radius = np.hypot((waves(h) / h)[:, None], waves(w) / w)
    ends = np.array(schedule.offsets[1:-1]) / schedule.total * np.sqrt(0.5)
    return np.searchsorted(ends, radius, side="right")


def whole(schedule: Schedule) -> np.ndarray:
    """The first band has all frequencies."""
    return np.zeros(schedule.last, np.int64)


RULES: dict[str, Callable[[Schedule], np.ndarray]] = {
    "nested_square": nested_square,
    "radial": radial,
    "whole": whole,
}


@lru_cache(maxsize=64)
def band_of(rule: str, schedule: Schedule) -> np.ndarray:
    """The band, from 0 to K - 1, of each frequency of the finest grid, (h, w) int64 in the transform's order.

    (u, v) and (-u, -v) are in one band, also in the Nyquist rows and columns of even sizes, so bands of real features
    are real. Raises `UserError` for an unknown rule.
    """
    if rule not in RULES:
        raise unknown_name("band rule", rule, RULES)
    return RULES[rule](schedule)


@dataclass(frozen=True)
class LowPass:
    """What levels up to a given one are to add up to: the features without the bands of later levels."""

    rule: str

    def __call__(self, f: Tensor, level: int, schedule: Schedule) -> Tensor:
        """f (B, D, h, w) -> the same shape; f itself where no frequency is left for later."""
        band = band_of(self.rule, schedule)
        if band.max() <= level:
            return f
        # Half of a real signal's spectrum says the other half, and so do the masks.
        kept = torch.from_numpy(band[:, : f.shape[3] // 2 + 1] <= level).to(f.device)
        return torch.fft.irfft2(torch.fft.rfft2(f) * kept, s=f.shape[2:])


@dataclass(frozen=True)
class FrequencyVQConfig(MultiScaleVQConfig):
    """The defaults have the paper's grids and number of codes (the latter unconfirmed) around VAR's convolutions.

    bands: a rule of `RULES`. phi: VAR's convolutions after upsampling, which the paper does not mention; without them
    `phi_sharing` and `phi_ratio` say nothing.
    """

    bands: str = "nested_square"
    phi: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        band_of(self.bands, Schedule.parse(self.schedule))

    @property
    def phis(self) -> int:
        """Convolutions after upsampling."""
        return super().phis if self.phi else 0

    def quantizer(self) -> MultiScaleQuantizer:
        """VAR's quantizer, with bands to reach in place of the whole."""
        quantizer = super().quantizer()
        quantizer.goal = LowPass(self.bands)
        return quantizer

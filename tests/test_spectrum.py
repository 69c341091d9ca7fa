"""Spectral figures against closed forms: waves, white noise, scaled and blurred pictures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varkit.evaluate.spectrum import RINGS, ROUNDING, Spectra, Spectrum, log_spectra, radial_power, radius


def noise(batch: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def wave(v: int, height: int = 32, width: int = 32, amplitude: float = 1.0) -> Tensor:
    """A cosine of v waves along each row, (1, 1, H, W)."""
    x = torch.arange(width, dtype=torch.float64)
    return (amplitude * torch.cos(2 * math.pi * v * x / width)).expand(1, 1, height, width)


def compared(images: Tensor, rebuilt: Tensor) -> Spectrum:
    spectra = Spectra()
    spectra.add(images, rebuilt)
    return spectra.result()


def test_radius_is_that_of_the_published_grid() -> None:
    assert radius(4, 4).max() == pytest.approx(math.sqrt(0.5))
    assert radius(4, 8)[1, 2] == pytest.approx(math.hypot(1 / 4, 2 / 8))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_white_noise_has_its_variance_everywhere(height: int, width: int) -> None:
    power = radial_power(0.3 * noise(200, height, width))
    np.testing.assert_allclose(power, 0.09, rtol=0.05)


def test_a_wave_has_its_energy_in_its_ring() -> None:
    power = radial_power(wave(9), rings=RINGS)
    ring = int(9 / 32 / math.sqrt(0.5) * RINGS)
    counts = np.bincount(np.minimum(radius(32, 32) / math.sqrt(0.5) * RINGS, RINGS - 1).astype(int).ravel())
    assert np.flatnonzero(power > 1e-12).tolist() == [ring]
    assert power[ring] * counts[ring] == pytest.approx(32 * 32 * 0.5)  # Parseval: the sum of squares


def test_power_falls_by_the_square_of_the_amplitudes_slope() -> None:
    f = np.maximum(radius(64, 64), 1 / 64)
    pink = torch.fft.ifft2(torch.fft.fft2(noise(100, 64, 64).double()) / torch.from_numpy(f)).real
    power = radial_power(pink, rings=32)[2:]
    middle = (np.arange(2, 32) + 0.5) / 32
    assert np.polyfit(np.log(middle), np.log(power), 1)[0] == pytest.approx(-2, abs=0.05)


def test_a_perfect_copy_keeps_everything() -> None:
    found = compared(noise(), noise())
    assert found.psd_distance == 0
    for kept in (found.all, found.low, found.mid, found.high):
        assert (kept.kept, kept.error) == (1, 0)


@given(st.floats(0.05, 1.0))
def test_a_paler_copy_keeps_its_share(share: float) -> None:
    found = compared(noise(), share * noise())
    for kept in (found.all, found.low, found.mid, found.high):
        assert kept.kept == pytest.approx(share, rel=1e-5)
        assert kept.error == pytest.approx((1 - share) ** 2, rel=1e-4, abs=1e-9)
    assert found.psd_distance == pytest.approx(-2 * math.log(share), abs=1e-2)


def test_a_low_pass_loses_the_high_third_alone() -> None:
    images = noise().double()
    low = torch.from_numpy(radius(32, 32) < math.sqrt(0.5) * 2 / 3)
    blurred = torch.fft.ifft2(torch.fft.fft2(images) * low).real
    found = compared(images, blurred)
    assert (found.low.kept, found.mid.kept) == (pytest.approx(1), pytest.approx(1))
    assert found.high.kept == pytest.approx(0, abs=1e-9) and found.high.error == pytest.approx(1)
    assert 0 < found.all.error < 1
    gone = [y for x, y in found.power if y < 1e-12]
    assert len(gone) == RINGS - 11  # rings from 2/3 of 16 on, less the one that the border cuts


def test_amplitude_is_kept_wherever_its_phase() -> None:
    found = compared(noise(), noise().roll((3, 5), (2, 3)))
    assert found.all.kept == pytest.approx(1) and found.all.error > 1 and found.psd_distance < 1e-6


def test_distance_is_the_rms_of_logarithms() -> None:
    """One ring of a wave is scaled; all others stay at the floor of rounding."""
    found = compared(wave(9), wave(9, amplitude=0.5))
    ring = max(x for x, _ in found.power)
    difference = math.log((ring / 4 + ROUNDING) / (ring + ROUNDING))
    assert found.psd_distance == pytest.approx(abs(difference) / math.sqrt(RINGS))


def test_black_pictures_lose_nothing() -> None:
    found = compared(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    assert found.psd_distance == 0 and (found.high.kept, found.high.error) == (1, 0)


def test_batches_add_up_and_small_pictures_have_fewer_rings() -> None:
    a, b = noise(4, 6, 6), noise(4, 6, 6, seed=1)
    spectra = Spectra()
    for images, rebuilt in zip(a.split(1), b.split(1), strict=True):
        spectra.add(images, rebuilt)
    one, whole = spectra.result(), compared(a, b)
    assert one.psd_distance == pytest.approx(whole.psd_distance)
    assert one.all.kept == pytest.approx(whole.all.kept) and 0 < len(one.power) < RINGS


def test_pictures_of_spectra_have_dc_in_the_middle() -> None:
    flat, fine = torch.ones(1, 1, 8, 8), wave(4, 8, 8)
    first, second = log_spectra([flat, fine])
    assert first[4, 4] == 255 and np.delete(first.ravel(), 36).max() == 0
    assert np.flatnonzero(second).tolist() == [4 * 8]  # the Nyquist column, left of all others

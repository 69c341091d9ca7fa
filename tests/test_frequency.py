"""NFIG's tokenizer: bands of the spectrum, the paper's recursion, and what is left of VAR where there are no bands."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from varkit.cli.main import main
from varkit.decode.loop import run
from varkit.edit.inpaint import start_inpaint
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Pipeline, Settings, load
from varkit.hub.published import save_published
from varkit.pictures import to_pil, to_tensor
from varkit.plans.schedule import Schedule
from varkit.tokenizers.codebook import Codebook
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.frequency import RULES, FrequencyVQConfig, LowPass, band_of
from varkit.tokenizers.multiscale_vq import MultiScaleQuantizer, MultiScaleVQ, MultiScaleVQConfig

PUBLISHED = Schedule.parse(FrequencyVQConfig().schedule)
WIDE = Schedule.of(1, (2, 3), (3, 5), (4, 6))
CONV = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8, attention=False)
TINY = FrequencyVQConfig(CONV, vocab_size=32, code_channels=6, schedule=(1, 2, 4, 6))

sides = st.tuples(st.integers(1, 9), st.integers(1, 9))
schedules = st.lists(sides, min_size=1, max_size=5).map(
    lambda grids: Schedule(tuple((int(h), int(w)) for h, w in np.maximum.accumulate(np.array(grids), axis=0)))
)
rules = st.sampled_from(sorted(RULES))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int, channels: int, grid: tuple[int, int], slope: float = 1.0, seed: int = 0) -> Tensor:
    """Features (B, D, h, w) whose amplitude falls as 1 / frequency^slope."""
    h, w = grid
    radius = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.fftfreq(w)).clamp(min=1 / max(grid))
    white = torch.fft.fft2(torch.randn(batch, channels, h, w, generator=seeded(seed)))
    return torch.fft.ifft2(white / radius**slope).real


def bands(f: Tensor, rule: str, schedule: Schedule) -> list[Tensor]:
    """The paper's: f_i = IFFT(M_i FFT(f)), complex, over the whole spectrum."""
    spectrum, band = torch.fft.fft2(f.double()), torch.from_numpy(band_of(rule, schedule))
    return [torch.fft.ifft2(spectrum * (band == i)) for i in range(len(schedule))]


def quantizer(rule: str = "nested_square", vocab_size: int = 32, channels: int = 6) -> MultiScaleQuantizer:
    """Without phi; its codes are random."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, vocab_size=vocab_size, code_channels=channels, bands=rule)
    made = config.quantizer()
    torch.nn.init.normal_(made.embedding.weight)
    return made


class Exact(MultiScaleQuantizer):
    """Chooses vectors themselves, so nothing is lost but by resizing."""

    def lookup(self, chosen: Tensor) -> Tensor:
        return chosen

    def choose(self, residual: Tensor, level: int, schedule: Schedule) -> Tensor:
        return residual


# Check 1: masks


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        ("nested_square", [1, 8, 0, 16, 0, 24, 32, 40, 48, 87]),
        ("radial", [1, 0, 0, 0, 0, 8, 12, 40, 88, 107]),
        ("whole", [256, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_frequencies_of_each_band_on_the_published_grid(rule: str, counts: list[int]) -> None:
    assert np.bincount(band_of(rule, PUBLISHED).ravel(), minlength=10).tolist() == counts


def test_radial_bands_follow_the_papers_formula() -> None:
    """By hand, for a square: sigma_i adds the level's share of 8 sqrt(2), R counts whole waves."""
    sigma, expected = 0.0, np.full((16, 16), len(PUBLISHED) - 1)
    u = np.fft.fftshift(np.fft.fftfreq(16)) * 16
    radius = np.sqrt(u[:, None] ** 2 + u[None, :] ** 2)
    for i, n in enumerate(PUBLISHED.lengths[:-1]):
        before, sigma = sigma, sigma + n / 680 * 8 * math.sqrt(2)
        expected[(before <= radius) & (radius < sigma)] = i
    assert np.array_equal(np.fft.fftshift(band_of("radial", PUBLISHED)), expected)


def test_nested_squares_on_a_wide_grid() -> None:
    expected = np.array(
        [
            [0, 1, 2, 3, 2, 1],  # columns -2 ... 2 of a grid of 5, the Nyquist column 3 only on the last
            [1, 1, 2, 3, 2, 1],
            [3, 3, 3, 3, 3, 3],  # the Nyquist row
            [1, 1, 2, 3, 2, 1],
        ]
    )
    assert np.array_equal(band_of("nested_square", WIDE), expected)


@given(schedules, rules)
def test_masks_are_disjoint_and_cover_the_plane_and_bands_are_real(schedule: Schedule, rule: str) -> None:
    band = band_of(rule, schedule)
    assert band.shape == schedule.last and band.min() == 0 == band[0, 0] and band.max() < len(schedule)
    mirrored = np.roll(
        band[::-1, ::-1], (1, 1), axis=(0, 1)
    )  # (u, v) -> (-u, -v), Nyquist rows onto themselves
    assert np.array_equal(band, mirrored)
    f = torch.randn(2, 3, *schedule.last, generator=seeded())
    parts = bands(f, rule, schedule)
    assert max(part.imag.abs().max() for part in parts) < 1e-12
    torch.testing.assert_close(torch.stack([p.real for p in parts]).sum(0).float(), f, atol=1e-5, rtol=0)


@given(schedules, rules)
def test_the_goal_is_the_sum_of_bands(schedule: Schedule, rule: str) -> None:
    f = torch.randn(2, 3, *schedule.last, generator=seeded())
    reached = torch.zeros(f.shape, dtype=torch.float64)
    for level, part in enumerate(bands(f, rule, schedule)):
        reached = reached + part.real
        goal = LowPass(rule)(f, level, schedule)
        assert goal.dtype == f.dtype
        torch.testing.assert_close(goal.double(), reached, atol=1e-5, rtol=0)
    assert torch.equal(goal, f)


def test_the_goal_passes_gradients_on() -> None:
    f = torch.randn(1, 2, 4, 6, dtype=torch.float64, generator=seeded(), requires_grad=True)
    for level in range(4):
        assert torch.autograd.gradcheck(lambda f, k=level: LowPass("nested_square")(f, k, WIDE), f)


# Check 2: the recursion


@pytest.mark.parametrize("schedule", [PUBLISHED, WIDE], ids=["published", "wide"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_choices_and_what_is_left_are_those_of_the_papers_recursion(rule: str, schedule: Schedule) -> None:
    made = quantizer(rule)
    f = noise(3, 6, schedule.last)
    ids = made.encode(f, schedule)
    rest, total = torch.zeros_like(f), torch.zeros_like(f)  # R_0, f~
    for level, (side, part) in enumerate(zip(schedule.sides, bands(f, rule, schedule), strict=True)):
        target = rest + part.real.float()
        v = F.interpolate(target, side, mode="area").flatten(2).mT
        distances = torch.cdist(v.double(), made.codebook.double())
        chosen = ids[:, schedule.offsets[level] : schedule.offsets[level + 1]]
        own = distances.gather(2, chosen[..., None])[..., 0]
        assert (own <= distances.amin(2) + 1e-4).all()  # ties but for rounding
        codes = made.codebook[chosen].mT.reshape(3, 6, *side)
        u = F.interpolate(codes, schedule.last, mode="bicubic") if side != schedule.last else codes
        rest, total = target - u, total + u
    torch.testing.assert_close(made.features(ids, schedule), total, atol=1e-5, rtol=0)
    torch.testing.assert_close(f - total, rest, atol=1e-4, rtol=0)


def test_what_is_left_is_the_last_rest_in_float64() -> None:
    """f - f~ = R_K to 1e-5, whatever is chosen."""
    made, f = quantizer().double(), noise(2, 6, (16, 16)).double()
    ids = torch.randint(0, 32, (2, PUBLISHED.total), generator=seeded())
    f_hat, rest = made.zeros(2, PUBLISHED), torch.zeros_like(f)
    for level, part in enumerate(bands(f, "nested_square", PUBLISHED)):
        codes = made.lookup(ids[:, PUBLISHED.offsets[level] : PUBLISHED.offsets[level + 1]])
        after = made.accumulate(f_hat, level, codes, PUBLISHED)
        rest, f_hat = rest + part.real - (after - f_hat), after
    assert (f - f_hat - rest).abs().max() < 1e-5


@pytest.mark.parametrize("rule", sorted(RULES))
def test_with_nothing_to_quantise_and_full_grids_nothing_is_lost(rule: str) -> None:
    schedule = Schedule.of((6, 5), (6, 5), (6, 5))
    exact = Exact(Codebook(2, 3), phis=0)
    exact.goal = LowPass(rule)
    f = torch.randn(2, 3, 6, 5, generator=seeded())
    torch.testing.assert_close(exact.features(exact.encode(f, schedule), schedule), f, atol=1e-5, rtol=0)


# Check 3: levels and frequencies


def radii(parts: Tensor) -> np.ndarray:
    """Mean spectral radius of the energy of each part, (K, B, D, h, w) -> (K,); NaN where there is none."""
    energy = torch.fft.fft2(parts.detach().double()).abs().square().sum(dim=(1, 2)).numpy()
    h, w = energy.shape[1:]
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))
    with np.errstate(invalid="ignore"):
        return (energy * radius).sum((1, 2)) / energy.sum((1, 2))


def spearman(values: np.ndarray) -> float:
    """Rank correlation with 0, 1, 2, ..."""
    return float(np.corrcoef(np.arange(len(values)), values.argsort().argsort())[0, 1])


@pytest.mark.parametrize(("rule", "first"), [("nested_square", 0), ("radial", 5)])
def test_levels_hold_rising_frequencies(rule: str, first: int) -> None:
    made, f = quantizer(rule, 256, 8), noise(24, 8, (16, 16))
    f = f / f.std()
    made.initialize_codebook(f, PUBLISHED, seeded())
    ids = made.encode(f, PUBLISHED)
    sums = torch.stack([made.features(ids, PUBLISHED, level) for level in range(11)])
    assert spearman(radii(sums.diff(dim=0))[first:]) > 0.9


# Check 4: VAR without bands


def test_with_everything_in_the_first_band_it_is_vars_quantizer() -> None:
    var = MultiScaleVQConfig(CONV, vocab_size=32, code_channels=6, schedule=(1, 2, 3, 4))
    mine = FrequencyVQConfig(**dataclasses.asdict(var) | {"conv": CONV}, bands="whole", phi=True)
    torch.manual_seed(0)
    base, twin = var.build().eval(), mine.build().eval()
    twin.load_state_dict(base.state_dict())
    images = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1
    base.initialize_codebook(images, seeded(1))
    twin.initialize_codebook(images, seeded(1))
    assert torch.equal(base.encode(images)["ids"], twin.encode(images)["ids"])
    both = [tokenizer.training_forward(images) for tokenizer in (base, twin)]
    for name, value in both[0].items():
        assert torch.equal(value, both[1][name]), name
    other = dataclasses.replace(mine, bands="radial").build()
    other.load_state_dict(base.state_dict())
    assert not torch.equal(base.encode(images)["ids"], other.encode(images)["ids"])


# Training


def test_training_pass_compares_each_level_with_its_goal() -> None:
    made, schedule = quantizer(), Schedule.of(1, 2, 3, 4)
    f = noise(3, 6, (4, 4)).requires_grad_()
    out = made(f, schedule)
    f_hats = [made.features(out.chosen, schedule, level) for level in range(1, 5)]
    goals = [made.goal(f, level, schedule) for level in range(4)]
    terms = [1.25 * F.mse_loss(f_hat, goal) for f_hat, goal in zip(f_hats, goals, strict=True)]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    assert torch.equal(out.chosen, made.encode(f, schedule))
    assert torch.equal(made.embedding.nearest(out.residuals), out.chosen)
    (commit,) = torch.autograd.grad(out.loss, f)
    pulls = [
        torch.autograd.grad(0.25 * F.mse_loss(f_hat.detach(), made.goal(f, level, schedule)), f)[0]
        for level, f_hat in enumerate(f_hats)
    ]
    torch.testing.assert_close(commit, torch.stack(pulls).mean(0))


# The whole of it


@functools.cache
def tokenizer(config: FrequencyVQConfig = TINY) -> MultiScaleVQ:
    torch.manual_seed(0)
    made = config.build().eval()
    made.initialize_codebook(torch.rand(16, 3, *made.image_size(), generator=seeded()) * 2 - 1, seeded(1))
    return made


@functools.cache
def model() -> Pipeline:
    torch.manual_seed(0)
    configs = {"tokenizer": TINY, **VARConfig(2, 24, 2, (1,), 1, ClassConfig(3)).fitted(TINY)}
    parts = {name: config.build() for name, config in configs.items()} | {"tokenizer": tokenizer()}
    return Pipeline(parts, configs, Settings(guidance=4.5, top_k=20))


def test_var_is_fitted_to_it_unchanged() -> None:
    fitted = VARConfig.published(16, (1,)).fitted(FrequencyVQConfig())
    assert fitted["generator"] == VARConfig.published(16, FrequencyVQConfig().schedule)
    assert fitted["head"].vocab_size == 4096 and fitted["plan"].build().schedule == PUBLISHED


def test_a_prefix_of_bands_is_a_picture() -> None:
    made = tokenizer()
    images = torch.rand(2, 3, *made.image_size(), generator=seeded()) * 2 - 1
    latents = made.encode(images)
    prefix = {"ids": latents["ids"][:, : made.schedule.offsets[2]]}
    assert torch.equal(made.decode(prefix, levels=2), made.decode(latents, levels=2))
    assert not torch.equal(made.decode(latents, levels=2), made.decode(latents))
    wide = made.encode(torch.rand(1, 3, 8, 12, generator=seeded()), WIDE)
    assert made.decode(wide, WIDE).shape == (1, 3, 8, 12)


@pytest.mark.parametrize("ramp", [False, True])
def test_both_forms_of_guidance_draw_and_show_every_band(ramp: bool) -> None:
    pictures = list(model().stream([0, 1], seed=1, ramp=ramp))
    assert len(pictures) == 4
    again = model().generate([0, 1], seed=1, ramp=ramp)
    assert [np.asarray(p).tolist() for p in again] == [np.asarray(p).tolist() for p in pictures[-1]]


def test_the_command_line_has_both_forms_of_guidance(tmp_path) -> None:
    model().save(tmp_path / "model")
    for form, ramp in (("on", True), ("off", False)):
        out = tmp_path / f"{form}.png"
        words = ["--model", str(tmp_path / "model"), "--label", "1", "--ramp", form, "--out", str(out)]
        assert main(["generate", *words]) == 0
        (expected,) = model().generate([1], seed=0, ramp=ramp)
        assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))


def test_it_edits_what_is_masked() -> None:
    made = tokenizer()
    image = to_pil(torch.rand(1, 3, 12, 12, generator=seeded()) * 2 - 1)[0]
    redraw = np.zeros((12, 12), bool)
    redraw[6:] = True
    state = run(model().model, start_inpaint(model(), image, redraw, 1, n=2))
    true, keep = state.extras["true"], state.extras["keep"]
    drawn = state.canvas.latents()["ids"]
    assert torch.equal(drawn[keep], true[keep]) and 0 < keep.float().mean() < 1
    assert torch.equal(true[:1], made.encode(to_tensor(np.asarray(image)[None]))["ids"])


def test_saved_and_loaded_it_encodes_by_the_same_bands(tmp_path) -> None:
    model().save(tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    assert loaded.configs["tokenizer"] == TINY
    images = torch.rand(3, 3, 12, 12, generator=seeded()) * 2 - 1
    ids = tokenizer().encode(images)["ids"]
    assert torch.equal(loaded.tokenizer.encode(images)["ids"], ids)
    loaded.tokenizer.quantizer.goal = LowPass("whole")
    assert not torch.equal(loaded.tokenizer.encode(images)["ids"], ids)


def test_there_is_no_published_layout_for_bands(tmp_path) -> None:
    with pytest.raises(UserError, match="FrequencyVQConfig"):
        save_published(model(), tmp_path / "out")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FrequencyVQConfig(bands="nested_squares"), "nested_square"),
        (lambda: FrequencyVQConfig(schedule=(4, 2)), "coarse to fine"),
        (lambda: FrequencyVQConfig(phi_ratio=2.0), "phi_ratio"),
    ],
)
def test_wrong_input_is_one_clear_line(call, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)

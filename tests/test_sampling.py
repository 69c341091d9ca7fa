"""Samplers and guidance: filters against slow definitions, distributions within five sigma, published conventions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varkit.decode.guidance import Guidance
from varkit.decode.sampling import Sampler, SmoothSampler, keep_top_k, keep_top_p, pick
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.heads.base import Ask
from varkit.plans.base import CONFIDENCE
from varkit.plans.step import Slots, Step

rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)


@given(rows, st.integers(1, 14))
def test_top_k_keeps_the_k_largest_and_ties(row: list[float], k: int):
    logits = torch.tensor(row)
    kept = keep_top_k(logits, min(k, len(row))) > -torch.inf
    threshold = sorted(row, reverse=True)[min(k, len(row)) - 1]
    assert kept.tolist() == [x >= threshold for x in torch.tensor(row).tolist()] or bool(
        (logits[kept] >= threshold).all()
    )
    assert int(kept.sum()) >= min(k, len(row))


@given(rows, st.floats(0.05, 0.95))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float):
    logits = torch.tensor(row, dtype=torch.float64)
    kept = keep_top_p(logits, p) > -torch.inf
    probability = logits.softmax(-1)
    assert float(probability[kept].sum()) >= p - 1e-9
    smallest = probability[kept].min()
    assert bool((probability[~kept] <= smallest + 1e-12).all())
    if int(kept.sum()) > 1:
        assert float(probability[kept].sum() - smallest) < p + 1e-9


@given(rows, st.floats(0.001, 0.999))
def test_pick_inverts_the_distribution_function(row: list[float], u: float):
    logits = torch.tensor(row, dtype=torch.float64)
    masked = logits.masked_fill(torch.arange(len(row)) % 3 == 1, -torch.inf)
    chosen = int(pick(masked.softmax(-1), torch.tensor(u, dtype=torch.float64)))
    mass = masked.softmax(-1).cumsum(-1)
    assert masked[chosen] > -torch.inf
    assert float(mass[chosen]) >= u * float(mass[-1]) - 1e-9
    assert chosen == 0 or float(mass[chosen - 1]) <= u + 1e-9


def test_pick_never_takes_a_dropped_code_at_the_ends():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf])
    ends = torch.tensor([2.0**-25, 1 - 2.0**-24])
    assert pick(logits.softmax(-1).expand(2, -1), ends).tolist() == [1, 3]


def ask(batch: int, targets: int, progress: float = 0.0, at: int = 0) -> Ask:
    ids = torch.arange(targets)
    step = Step.of(Slots.of(ids, ids, torch.zeros(targets, 2)), target=ids)
    return Ask(
        step, Draws.start(0, batch), torch.full((batch, 1), at), torch.full((batch, 1), progress), Guidance()
    )


def test_sampling_follows_the_filtered_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    n = 40_000
    sampler = Sampler(temperature=0.8, top_k=4)
    ids = sampler(logits.expand(1, n, 5), ask(1, n))["ids"][0]
    expected = sampler.filtered(logits).softmax(-1)
    counts = torch.bincount(ids, minlength=5)
    assert counts[3] == 0
    sigma = (n * expected * (1 - expected)).sqrt()
    assert bool(((counts - n * expected).abs() <= 5 * sigma + 1e-9).all())


def test_temperature_zero_is_arg_max():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler(temperature=0)(logits, ask(2, 5))["ids"], logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.7, (1.0, 0.0)])
def test_confidence_is_the_filtered_probability_of_what_is_drawn_anyway(temperature):
    logits = 3 * torch.randn(2, 50, 9, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(temperature, top_k=6, top_p=0.9)
    plain = ask(2, 50, progress=1.0)
    values = sampler(logits, replace(plain, confidence=True))
    assert torch.equal(values["ids"], sampler(logits, plain)["ids"])
    p = sampler.filtered(logits, plain.progress).softmax(-1)
    assert torch.equal(values[CONFIDENCE], p.gather(-1, values["ids"][..., None])[..., 0])
    assert bool((values[CONFIDENCE] > 0).all()) and len(values[CONFIDENCE].unique()) > 20


def test_smooth_sampling_draws_the_same_ids_and_sharpens():
    codebook = torch.eye(6)
    logits = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    plain, smooth = Sampler(top_k=4), SmoothSampler(Sampler(top_k=4), codebook)
    early, late = (smooth(logits, ask(2, 50, p)) for p in (0.0, 1.0))
    assert torch.equal(early["ids"], plain(logits, ask(2, 50))["ids"])
    assert torch.allclose(early["codes"].sum(-1), torch.ones(2, 50), atol=1e-5)
    assert float(late["codes"].amax(-1).mean()) > float(early["codes"].amax(-1).mean())
    dropped = plain.filtered(logits) == -torch.inf
    assert bool((late["codes"][dropped] == 0).all())


def test_guidance_is_u_plus_s_times_c_minus_u():
    c, u = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both, half = torch.stack([c, u]), torch.full((3, 1), 0.5)
    assert torch.allclose(Guidance(3.0)(both, half), u + 3.0 * (c - u))
    assert torch.equal(Guidance(0.0)(both, half), u)
    cfg, k, last = 1.5, 3, 9  # VAR: (1 + t) c - t u with t = cfg k / (K - 1)
    t = cfg * k / last
    ramped = Guidance(1 + cfg, ramp=True)(both, torch.full((3, 1), k / last, dtype=torch.float64))
    assert torch.allclose(ramped, (1 + t) * c - t * u)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Sampler(temperature=-1),
        lambda: Sampler(top_k=-1),
        lambda: Sampler(top_p=1.5),
        lambda: Guidance(-2),
    ],
)
def test_bad_settings_are_refused_in_one_line(bad):
    with pytest.raises(UserError) as error:
        bad()
    assert "\n" not in str(error.value) and "use" in str(error.value)

"""Entropy-constrained choice of codes, and the patch-wise encoder beside it."""

import dataclasses

import pytest
import torch

from tests.test_tokenizers import PYRAMID, features, make, seeded, waves
from varkit.errors import UserError
from varkit.plans.schedule import Schedule
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.rate import FLOOR, CodeRates

RATED = dataclasses.replace(PYRAMID, rate=1.0)
PATCHED = dataclasses.replace(PYRAMID, encoder=PatchEncoderConfig(width=16, depth=2))
SCHEDULE = Schedule.parse(PYRAMID.schedule)


def rates(slope: float = 1.0) -> CodeRates:
    made = CodeRates(levels=2, vocab_size=4, slope=slope)
    made.frequency[1] = torch.tensor([0.7, 0.2, 0.1, 0.0])
    made.distortion[1] = 3.0
    return made


def test_cost_is_its_formula() -> None:
    p = torch.tensor([0.7, 0.2, 0.1, 0.0]).double() * (1 - FLOOR) + FLOOR / 4
    expected = -p.log() * 0.5 * 2 / 6 * 3.0
    torch.testing.assert_close(rates(0.5).cost(1, 2, channels=6).double(), expected, rtol=1e-5, atol=1e-6)
    assert not rates(0.5).cost(0, 2, channels=6).any()  # no distortion is known yet


def test_update_follows_running_means() -> None:
    made = rates()
    ids, errors = torch.tensor([[0, 0, 3, 0]]), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    made.update(0, 2, ids, errors)
    assert made.distortion[0] == 3.0  # the first is taken as it is
    expected = 0.25 * 0.99 + 0.01 * torch.tensor([0.75, 0.0, 0.0, 0.25])
    torch.testing.assert_close(made.frequency[0], expected)
    made.update(0, 2, ids, 2 * errors)
    torch.testing.assert_close(made.distortion[0], torch.tensor(3.0 * 0.99 + 6.0 * 0.01))
    torch.testing.assert_close(made.frequency.sum(1), torch.ones(2))


@pytest.mark.parametrize(("level", "levels", "row"), [(0, 1, 0), (2, 3, 1), (0, 3, 0), (4, 5, 1)])
def test_another_schedule_takes_the_level_at_the_same_share(level: int, levels: int, row: int) -> None:
    made = rates()
    made.distortion[0] = 5.0
    assert torch.equal(made.cost(level, levels, 4), made.cost(row, 2, 4))


def test_choice_minimises_distance_plus_cost() -> None:
    quantizer = make(RATED).quantizer
    quantizer.rates.frequency.copy_(torch.rand(4, 64, generator=seeded()).softmax(1))
    quantizer.rates.distortion.fill_(2.0)
    residual = torch.randn(2, 9, 8, generator=seeded(1))
    distances = (residual[..., None, :] - quantizer.codebook).square().sum(-1)
    expected = (distances + quantizer.rates.cost(2, 4, 8)).argmin(-1)
    assert torch.equal(quantizer.choose(residual, 2, SCHEDULE), expected)
    assert not torch.equal(expected, quantizer.embedding.nearest(residual))


def test_without_statistics_a_rated_quantizer_is_the_plain_one() -> None:
    f = features(SCHEDULE)
    assert torch.equal(make(RATED).quantizer.encode(f, SCHEDULE), make(PYRAMID).quantizer.encode(f, SCHEDULE))


def test_trained_frequencies_buy_bits_with_distortion() -> None:
    quantizer = make(RATED).quantizer
    centres = torch.randn(6, 8, generator=seeded(2))

    def clustered(seed: int) -> torch.Tensor:
        which = torch.randint(6, (16, 16), generator=seeded(seed))
        noise = 0.1 * torch.randn(16, 16, 8, generator=seeded(seed + 1000))
        return (centres[which] + noise).mT.reshape(16, 8, 4, 4)

    with torch.no_grad():
        quantizer.initialize_codebook(clustered(0), SCHEDULE, seeded())
        for seed in range(100):
            quantizer(clustered(seed), SCHEDULE)
    residual = clustered(999).flatten(2).mT
    cost = quantizer.rates.cost(3, 4, 8)
    rated, plain = quantizer.choose(residual, 3, SCHEDULE), quantizer.embedding.nearest(residual)

    def distortion(ids: torch.Tensor) -> float:
        return (residual - quantizer.lookup(ids)).square().sum().item()

    def price(ids: torch.Tensor) -> float:
        return cost[ids].sum().item()

    assert price(rated) < price(plain) and distortion(rated) > distortion(plain)
    assert price(rated) + distortion(rated) < price(plain) + distortion(plain)


def test_statistics_are_saved_and_loaded() -> None:
    trained = make(RATED)
    trained.training_forward(waves(4))
    state = trained.state_dict()
    assert state["quantizer.rates.distortion"].min() > 0
    fresh = RATED.build()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.encode(waves(4))["ids"], trained.encode(waves(4))["ids"])
    assert not any("rates" in key for key in PYRAMID.build().state_dict())


def test_a_patch_knows_nothing_of_the_others() -> None:
    tokenizer = make(PATCHED)
    images = waves(2)
    changed = images.clone()
    changed[:, :, :4, 4:8] = 0.3  # one 4 x 4 patch
    before, after = tokenizer.encode_features(images), tokenizer.encode_features(changed)
    same = (before == after).all(dim=1)
    assert not same[:, 0, 1].any()
    same[:, 0, 1] = True
    assert same.all()


def test_equal_patches_get_equal_features() -> None:
    plain = torch.full((1, 3, 16, 16), 0.25)
    f = make(PATCHED).encode_features(plain).flatten(2)
    assert torch.equal(f, f[..., :1].expand_as(f))


def test_bad_values_are_one_clear_line() -> None:
    for call, words in (
        (lambda: dataclasses.replace(PYRAMID, rate=-1.0), "rate -1.0"),
        (lambda: PatchEncoderConfig(width=0), "width 0"),
    ):
        with pytest.raises(UserError, match=words):
            call()

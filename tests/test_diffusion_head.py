"""The diffusion head: exact distributions from an exact network, guidance and noise from outside, and its loss."""

import math

import pytest
import torch
from torch import Tensor, nn

from varkit.decode.guidance import Guidance
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.heads import diffusion
from varkit.heads.base import Ask
from varkit.heads.diffusion import DiffusionConfig, DiffusionHead
from varkit.heads.gaussian_diffusion import TIMES, GaussianDiffusion, Reverse, cosine_alpha_bars, spread
from varkit.plans.step import Slots, Step

WIDTH, CHANNELS = 12, 3


def head(steps: int = 8, seed: int = 0, **options) -> DiffusionHead:
    """A head whose zero-initialised weights are random too."""
    torch.manual_seed(seed)
    base = {"mlp_width": 16, "depth": 2, "sampling_steps": steps, "repeats": 3}
    made = DiffusionConfig(WIDTH, CHANNELS, **(base | options)).build().eval()
    for name, p in made.named_parameters():
        if "modulation" in name or ".out." in name:
            nn.init.normal_(p, std=0.2)
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def only(branches: Tensor) -> Tensor:
    return branches[0]


# The process


def test_all_times_kept_are_the_whole_process_and_betas_follow_from_the_kept_levels():
    assert spread(100)[:3] == [0, 10, 20] and spread(100)[-1] == 999 and len(set(spread(100))) == 100
    assert spread(4, 990) == [0, 330, 660, 990]
    assert spread(10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    every, whole = GaussianDiffusion(range(TIMES)), GaussianDiffusion()
    assert torch.equal(every._high, whole._high)
    some, bars = GaussianDiffusion([0, 250, 999]), cosine_alpha_bars()
    assert torch.allclose(1 - some._high.exp(), bars[[0, 250, 999]] / torch.tensor([1, bars[0], bars[250]]))


def test_a_step_back_is_the_posterior_of_the_predicted_start():
    process, i = GaussianDiffusion(spread(20)), 7
    x0, noise, v = normal(5, CHANNELS), normal(5, CHANNELS, seed=1), normal(5, CHANNELS, seed=2)
    x = process.noised(x0, torch.tensor(i), noise)
    step = process.reverse(x, i, noise, v)
    bars = cosine_alpha_bars()[spread(20)]
    a, before = bars[i].item(), bars[i - 1].item()
    beta = 1 - a / before
    mean = math.sqrt(before) * beta / (1 - a) * x0 + math.sqrt(a / before) * (1 - before) / (1 - a) * x
    assert torch.allclose(step.mean, mean, atol=1e-5)
    low = math.log(beta * (1 - before) / (1 - a))
    assert torch.allclose(step.log_variance, (1 + v) / 2 * math.log(beta) + (1 - v) / 2 * low, atol=1e-5)
    many = process.reverse(x, torch.full((5,), i), noise, v)
    assert torch.allclose(many.mean, step.mean, atol=1e-6)


def test_log_prob_is_that_of_the_normal():
    step, x = Reverse(normal(4, 3), normal(4, 3, seed=1)), normal(4, 3, seed=2)
    for temperature in (1.0, 0.7):
        std = temperature * torch.exp(0.5 * step.log_variance)
        expected = torch.distributions.Normal(step.mean, std).log_prob(x).sum(dim=-1)
        assert torch.allclose(step.log_prob(x, temperature), expected, atol=1e-5)
        assert torch.allclose(step.draw((x - step.mean) / std, temperature), x, atol=1e-5)


# Sampling


class Exact(nn.Module):
    """The best prediction for one number: two modes at h -+ 1 and h + 1, or one at h, of a small deviation."""

    def __init__(self, process: GaussianDiffusion, deviation: float, modes: tuple[float, ...]) -> None:
        super().__init__()
        self.bars = cosine_alpha_bars().float()
        self.deviation, self.modes, self.process = deviation, torch.tensor(modes), process

    def time(self, times: Tensor) -> Tensor:
        return times[..., None].float()

    def condition(self, h: Tensor) -> Tensor:
        return h

    def steering(self, time: Tensor, condition: Tensor) -> list[Tensor]:
        time, condition = torch.broadcast_tensors(time, condition)
        return [time, condition]

    def forward(self, x: Tensor, steering: list[Tensor]) -> Tensor:
        time, h = steering
        a = self.bars[time.long()]
        variance = a * self.deviation**2 + 1 - a
        gap = x[..., None] - a[..., None].sqrt() * (h[..., None] + self.modes)
        weights = (-gap.square() / (2 * variance[..., None])).softmax(dim=-1)
        eps = (1 - a).sqrt() / variance * (weights * gap).sum(dim=-1)
        return torch.cat([eps, self._variance(time, variance, a).expand(eps.shape)], dim=-1)

    def _variance(self, time: Tensor, variance: Tensor, a: Tensor) -> Tensor:
        """v that gives one mode's exact variance of the step."""
        i = int((self.process.times == int(time.flatten()[0])).nonzero())
        low, high = self.process._low[i], self.process._high[i]
        start = self.deviation**2 * (1 - a) / variance
        posterior = torch.tensor(0.0) if i == 0 else low.exp()
        true = (posterior + self.process._to_start[i] ** 2 * start).clamp(min=low.exp().item())
        return (2 * (true.log() - low) / (high - low) - 1).float()


def exact(deviation: float, *modes: float) -> DiffusionHead:
    made = DiffusionConfig(1, 1, mlp_width=4, depth=1, sampling_steps=100).build()
    made.net = Exact(made.reverse, deviation, modes)  # type: ignore[assignment]
    return made


def drawn(made: DiffusionHead, centre: float, count: int = 4000, temperature: float = 1.0) -> Tensor:
    noise = normal(100, 1, count, 1, seed=3)
    return made.sample_with(torch.full((1, 1, count, 1), centre), noise, only, temperature).flatten()


def test_a_known_normal_comes_out():
    for centre, deviation in ((0.5, 0.7), (-2.0, 1.3)):
        values = drawn(exact(deviation, 0.0), centre)
        assert abs(values.mean().item() - centre) < 0.03 * (abs(centre) + deviation)
        assert values.std().item() == pytest.approx(deviation, rel=0.04)


def test_both_modes_are_kept():
    values = drawn(exact(0.1, -1.0, 1.0), 0.3)
    low, high = values[values < 0.3], values[values > 0.3]
    assert abs(len(high) / len(values) - 0.5) < 5 * 0.5 / math.sqrt(len(values))
    for mode, centre in ((low, -0.7), (high, 1.3)):
        assert mode.mean().item() == pytest.approx(centre, abs=0.03) and mode.std().item() < 0.15


def test_temperature_shrinks_and_zero_leaves_the_start_alone_to_decide():
    made = exact(1.0, 0.0)
    cool = drawn(made, 0.0, temperature=0.5)
    assert cool.std().item() < 0.8 * drawn(made, 0.0).std().item()
    random, h = head(), normal(1, 2, 5, WIDTH)
    first, second = normal(8, 2, 5, CHANNELS, seed=1), normal(8, 2, 5, CHANNELS, seed=2)
    second[0] = first[0]
    assert torch.equal(random.sample_with(h, first, only, 0.0), random.sample_with(h, second, only, 0.0))
    assert not torch.equal(random.sample_with(h, first, only), random.sample_with(h, second, only))
    per_sample = random.sample_with(h, first, only, torch.tensor([0.0, 1.0])[:, None, None])
    assert torch.allclose(per_sample[0], random.sample_with(h, first, only, 0.0)[0], atol=1e-4)
    assert torch.allclose(per_sample[1], random.sample_with(h, first, only)[1], rtol=1e-4, atol=1e-4)


def test_guidance_of_1_is_the_unguided_path_with_the_same_noise():
    made, h, noise = head(), normal(2, 2, 5, WIDTH), normal(8, 2, 5, CHANNELS, seed=1)
    alone = made.sample_with(h[:1], noise, only)
    guided = made.sample_with(h, noise, lambda eps: Guidance(1.0)(eps, torch.zeros(2, 1)))
    assert (guided - alone).abs().max() < 1e-4 * alone.std()
    stronger = made.sample_with(h, noise, lambda eps: Guidance(2.0)(eps, torch.zeros(2, 1)))
    assert not torch.allclose(stronger, alone, rtol=1e-2)


def test_the_variance_is_the_conditional_branchs():
    made, h, x = head(), normal(2, 2, 5, WIDTH), normal(2, 5, CHANNELS, seed=1)
    guided = made.ancestral(h, x, 4, lambda eps: 3 * eps[0] - 2 * eps[1])
    alone = made.ancestral(h[:1], x, 4, only)
    assert torch.allclose(guided.log_variance, alone.log_variance, atol=1e-5)
    assert not torch.allclose(guided.mean, alone.mean, atol=1e-3)


def test_sampling_is_its_ancestral_steps_whatever_is_made_together(monkeypatch):
    made, h, noise = head(), normal(2, 3, 4, WIDTH), normal(8, 3, 4, CHANNELS, seed=1)

    def mean(eps: Tensor) -> Tensor:
        return eps.mean(dim=0)

    x = noise[0]
    for i in reversed(range(8)):
        step = made.ancestral(h, x, i, mean)
        x = step.draw(noise[8 - i], 0.9) if i else step.mean
    for rows in (1, 50, 10_000):
        monkeypatch.setattr(diffusion, "ROWS", rows)
        values = made.sample_with(h, noise, mean, 0.9)
        assert (values - x).abs().max() < 1e-4 * x.std()


def asked(batch: int, target: Tensor, at: int = 2) -> Ask:
    step = Step.of(Slots.of(target, target, torch.zeros(len(target), 2)), target=target)
    cursor = torch.full((batch, 1), at)
    return Ask(step, Draws.start(5, batch), cursor, torch.zeros(batch, 1), lambda eps, progress: eps[0])


def test_draws_belong_to_sample_and_position():
    made, h = head(), normal(1, 2, 4, WIDTH)
    whole = made.sample(h, asked(2, torch.tensor([7, 1, 4, 2])))["latents"]
    part = made.sample(h[:, :, 1:3], asked(2, torch.tensor([1, 4])))["latents"]
    assert (part - whole[:, 1:3]).abs().max() < 1e-4 * whole.std()
    again = made.sample(h, asked(2, torch.tensor([7, 1, 4, 2]), at=3))["latents"]
    assert not torch.allclose(again, whole)


def test_a_bfloat16_head_diffuses_in_float32():
    made, h = head().bfloat16(), normal(1, 2, 4, WIDTH).bfloat16()
    values = made.sample(h, asked(2, torch.arange(4)))["latents"]
    assert values.dtype == torch.float32 and bool(values.isfinite().all())
    assert made.loss(h[0], {"latents": normal(2, 4, CHANNELS)}).dtype == torch.float32


# The loss


def test_an_untrained_head_has_the_error_of_predicting_nothing():
    made = DiffusionConfig(WIDTH, CHANNELS, 16, 2).build()
    times, noise = torch.full((2, 4, 3), 500), normal(2, 4, 3, CHANNELS)
    error, bound = made.terms(normal(2, 4, WIDTH), normal(2, 4, CHANNELS, seed=1), times, noise)
    assert torch.allclose(error, noise.square().mean(dim=-1), atol=1e-6) and bool((bound > 0).all())


def test_times_and_noise_may_be_given_and_a_targets_loss_is_its_repeats_mean():
    made, h, x = head(), normal(2, 4, WIDTH), {"latents": normal(2, 4, CHANNELS, seed=1)}
    draws = {"times": torch.rand(2, 4, 5), "noise": normal(2, 4, 5, CHANNELS, seed=2)}
    each = [made.loss(h, x, {name: d[:, :, m : m + 1] for name, d in draws.items()}) for m in range(5)]
    assert torch.allclose(made.loss(h, x, draws), torch.stack(each).mean(dim=0), rtol=1e-5)
    torch.manual_seed(0)
    first = made.loss(h, x)
    torch.manual_seed(0)
    assert first.shape == (2, 4) and torch.equal(made.loss(h, x), first)
    assert not torch.equal(made.loss(h, x), first)


def test_the_bound_teaches_the_variances_alone():
    made, h, x = head(), normal(2, 4, WIDTH), normal(2, 4, CHANNELS, seed=1)
    times, noise = torch.full((2, 4, 1), 300), normal(2, 4, 1, CHANNELS, seed=2)
    error, bound = made.terms(h, x, times, noise)
    by_error, by_bound = (
        torch.autograd.grad(term.sum(), made.net.out.weight, retain_graph=True)[0] for term in (error, bound)
    )
    assert bool(by_error[:CHANNELS].any()) and not bool(by_error[CHANNELS:].any())
    assert bool(by_bound[CHANNELS:].any()) and not bool(by_bound[:CHANNELS].any())


@pytest.mark.slow
def test_a_trained_head_learns_conditional_modes():
    """A number at c -+ 1 for c in {-2, 2}: means, deviations and shares of both modes within 3 % of the spread."""
    torch.manual_seed(0)
    made = DiffusionConfig(1, 1, mlp_width=64, depth=2, noisiest=990).build()
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        h = torch.randint(0, 2, (1, 256, 1)) * 4.0 - 2
        x = h + torch.randint(0, 2, h.shape) * 2.0 - 1 + 0.2 * torch.randn(h.shape)
        optimizer.zero_grad()
        made.loss(h, {"latents": x}).mean().backward()
        optimizer.step()
        schedule.step()
    for centre in (-2.0, 2.0):
        with torch.no_grad():
            values = drawn(made, centre)
        true = math.sqrt(1 + 0.2**2)
        assert abs(values.mean().item() - centre) < 5 * true / math.sqrt(4000) + 0.03
        assert values.std().item() == pytest.approx(true, rel=0.03)
        high = values[values > centre]
        assert 0.45 < len(high) / len(values) < 0.55 and high.std().item() < 0.3


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"mlp_width": 0}, "mlp_width is 0"),
        ({"sampling_steps": 1}, "sampling_steps is 1.*2 to 1000"),
        ({"sampling_steps": 60, "noisiest": 49}, "sampling_steps is 60.*2 to 50"),
        ({"noisiest": 1000}, "noisiest is 1000.*1 to 999"),
    ],
)
def test_wrong_heads_are_one_clear_line(config, says):
    with pytest.raises(UserError, match=says):
        DiffusionConfig(WIDTH, CHANNELS, **config)

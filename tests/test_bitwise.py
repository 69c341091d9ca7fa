"""The bitwise tokenizer, its canvas and head: the sheet's checks 1 and 3, losses, and training."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from varkit.data.registry import open_dataset
from varkit.decode.guidance import Guidance
from varkit.decode.sampling import Sampler
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.heads.base import Ask
from varkit.heads.bits import BitsConfig
from varkit.hub.states import build_empty
from varkit.plans.scales import ScalePlan
from varkit.plans.schedule import Schedule
from varkit.tokenizers.bitwise import Bitwise, BitwiseConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.train.loop import load_run, train
from varkit.train.task import TrainConfig
from varkit.train.tokenizer_loss import TokenizerLossConfig
from varkit.train.tokenizer_task import ReconstructionTask

CONV = ConvConfig(8, (1, 2), res_blocks=1, latent_channels=8, attention=False)
CONFIG = BitwiseConfig(CONV, (1, 2, 4, 8))
PATCHED = replace(CONFIG, patch=2)
WIDE = Schedule.of(1, (2, 3), (4, 7))


def make(config: BitwiseConfig = CONFIG) -> Bitwise:
    torch.manual_seed(0)
    return config.build().eval()


def features(tokenizer: Bitwise, schedule: Schedule, batch: int = 2) -> torch.Tensor:
    shape = tokenizer.quantizer.zeros(batch, schedule).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Bits and codes


@pytest.mark.parametrize("config", [CONFIG, PATCHED], ids=["plain", "patches"])
def test_bits_to_codes_and_back(config: BitwiseConfig):
    quantizer = make(config).quantizer
    bits = torch.randint(0, 2, (3, 5, config.token_bits)).to(torch.uint8)
    codes = quantizer.lookup(bits)
    assert torch.equal(quantizer.choose(codes, 0, WIDE), bits)
    of_a_code = codes.unflatten(-1, (8, config.patch**2))
    assert torch.allclose(of_a_code.norm(dim=2), torch.ones(()))


@pytest.mark.parametrize("config", [CONFIG, PATCHED], ids=["plain", "patches"])
@pytest.mark.parametrize("schedule", [Schedule.of(1, 2, 4, 8), WIDE], ids=["square", "wide"])
def test_encoding_is_the_published_loop_and_decoding_sums_it_up(config: BitwiseConfig, schedule: Schedule):
    """Written as published: residuals shrink, with a depth dimension of one, trilinear."""
    quantizer = make(config).quantizer
    f, p = features(make(config), schedule), config.patch
    residual, total, found = f[:, :, None], torch.zeros_like(f)[:, :, None], []
    last = (1, schedule.last[0] * p, schedule.last[1] * p)
    for k, (h, w) in enumerate(schedule.sides):
        size = (1, h * p, w * p)
        z = residual if k + 1 == len(schedule) else F.interpolate(residual, size, mode="area")
        z = F.normalize(z, dim=1)
        q = torch.where(z > 0, 1.0, -1.0) / math.sqrt(8)
        found.append(F.pixel_unshuffle((z > 0).squeeze(2).long(), p).flatten(2).mT)
        up = F.interpolate(q, last, mode="trilinear")
        residual, total = residual - up, total + up
    bits = quantizer.encode(f, schedule)
    assert bits.dtype == torch.uint8 and torch.equal(bits.long(), torch.cat(found, dim=1))
    assert torch.allclose(quantizer.features(bits, schedule), total[:, :, 0], atol=1e-5)


def test_patches_are_folded_in_the_published_order():
    tokenizer = make(PATCHED)
    schedule = Schedule.of((2, 3))
    f = features(tokenizer, schedule)
    bits = tokenizer.quantizer.encode(f, schedule).view(2, 2, 3, 8, 2, 2)
    for y, x in ((0, 0), (3, 4), (2, 5)):
        assert torch.equal(bits[:, y // 2, x // 2, :, y % 2, x % 2], (f[:, :, y, x] > 0).to(torch.uint8))


@pytest.mark.parametrize("config", [CONFIG, PATCHED], ids=["plain", "patches"])
def test_pictures_any_schedule_and_prefixes(config: BitwiseConfig):
    tokenizer = make(config)
    stride = 2 * config.patch
    assert tokenizer.image_size() == (8 * stride, 8 * stride) and tokenizer.image_size(WIDE) == (
        4 * stride,
        7 * stride,
    )
    images = torch.rand(2, 3, *tokenizer.image_size(WIDE)) * 2 - 1
    latents = tokenizer.encode(images, WIDE)
    assert latents["bits"].shape == (2, WIDE.total, config.token_bits)
    whole, coarse = tokenizer.decode(latents, WIDE), tokenizer.decode(latents, WIDE, levels=1)
    assert whole.shape == coarse.shape == images.shape and not torch.equal(whole, coarse)
    canvas = tokenizer.canvas(2, WIDE)
    canvas.fill(latents)
    with torch.no_grad():  # as `decode` is: with gradients convolutions add in another order
        assert torch.allclose(canvas.preview(), whole, atol=1e-6)
    kept = make(config).training_latents(torch.zeros(1, 3, *tokenizer.image_size()))
    f = tokenizer.encode_features(torch.zeros(1, 3, *tokenizer.image_size()))
    assert torch.equal(kept["features"], f.flatten(2).mT) and kept["bits"].shape[1] == 85


def test_what_a_canvas_feeds_is_bilinear_also_on_the_way_down():
    tokenizer = make(replace(CONFIG, schedule=(1, 2, 3, 8)))
    bits = torch.randint(0, 2, (2, 78, 8))
    canvas = tokenizer.canvas(2)
    canvas.fill({"bits": bits})
    step = ScalePlan(tokenizer.schedule).training_step()
    fed = canvas.feed(step.feed)["vectors"]
    sofar = tokenizer.quantizer.features(bits, tokenizer.schedule, 2)
    expected = F.interpolate(sofar, (3, 3), mode="bilinear").flatten(2).mT
    assert torch.equal(fed[:, 5:14], expected)
    assert not torch.allclose(expected, F.interpolate(sofar, (3, 3), mode="area").flatten(2).mT)


def test_released_sizes():
    """Parameters as counted in the published code."""
    for bits, patch, millions in ((16, 1, 110), (32, 1, 110), (14, 2, 82)):
        tokenizer = build_empty(BitwiseConfig.published(bits, (1, 2), patch).build)
        assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e6) == millions
        assert tokenizer.stride == 16


def test_mistakes_are_told():
    tokenizer = make()
    with pytest.raises(UserError, match="features on a"):
        tokenizer.quantizer.encode(torch.zeros(1, 8, 3, 3), WIDE)
    with pytest.raises(UserError, match="5 bits do not fill"):
        tokenizer.quantizer.features(torch.zeros(1, 5, 8), tokenizer.schedule)
    with pytest.raises(UserError, match="patch 0"):
        replace(CONFIG, patch=0)
    with pytest.raises(UserError, match="entropy is -1"):
        replace(CONFIG, entropy=-1.0)


# Training


def test_losses_are_those_of_the_paper():
    tokenizer = make()
    schedule = Schedule.of(2)
    f = features(tokenizer, schedule, batch=3)
    z = F.normalize(f, dim=1)
    q = z.sign() / math.sqrt(8)
    p = torch.sigmoid(4 * z / math.sqrt(8) * 100).double()

    def entropy(x: torch.Tensor) -> torch.Tensor:
        return -(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x))

    penalty = entropy(p).sum(1).mean() - entropy(p.mean(dim=(0, 2, 3))).sum()
    expected = 0.25 * (z - q).square().sum(1).mean() + 0.1 * penalty
    out = tokenizer.quantizer(f, schedule)
    assert abs(out.loss.item() - expected.item()) < 1e-5
    assert torch.allclose(out.features, q) and torch.equal(
        out.chosen, tokenizer.quantizer.encode(f, schedule)
    )


def test_features_are_pulled_to_the_sums_of_codes():
    """Without the pull only their directions matter, and they may outgrow every sum."""
    schedule = Schedule.of(1, 2)
    plain, pulled = (make(replace(CONFIG, schedule=(1, 2), pull=w)).quantizer for w in (0.0, 0.5))
    f = features(make(), schedule, batch=3).requires_grad_()
    first = pulled.features(pulled.encode(f, schedule)[:, :1], Schedule.of(1))
    sums = [F.interpolate(first, (2, 2), mode="bilinear"), pulled(f, schedule).features]
    expected = sum(0.5 * (f - s).square().sum(1).mean() for s in sums) / 2
    gap = pulled(f, schedule).loss - plain(f, schedule).loss
    assert abs(gap.item() - expected.item()) < 1e-4
    alone = Schedule.of(2)
    (grown,) = torch.autograd.grad(plain(f, alone).loss, f)
    (held,) = torch.autograd.grad(pulled(f, alone).loss - plain(f, alone).loss, f)
    large = f.norm(dim=1) > 1.01  # beyond unit codes
    assert (
        (grown * f).sum(1).abs().max() < 1e-5
        and bool(large.any())
        and bool(((held * f).sum(1) > 0)[large].all())
    )


def test_gradients_pass_straight_through_to_the_unit_vectors():
    tokenizer = make(replace(CONFIG, entropy=0.0, commitment=0.0))
    f = features(tokenizer, Schedule.of(2)).requires_grad_()
    weight = torch.randn_like(f)
    (tokenizer.quantizer(f, Schedule.of(2)).features * weight).sum().backward()
    g = f.detach().clone().requires_grad_()
    (F.normalize(g, dim=1) * weight).sum().backward()
    assert f.grad is not None and g.grad is not None and torch.allclose(f.grad, g.grad, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, PATCHED], ids=["plain", "patches"])
def test_gradients_reach_every_parameter(config: BitwiseConfig):
    tokenizer = make(config).train()
    outputs = tokenizer.training_forward(torch.rand(2, 3, *tokenizer.image_size()) * 2 - 1)
    outputs["reconstruction"].square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tokenizer.parameters())
    assert outputs["bits"].shape == (2, 85, config.token_bits)


def test_the_network_may_be_bfloat16_while_codes_stay_exact():
    tokenizer = make().to(torch.bfloat16)
    latents = tokenizer.encode(torch.zeros(1, 3, 16, 16))
    f_hat = tokenizer.quantizer.features(latents["bits"], tokenizer.schedule)
    assert f_hat.dtype == torch.float32 and tokenizer.decode(latents).dtype == torch.float32


def test_it_trains_like_any_tokenizer(tmp_path):
    torch.manual_seed(0)
    config = replace(CONFIG, schedule=(1, 2, 4))
    task = ReconstructionTask(config.build(), open_dataset("digits"), TokenizerLossConfig(), 8, {})
    before = task.validate()
    assert {"psnr", "bit_entropy", "bit_entropy_2"} <= set(before) and 0 <= before["bit_entropy"] <= 1
    run = TrainConfig(steps=20, lr=2e-3, validate_every=100, checkpoint_every=100)
    result = train(task, run, tmp_path / "run", quiet=True)
    assert result.metrics["psnr"] > before["psnr"] + 1
    assert set(load_run(tmp_path / "run")) == {"tokenizer"}


# The head


def test_the_head_is_linear_in_bits_and_its_loss_the_mean_over_them():
    head = BitsConfig(width=16, bits=6).build()
    assert sum(p.numel() for p in head.parameters()) == 2 * 6 * (16 + 1)
    h, bits = torch.randn(2, 5, 16), torch.randint(0, 2, (2, 5, 6))
    pairs = F.linear(h, head.out.weight, head.out.bias).view(2, 5, 6, 2)
    expected = F.cross_entropy(pairs.flatten(0, 2), bits.flatten(), reduction="none").view(2, 5, 6).mean(-1)
    assert torch.allclose(head.loss(h, {"bits": bits.to(torch.uint8)}), expected, atol=1e-6)
    torch.nn.init.zeros_(head.out.weight)
    assert torch.allclose(head.loss(h, {"bits": bits}), torch.full((2, 5), math.log(2)))


def ask(pick: Sampler | None, batch: int, targets: int, progress: float = 0.0, guidance: float = 1.0) -> Ask:
    plan = ScalePlan(Schedule.of(1, (1, targets)))
    return Ask(
        plan.steps[1], Draws.start(3, batch), torch.ones(batch, 1, dtype=torch.int64),
        torch.full((batch, 1), progress), Guidance(guidance), pick,
    )  # fmt: skip


def test_each_bit_has_a_draw_of_its_own_and_its_own_probability():
    head = BitsConfig(width=4, bits=3).build()
    torch.nn.init.zeros_(head.out.weight)
    with torch.no_grad():
        head.out.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 0.0]))
    n = 8 * 500
    bits = head.sample(torch.zeros(1, 8, 500, 4), ask(Sampler(), 8, 500))["bits"].double().flatten(0, 1)
    p = torch.sigmoid(torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64))
    deviation = (p * (1 - p) / n).sqrt()
    assert bool(((bits.mean(0) - p).abs() < 5 * deviation).all())
    correlation = torch.corrcoef(bits.T)[0, 1].abs()
    assert correlation < 5 / math.sqrt(n), "draws of two bits would be one"


def test_top_p_drops_an_unlikely_value():
    head = BitsConfig(width=4, bits=1).build()
    torch.nn.init.zeros_(head.out.weight)
    with torch.no_grad():
        head.out.bias.copy_(torch.tensor([0.0, math.log(0.97 / 0.03) + 0.01]))
    h = torch.zeros(1, 8, 500, 4)
    assert bool(head.sample(h, ask(Sampler(top_p=0.97), 8, 500))["bits"].all())
    assert not bool(head.sample(h, ask(Sampler(), 8, 500))["bits"].all())


def test_temperature_and_guidance_by_step():
    head = BitsConfig(width=4, bits=2).build()
    h = torch.randn(2, 3, 20, 4)
    greedy = head.sample(h, ask(None, 3, 20, guidance=3.0))["bits"]
    by_step = Sampler(temperature=(1.0, 0.0))
    assert torch.equal(head.sample(h, ask(by_step, 3, 20, progress=1.0, guidance=3.0))["bits"], greedy)
    first = ask(by_step, 3, 20, progress=0.0, guidance=3.0)
    assert torch.equal(
        head.sample(h, first)["bits"], head.sample(h, ask(Sampler(), 3, 20, guidance=3.0))["bits"]
    )
    listed = Guidance((1.0, 3.0))
    for progress, scale in ((0.0, 1.0), (1.0, 3.0)):
        guided = listed(h, torch.full((3, 1), progress))
        assert torch.allclose(guided, h[1] + scale * (h[0] - h[1]), atol=1e-6)
    assert Guidance((1.0, 1.0)).off and not listed.off
    for wrong in (
        lambda: Guidance((1.0, 2.0), ramp=True),
        lambda: Guidance((1.0, 200.0)),
        lambda: Sampler((1.0, -1.0)),
    ):
        with pytest.raises(UserError):
            wrong()

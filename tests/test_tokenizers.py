"""Tokenizers and their losses: exact checks, published sizes, training gradients, codebook upkeep."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varkit.errors import UserError
from varkit.plans.schedule import Schedule
from varkit.tokenizers.codebook import ROWS, Codebook, CodebookKeeper, CodebookStatistics
from varkit.tokenizers.conv import Attention, ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig, phi_index
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.tokenizers.vq import VQ, VQConfig
from varkit.train.tokenizer_loss import TokenizerLoss, TokenizerLossConfig, hinge_loss

CONV = ConvConfig(channels=8, multipliers=(1, 2, 2), res_blocks=1, latent_channels=8, groups=2)
PYRAMID = MultiScaleVQConfig(CONV, vocab_size=64, code_channels=8, schedule=(1, 2, 3, 4))
PATCHED = dataclasses.replace(PYRAMID, encoder=PatchEncoderConfig(width=16, depth=1), rate=1.0)
LAYER_NORM = dataclasses.replace(PYRAMID, conv=dataclasses.replace(CONV, groups=0))
GRID = VQConfig(CONV, vocab_size=64, code_channels=4, grid=4)
WIDE = Schedule.of(1, (2, 3), (3, 5), (4, 6))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def waves(batch: int, height: int = 16, width: int = 16) -> Tensor:
    """Smooth images (B, 3, H, W) in [-1, 1], all different."""
    y = torch.linspace(0, 6, height)[:, None]
    x = torch.linspace(0, 6, width)
    phase = torch.arange(3.0 * batch).view(batch, 3, 1, 1)
    return torch.sin(x + 0.7 * phase) * torch.cos(y * (1 + 0.1 * phase))


EACH = pytest.mark.parametrize(
    "config", [PYRAMID, GRID, PATCHED, LAYER_NORM], ids=["pyramid", "grid", "patched", "layer norm"]
)


@functools.cache
def initialized(config: MultiScaleVQConfig | VQConfig) -> MultiScaleVQ | VQ:
    torch.manual_seed(0)
    tokenizer = config.build()
    tokenizer.initialize_codebook(waves(32), seeded())
    return tokenizer


def make(config: MultiScaleVQConfig | VQConfig = PYRAMID) -> MultiScaleVQ | VQ:
    """A small tokenizer whose codes fit its features, ready to be spoilt by a test."""
    return copy.deepcopy(initialized(config))


def features(schedule: Schedule, batch: int = 3) -> Tensor:
    return torch.randn(batch, 8, *schedule.last, generator=seeded(1))


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# The published architectures


def test_var_has_the_published_sizes() -> None:
    with torch.device("meta"):
        tokenizer = MultiScaleVQConfig().build()
    assert parameters(tokenizer) == 108_948_355
    assert parameters(tokenizer.encoder) == 44_107_872
    assert parameters(tokenizer.decoder) == 64_653_923
    assert parameters(tokenizer.quantizer) == 4096 * 32 + 4 * (32 * 32 * 9 + 32)
    assert tokenizer.image_size() == (256, 256)


def test_llamagen_has_the_published_size() -> None:
    with torch.device("meta"):
        assert parameters(VQConfig().build()) == 71_883_403


@pytest.mark.parametrize(
    ("levels", "phis", "expected"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, 4, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (5, 1, [0, 0, 0, 0, 0]),
        (1, 4, [0]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_phi_selector(levels: int, phis: int, expected: list[int]) -> None:
    assert [phi_index(level, levels, phis) for level in range(levels)] == expected


def test_phi_sharing_zero_makes_one_for_each_level() -> None:
    config = dataclasses.replace(PYRAMID, phi_sharing=0)
    assert len(config.build().quantizer.phis) == 4


def test_attention_is_softmax_over_positions() -> None:
    attention = Attention(8, groups=4).double()
    x = torch.randn(2, 8, 3, 4, generator=seeded(), dtype=torch.float64)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(8), dim=-1)
    expected = x + attention.proj(torch.einsum("bij,bcj->bci", weights, v).view(2, 8, 3, 4))
    torch.testing.assert_close(attention(x), expected)


# The residual quantizer


@pytest.mark.parametrize("schedule", [Schedule.of(1, 2, 3, 4), WIDE], ids=["square", "wide"])
def test_encoding_leaves_exactly_the_rest_and_decoding_repeats_it(schedule: Schedule) -> None:
    """Sheet check 3: f_rest + f_hat = f after every level, by the paper's own recursion."""
    quantizer = make().quantizer
    f = features(schedule)
    ids = quantizer.encode(f, schedule)
    f_hat, rest = quantizer.zeros(len(f), schedule), f.clone()
    for level, side in enumerate(schedule.sides):
        z = F.interpolate(rest, side, mode="area").permute(0, 2, 3, 1).flatten(1, 2)
        chosen = torch.cdist(z.double(), quantizer.codebook.double()).argmin(-1)
        assert torch.equal(chosen, ids[:, schedule.offsets[level] : schedule.offsets[level + 1]])
        after = quantizer.accumulate(f_hat, level, quantizer.lookup(chosen), schedule)
        rest, f_hat = rest - (after - f_hat), after
        torch.testing.assert_close(rest + f_hat, f, atol=1e-5, rtol=0)
        assert torch.equal(quantizer.features(ids, schedule, level + 1), f_hat)


def test_accumulate_is_bicubic_then_phi() -> None:
    quantizer, schedule = make().quantizer, Schedule.of(1, 2, 3, 4)
    for level in range(4):
        codes = torch.randn(2, schedule.lengths[level], 8, generator=seeded(level))
        h = codes.transpose(1, 2).reshape(2, 8, *schedule.sides[level])
        h = F.interpolate(h, (4, 4), mode="bicubic", align_corners=False)
        phi = dict(quantizer.phis[level].named_parameters())
        expected = 0.5 * h + 0.5 * F.conv2d(h, phi["weight"], phi["bias"], padding=1)
        f_hat = quantizer.accumulate(torch.ones(2, 8, 4, 4), level, codes, schedule)
        torch.testing.assert_close(f_hat, 1 + expected)


def test_next_input_is_the_area_average_of_what_came_before() -> None:
    quantizer, schedule = make().quantizer, Schedule.of(1, 2, 4)
    f_hat = features(schedule)
    given_at_2 = quantizer.next_input(f_hat, 1, schedule)
    expected = f_hat.reshape(3, 8, 2, 2, 2, 2).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(given_at_2, expected)
    assert torch.equal(quantizer.next_input(f_hat, 2, schedule), f_hat.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("start", [1, 2, 3])
def test_encoding_goes_on_after_a_prefix(start: int) -> None:
    quantizer = make().quantizer
    f = features(WIDE)
    ids = quantizer.encode(f, WIDE)
    rest = quantizer.encode(f, WIDE, start, quantizer.features(ids, WIDE, start))
    assert torch.equal(rest, ids[:, WIDE.offsets[start] :])


def test_override_replaces_a_level_and_the_rest_makes_up_for_it() -> None:
    quantizer = make().quantizer
    f = features(WIDE)
    plain = quantizer.encode(f, WIDE)
    forced = quantizer.encode(f, WIDE, override=lambda level, ids: (ids + 1) % 64 if level == 1 else ids)
    a, b = WIDE.offsets[1], WIDE.offsets[2]
    assert torch.equal(forced[:, :a], plain[:, :a])
    assert torch.equal(forced[:, a:b], (plain[:, a:b] + 1) % 64)
    again = quantizer.encode(f, WIDE, 2, quantizer.features(forced, WIDE, 2))
    assert torch.equal(forced[:, b:], again) and not torch.equal(forced[:, b:], plain[:, b:])


def test_training_pass_equals_the_papers_loss() -> None:
    quantizer, schedule = make().quantizer, Schedule.of(1, 2, 3, 4)
    f = features(schedule).requires_grad_()
    out = quantizer(f, schedule)
    f_hats = [quantizer.features(out.chosen, schedule, level) for level in range(1, 5)]
    expected = torch.stack([1.25 * F.mse_loss(f_hat, f) for f_hat in f_hats]).mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.features, f_hats[-1])
    assert torch.equal(out.chosen, quantizer.encode(f, schedule))
    assert torch.equal(quantizer.embedding.nearest(out.residuals), out.chosen)
    # Straight-through: the features' gradient is that of f itself; codes and phis get none of it.
    weights = torch.randn(out.features.shape, generator=seeded(2))
    codes = quantizer.embedding.weight
    grads = torch.autograd.grad(
        (out.features * weights).sum(), [f, codes], retain_graph=True, allow_unused=True
    )
    assert torch.equal(grads[0], weights) and grads[1] is None
    # The commitment term alone reaches f: d/df of beta * mean over levels of |f_hat - f|^2.
    (commit,) = torch.autograd.grad(out.loss, f)
    pulls = torch.stack([0.25 * 2 * (f - f_hat) / f.numel() for f_hat in f_hats]).mean(0)
    torch.testing.assert_close(commit, pulls)


def test_data_dependent_codes_quantise_better_than_the_uniform_start() -> None:
    tokenizer = PYRAMID.build()
    f = tokenizer.encode_features(waves(4))

    def error() -> float:
        ids = tokenizer.quantizer.encode(f, tokenizer.schedule)
        return F.mse_loss(tokenizer.quantizer.features(ids, tokenizer.schedule), f).item()

    before = error()
    tokenizer.initialize_codebook(waves(32), seeded())
    assert error() < 0.7 * before
    assert len(tokenizer.quantizer.codebook.unique(dim=0)) == 64


# The codebook


@given(st.integers(1, 3), st.integers(1, 2 * ROWS + 3), st.booleans())
def test_nearest_is_exact_for_any_shape_and_batch(seed: int, n: int, normalize: bool) -> None:
    codebook = Codebook(50, 5, normalize)
    codebook.weight.data.normal_(generator=seeded(seed))
    vectors = torch.randn(n, 5, generator=seeded(seed + 9))
    ids = codebook.nearest(vectors)
    unit = F.normalize(vectors, dim=-1) if normalize else vectors
    distances = torch.cdist(unit.double(), codebook.codes.double())
    assert torch.equal(ids, distances.argmin(-1))
    assert torch.equal(codebook.nearest(vectors[n // 2 :][None])[0], ids[n // 2 :])


def test_ties_go_to_the_lowest_code() -> None:
    codebook = Codebook(8, 2)
    codebook.weight.data = torch.tensor([[9.0, 9], [1, 0], [0, 1], [1, 0], [-1, 0], [0, -1], [1, 0], [9, 9]])
    assert codebook.nearest(torch.tensor([[2.0, 0], [0.0, 0.0], [9.0, 9]])).tolist() == [1, 1, 0]


def test_normalised_codes_have_unit_length() -> None:
    codebook = Codebook(8, 4, normalize=True)
    codebook.weight.data.normal_(generator=seeded())
    torch.testing.assert_close(codebook(torch.arange(8)).norm(dim=-1), torch.ones(8))


def test_dead_codes_move_onto_current_vectors() -> None:
    codebook = Codebook(6, 3)
    before = codebook.weight.detach().clone()
    keeper = CodebookKeeper(codebook, patience=3)
    vectors, ids = torch.randn(2, 5, 3, generator=seeded()), torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])
    assert [keeper.update(vectors, ids, seeded(1)) for _ in range(2)] == [0, 0]
    assert torch.equal(codebook.weight, before)
    assert keeper.update(vectors, ids, seeded(1)) == 3
    assert torch.equal(codebook.weight[:3], before[:3])
    matches = (codebook.weight[3:, None] == vectors.flatten(0, 1)).all(-1)
    assert matches.sum().item() == 3 and (matches.sum(0) <= 1).all()
    assert keeper.update(vectors, ids, seeded(1)) == 0, "a revived code starts a new life"


def test_revival_is_deterministic_and_a_code_in_use_never_moves() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        codebook = Codebook(6, 3)
        keeper = CodebookKeeper(codebook, patience=2)
        for step in range(4):
            ids = torch.tensor([0, 1 + step % 2])
            keeper.update(torch.randn(2, 3, generator=seeded(step)), ids, seeded(step))
        results.append(codebook.weight.detach().clone())
        assert keeper.idle[:3].tolist() == [0, 1, 0]
    assert torch.equal(*results)


def test_moving_average_follows_its_definition() -> None:
    codebook = Codebook(3, 2)
    keeper = CodebookKeeper(codebook, decay=0.9)
    assert not codebook.weight.requires_grad
    counts, sums = [1.0, 1.0, 1.0], codebook.weight.tolist()
    for step in range(5):
        vectors, ids = torch.randn(6, 2, generator=seeded(step)), torch.tensor([0, 0, 1, 0, 1, 0])
        keeper.update(vectors, ids, seeded())
        for code in range(3):
            mine = vectors[ids == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
            sums[code] = [0.9 * s + 0.1 * m for s, m in zip(sums[code], mine.sum(0).tolist(), strict=True)]
    expected = torch.tensor(sums) / torch.tensor(counts)[:, None]
    torch.testing.assert_close(codebook.weight.detach(), expected)


def test_moving_average_reaches_the_means_and_resumes() -> None:
    means = torch.tensor([[3.0, 0], [-3, 0], [0, 3]])
    codebook = Codebook(3, 2)
    codebook.weight.data = means + 0.5
    keeper = CodebookKeeper(codebook, decay=0.8)
    ids = torch.arange(3).repeat(20)
    for step in range(60):
        noise = torch.randn(60, 2, generator=seeded(step)) * 0.01
        keeper.update(means[ids] + noise, ids, seeded())
    torch.testing.assert_close(codebook.weight.detach(), means, atol=0.01, rtol=0)
    twin = CodebookKeeper(codebook, decay=0.8)
    twin.load_state_dict(keeper.state_dict())
    assert torch.equal(twin.sums, keeper.sums) and torch.equal(twin.counts, keeper.counts)


def test_statistics_equal_a_slow_count() -> None:
    schedule = Schedule.of(1, 2, 3)
    statistics = CodebookStatistics(10, schedule)
    batches = [torch.randint(0, 8, (5, 14), generator=seeded(i)) for i in range(2)]
    counts = [[0] * 10 for _ in range(3)]
    for ids in batches:
        statistics.update(ids)
        for row in ids.tolist():
            for level, code in zip(schedule.level_of.tolist(), row, strict=True):
                counts[level][code] += 1
    assert statistics.counts.tolist() == counts
    assert statistics.usage(0) == sum(c > 0 for c in counts[0]) / 10
    assert statistics.usage() == 0.8
    shares = [c / 10 for c in counts[0] if c]
    assert statistics.perplexity(0) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert 1 < statistics.perplexity() <= 8
    assert CodebookStatistics(10, schedule).perplexity() == 1
    metrics = statistics.metrics()
    assert list(metrics)[:2] == ["usage", "perplexity"]
    for k in range(3):
        own = {f"usage_{k}": statistics.usage(k), f"perplexity_{k}": statistics.perplexity(k)}
        assert own.items() <= metrics.items()


# Whole tokenizers


@EACH
def test_encode_decode(config: MultiScaleVQConfig | VQConfig) -> None:
    tokenizer = make(config).eval()
    images = waves(3)
    latents = tokenizer.encode(images)
    ids = latents["ids"]
    assert ids.shape == (3, tokenizer.schedule.total) and ids.dtype == torch.int64
    decoded = tokenizer.decode(latents)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    out = tokenizer.training_forward(images)
    assert torch.equal(out["ids"], ids)
    torch.testing.assert_close(out["reconstruction"].clamp(-1, 1), decoded, atol=1e-5, rtol=0)
    assert torch.equal(tokenizer.encode(images)["ids"], ids), "encoding is deterministic"
    singles = torch.cat([tokenizer.decode(tokenizer.encode(image[None])) for image in images])
    torch.testing.assert_close(singles, decoded, atol=1e-4, rtol=0)


def test_another_schedule_and_a_prefix_decode() -> None:
    tokenizer = make()
    latents = tokenizer.encode(waves(2, 16, 24), WIDE)
    full = tokenizer.decode(latents, WIDE)
    assert latents["ids"].shape == (2, WIDE.total) and full.shape == (2, 3, 16, 24)
    prefix = {"ids": latents["ids"][:, : WIDE.offsets[2]]}
    preview = tokenizer.decode(prefix, WIDE, levels=2)
    assert torch.equal(preview, tokenizer.decode(latents, WIDE, levels=2))
    assert not torch.equal(preview, full)
    assert torch.equal(tokenizer.decode(latents, WIDE, levels=4), full)


@EACH
def test_filled_canvas_shows_the_decoded_image(config: MultiScaleVQConfig | VQConfig) -> None:
    tokenizer = make(config)
    latents = tokenizer.encode(waves(2))
    with torch.no_grad():
        canvas = tokenizer.canvas(2)
        canvas.fill(latents)
        assert torch.equal(canvas.preview(), tokenizer.decode(latents))


@EACH
def test_gradients_reach_every_parameter(config: MultiScaleVQConfig | VQConfig) -> None:
    tokenizer = make(config)
    images = waves(4)
    out = tokenizer.training_forward(images)
    F.mse_loss(out["reconstruction"], images).backward(retain_graph=True)
    # The reconstruction alone: encoder and decoder, straight through the quantizer.
    silent = {n for n, p in tokenizer.named_parameters() if p.grad is None}
    assert silent == {f"quantizer.{n}" for n, _ in tokenizer.quantizer.named_parameters()}
    out["vq_loss"].backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_training_lowers_the_error() -> None:
    tokenizer = make()
    loss = TokenizerLoss(TokenizerLossConfig())
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    keeper = CodebookKeeper(tokenizer.quantizer.embedding, patience=5)
    images, scores = waves(8), []
    for step in range(20):
        out = tokenizer.training_forward(images)
        value, metrics = loss.generator(out, images, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        keeper.update(out["residuals"], out["ids"], seeded(step))
        scores.append(metrics["psnr"])
    assert scores[-1] > scores[0] + 2


def test_bfloat16_network_keeps_the_quantizer_in_float32() -> None:
    tokenizer = make().bfloat16()
    f = tokenizer.encode_features(waves(2))
    f_hat = tokenizer.quantizer.features(tokenizer.encode(waves(2))["ids"], tokenizer.schedule)
    assert f.dtype == f_hat.dtype == torch.float32
    assert tokenizer.decode_features(f_hat).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = make().training_forward(waves(2))
    assert out["vq_loss"].dtype == out["residuals"].dtype == torch.float32


def test_channels_last_gives_the_same_ids() -> None:
    plain, images = make(), waves(2)
    ids = plain.encode(images)["ids"]
    fast = make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert (fast.encode(images.to(memory_format=torch.channels_last))["ids"] == ids).float().mean() > 0.97


# Errors


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make().encode(waves(1, 24, 16)), r"\(1, 3, 24, 16\).*16, 16"),
        (lambda: make().quantizer.encode(features(WIDE), Schedule.of(1, 2)), r"\(4, 6\).*\(2, 2\)"),
        (lambda: make().decode({"ids": torch.zeros(1, 4, dtype=torch.int64)}), "4 ids.*30"),
        (lambda: make().decode(make().encode(waves(1)), levels=5), "levels is 5"),
        (lambda: ConvConfig(channels=40), "40.*32"),
        (lambda: ConvConfig(groups=-1), "groups is -1"),
        (lambda: ConvConfig(multipliers=()), "multipliers"),
        (lambda: ConvConfig(res_blocks=0), "res_blocks is 0"),
        (lambda: MultiScaleVQConfig(vocab_size=1), "vocab_size is 1"),
        (lambda: MultiScaleVQConfig(schedule=(4, 2)), "coarse to fine"),
        (lambda: MultiScaleVQConfig(phi_ratio=2.0), "phi_ratio 2.0"),
        (lambda: VQConfig(code_channels=0), "code_channels is 0"),
        (lambda: CodebookKeeper(Codebook(4, 2), decay=1.0), "decay 1.0"),
        (lambda: CodebookKeeper(Codebook(4, 2), patience=0), "patience 0"),
        (lambda: TokenizerLossConfig(l1=-1.0), "l1 is -1.0"),
        (lambda: TokenizerLoss(TokenizerLossConfig(perceptual=0.5)), "perceptual"),
    ],
)
def test_wrong_input_is_one_clear_line(call, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


# Losses


def test_generator_loss_is_the_weighted_sum() -> None:
    config = TokenizerLossConfig(l1=0.3, l2=2.0, edges=0.1, vq=0.7, perceptual=0.5)
    loss = TokenizerLoss(config, perceptual=lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)))
    images, noise = waves(2), torch.randn(2, 3, 16, 16, generator=seeded()) * 0.1
    outputs = {"reconstruction": images + noise, "vq_loss": torch.tensor(0.25)}
    value, metrics = loss.generator(outputs, images)
    edges = noise.diff(dim=2).abs().mean() + noise.diff(dim=3).abs().mean()
    worst = noise.abs().amax(dim=(1, 2, 3)).mean()
    expected = 0.3 * noise.abs().mean() + 2 * noise.square().mean() + 0.1 * edges + 0.7 * 0.25 + 0.5 * worst
    torch.testing.assert_close(value, expected)
    assert metrics["loss"] == value.item()
    clamped = F.mse_loss(outputs["reconstruction"].clamp(-1, 1), images).item()
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 / clamped), abs=1e-3)


def test_discriminator_phases() -> None:
    torch.manual_seed(0)
    config = TokenizerLossConfig(
        adversarial=0.4, adversarial_start=5, discriminator_channels=8, discriminator_layers=1
    )
    tokenizer, loss, images = make(), TokenizerLoss(config), waves(4)
    out = tokenizer.training_forward(images)
    last = tokenizer.decoder.conv_out.weight
    assert "adversarial" not in loss.generator(out, images, step=4, last_layer=last)[1]
    value, metrics = loss.generator(out, images, step=5, last_layer=last)
    # The adaptive weight makes both gradients at the last layer equally long, up to its 1e-4 guard.
    pixels = 0.2 * F.l1_loss(out["reconstruction"], images) + F.mse_loss(out["reconstruction"], images)
    assert loss.discriminator is not None
    critic = -loss.discriminator(out["reconstruction"]).mean()
    lengths = [torch.autograd.grad(t, last, retain_graph=True)[0].norm().item() for t in (pixels, critic)]
    assert metrics["adversarial_weight"] == pytest.approx(0.4 * lengths[0] / (lengths[1] + 1e-4), rel=1e-3)
    value.backward()
    loss.zero_grad()
    tokenizer.zero_grad()
    value, metrics = loss.discriminate(out, images)
    value.backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert all(p.grad is None for p in tokenizer.parameters())
    assert metrics["discriminator"] == value.item()


def test_hinge_loss_stops_beyond_the_margin() -> None:
    assert hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.5])) == 0.5 * (1 + 1.5)

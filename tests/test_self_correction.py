"""Bitwise self-correction: the sheet's checks 2 and 5, the published draws, and training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from varkit.decode.cache.full import FullCache
from varkit.decode.loop import Model, run
from varkit.decode.sampling import Sampler
from varkit.decode.state import Options, State
from varkit.draws import Draws
from varkit.errors import UserError
from varkit.generators.infinity import InfinityConfig
from varkit.generators.text import TextConfig
from varkit.heads.bits import BitsConfig
from varkit.plans.ratios import scales
from varkit.plans.scales import ScalePlan
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.lessons import WholePlan
from varkit.train.loop import train
from varkit.train.self_correction import SelfCorrection
from varkit.train.task import TrainConfig
from varkit.train.tokens import Tokens

REFERENCE = Path(__file__).parent / "reference"


def self_correction(strongest: float, **changes) -> tuple[SelfCorrection, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    conv = ConvConfig(8, (1, 2), res_blocks=1, latent_channels=8, attention=False)
    tokenizer = BitwiseConfig(conv, (1, 2, 4, 8), **changes).build()
    lessons = SelfCorrection(tokenizer, ScalePlan(tokenizer.schedule), strongest)
    latents = tokenizer.training_latents(torch.rand(6, 3, *tokenizer.image_size()) * 2 - 1)
    assert bool((latents["features"].std(dim=0) > 0).any())
    return lessons, {"bits": latents["bits"].long(), "features": latents["features"]}


@pytest.mark.parametrize("patch", [1, 2])
def test_without_flips_it_is_plain_teacher_forcing(patch: int):
    lessons, latents = self_correction(0.0, patch=patch)
    taught = lessons.lesson(latents, 0)
    plain = WholePlan(lessons.tokenizer, lessons.plan, 0.5).lesson(latents, 0)
    for lesson in (taught, lessons.lesson(latents)):
        assert torch.equal(lesson.targets["bits"].long(), latents["bits"])
        fed = lesson.canvas.feed(lesson.step.feed)["vectors"]
        assert torch.equal(fed, plain.canvas.feed(plain.step.feed)["vectors"])
    assert taught.weights is not None and torch.equal(taught.weights, plain.weights)


@pytest.mark.parametrize("patch", [1, 2])
def test_labels_are_the_signs_of_what_flipped_bits_leave_missing(patch: int):
    lessons, latents = self_correction(0.3, patch=patch)
    torch.manual_seed(1)
    lesson = lessons.lesson(latents, 0)
    schedule, used = lessons.schedule, lesson.canvas.latents()["bits"]
    f = latents["features"].mT.reshape(6, 8, 8 * patch, 8 * patch)
    total = torch.zeros_like(f)
    fed = lesson.canvas.feed(lesson.step.feed)["vectors"]
    shares = set()
    for k, (h, w) in enumerate(schedule.sides):
        positions = schedule.positions(k)
        if k:
            shown = F.interpolate(total, (h * patch, w * patch), mode="bilinear")
            assert torch.allclose(fed[:, positions], F.pixel_unshuffle(shown, patch).flatten(2).mT, atol=1e-6)
        missing = F.pixel_unshuffle(F.interpolate(f - total, (h * patch, w * patch), mode="area"), patch)
        right = (missing > 0).flatten(2).mT
        assert torch.equal(lesson.targets["bits"][:, positions].bool(), right)
        wrong = (used[:, positions].bool() != right).double().mean().item()
        shares.add(round(wrong, 3))
        codes = (used[:, positions].float() * 2 - 1).mT.reshape(6, -1, h, w) / math.sqrt(8)
        total = total + F.interpolate(F.pixel_shuffle(codes, patch), f.shape[2:], mode="bilinear")
    assert max(shares) > 0 and max(shares) < 0.5 and len(shares) > 1
    held_out = lessons.lesson(latents)
    assert torch.equal(held_out.targets["bits"].long(), latents["bits"])


def test_given_the_published_draws_inputs_and_labels_are_the_published_ones(monkeypatch: pytest.MonkeyPatch):
    """From the case varedit_tiny of VAREdit, which trains its target as Infinity does."""
    with np.load(REFERENCE / "infinity_self_correction.npz") as stored:
        case = {name: torch.from_numpy(stored[name]) for name in ("features", "inputs")}
        flips = np.unpackbits(stored["flip_mask"]).reshape(2, -1, 16)
        bits = np.unpackbits(stored["bits"]).reshape(2, -1, 16)
    conv = ConvConfig(4, (1,), res_blocks=1, latent_channels=16, attention=False)
    tokenizer = BitwiseConfig(conv, scales(1.0, "0.06M").schedule).build()
    lessons = SelfCorrection(tokenizer, scales(1.0, "0.06M").build())
    masks = iter(torch.from_numpy(flips).bool().split(lessons.schedule.lengths, dim=1))
    monkeypatch.setattr(lessons, "flipped", lambda bits: torch.where(next(masks), 1 - bits, bits))
    latents = {"bits": torch.zeros(2, 521, 16), "features": case["features"].flatten(2).mT}
    lesson = lessons.lesson(latents, 0)
    fed = lesson.canvas.feed(lesson.step.feed)["vectors"]
    assert (fed[:, 1:][:, ::3] - case["inputs"]).abs().max() < 1e-5
    assert torch.equal(lesson.targets["bits"], torch.from_numpy(bits))


def test_flips_have_the_drawn_strength():
    lessons, _ = self_correction(0.3)
    torch.manual_seed(2)
    bits = torch.zeros(50, 50, 8, dtype=torch.uint8)
    shares = torch.tensor([lessons.flipped(bits).double().mean() for _ in range(300)])
    steps = 0.01 * torch.arange(31, dtype=torch.float64)
    nearest = (shares[:, None] - steps).abs().min(dim=1).values
    assert nearest.max() < 5 * math.sqrt(0.25 / bits.numel())
    spread = 0.01 * math.sqrt((31**2 - 1) / 12)
    assert abs(shares.mean() - 0.15) < 5 * spread / math.sqrt(300)
    assert shares.max() > 0.28 and shares.min() < 0.02
    fewer = SelfCorrection(lessons.tokenizer, lessons.plan, 1.0, scales=1)
    assert fewer.settings["scales"] == 1 and fewer.settings["strongest"] == 1.0


def test_self_correction_says_what_it_needs():
    lessons, latents = self_correction(0.3)
    with pytest.raises(UserError, match="Bitwise.training_latents"):
        lessons.lesson({"bits": latents["bits"]}, 0)
    with pytest.raises(UserError, match="outside 0 to 1"):
        SelfCorrection(lessons.tokenizer, lessons.plan, 1.3)


WORDS = ("circle", "ring", "star", "heart")


def toy_tokens(classes: int = 4, copies: int = 8) -> Tokens:
    """Features that a word determines, up to a little noise, and their bits."""
    lessons, _ = self_correction(0.0)
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(classes, 1, 64, 8))
    noise = 0.1 * rng.normal(size=(classes, copies, 64, 8))
    features = (prototypes + noise).reshape(-1, 64, 8).astype(np.float32)
    grid = torch.from_numpy(features).mT.reshape(-1, 8, 8, 8)
    bits = lessons.quantizer.encode(grid, lessons.schedule).numpy()
    captions = [WORDS[i // copies] for i in range(classes * copies)]
    return Tokens({"bits": bits, "features": features}, captions=captions)


def toy_task(strongest: float) -> tuple[NextStepTask, Model]:
    tokenizer = self_correction(strongest)[0].tokenizer
    text = TextConfig(WORDS, length=4, width=16, depth=1, heads=2)
    torch.manual_seed(3)
    config = InfinityConfig(2, 48, 2, 8, text, gate_init=0.5, modulation_init=0.5)
    fitted = config.fitted(tokenizer.config)
    assert fitted["plan"].frame == (8, 8) and fitted["head"] == BitsConfig(48, 8)
    plan = fitted["plan"].build()
    generator, head = fitted["generator"].build(), fitted["head"].build()
    lessons = SelfCorrection(tokenizer, plan, strongest)
    tokens = toy_tokens()
    task = NextStepTask(
        Forced(tokenizer, generator, head, plan, lessons), tokens, tokens, batch_size=16,
        recipe={"lessons": lessons.settings},
    )  # fmt: skip
    return task, Model(plan, generator, {"main": head})


def test_it_learns_through_the_one_trainer(tmp_path: Path):
    task, _ = toy_task(0.3)
    before = task.validate()
    assert abs(before["loss"] - math.log(2)) < 0.02 and "loss_3" in before
    config = TrainConfig(steps=20, lr=5e-3, validate_every=1000, checkpoint_every=1000, ema=0.5)
    result = train(task, config, tmp_path / "run", quiet=True)
    assert result.metrics["loss"] < before["loss"] - 0.01


def error_after_wrong_bits(task: NextStepTask, model: Model, share: float) -> float:
    """Mean squared error of the final latent, against that of the features asked for, when bits of the second scale are
    flipped while decoding greedily."""
    text = task.objective.generator.config.condition
    generator = model.generator.eval()
    condition = {"text": text.encode(list(WORDS) * 8)[None]}
    wrong = torch.rand(32, 4, 8, generator=torch.Generator().manual_seed(4)) < share

    def flip(step, values, state):
        hit = int(step.feed.level[0]) == 1
        return {"bits": torch.where(wrong, 1 - values["bits"], values["bits"])} if hit else values

    with torch.no_grad():
        prepared = generator.prepare(condition)
    state = State.start(
        task.tokenizer.canvas(32), FullCache(32, 1, model.plan.slots), prepared, Draws.start(0, 32),
        Options(pick=Sampler(temperature=0.0), override=flip),
    )  # fmt: skip
    drawn = run(model, state).canvas.f_hat
    means = torch.from_numpy(np.asarray(task.tokens.latents["features"])).reshape(4, 8, 64, 8).mean(dim=1)
    asked = means.mT.reshape(4, 8, 8, 8).repeat(8, 1, 1, 1)
    return (drawn - asked).square().mean().item()


@pytest.mark.slow
def test_a_model_taught_to_correct_itself_does(tmp_path: Path):
    """The sheet's check 5, with its threshold: after 20 % wrong bits at the second scale, at most 0.8 of the error."""
    errors = {}
    for strongest in (0.0, 0.3):
        task, model = toy_task(strongest)
        config = TrainConfig(steps=600, lr=4e-3, validate_every=10_000, checkpoint_every=10_000)
        train(task, config, tmp_path / str(strongest), quiet=True)
        errors[strongest] = error_after_wrong_bits(task, model, 0.2)
    assert errors[0.3] / errors[0.0] < 0.8, errors

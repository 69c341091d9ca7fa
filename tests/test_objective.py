"""Teacher forcing: exact losses, progressive training, and both orders learning through the one trainer."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.contracts import CASES, true_latents
from varkit.data.registry import open_dataset
from varkit.heads.categorical import CategoricalConfig
from varkit.nn.attention import Packed
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.lessons import WholePlan
from varkit.train.loop import load_run, train
from varkit.train.objective import NextStepLoss
from varkit.train.progressive import Progressive
from varkit.train.task import TrainConfig
from varkit.train.tokenizer_loss import TokenizerLossConfig
from varkit.train.tokenizer_task import DecoderTask, ReconstructionTask
from varkit.train.tokens import Tokens


def objective(name: str):
    case = CASES[name]
    tokenizer, model = case.build()
    lesson = case.teach(tokenizer, model.plan).lesson(true_latents(tokenizer, model, 3))
    condition = {k: v[0] for k, v in case.conditions(3).items()}
    return model, NextStepLoss(model.generator, model.heads["main"], condition_drop=0.0), lesson, condition


@pytest.mark.parametrize(
    "name", sorted(name for name, case in CASES.items() if isinstance(case.head, CategoricalConfig))
)
def test_a_zero_head_has_the_loss_of_a_uniform_guess(name: str):
    _, loss, lesson, condition = objective(name)
    torch.nn.init.zeros_(loss.head.out.weight)
    if loss.head.out.bias is not None:
        torch.nn.init.zeros_(loss.head.out.bias)
    value = loss(lesson, condition)
    assert abs(value.item() - math.log(24)) < 1e-5


def test_the_loss_is_the_mean_cross_entropy_of_the_stepwise_logits():
    model, loss, lesson, condition = objective("var-class")
    canvas, step = lesson.canvas, lesson.step
    each = loss.losses(lesson, condition)
    h = model.generator(
        canvas.feed(step.feed),
        step,
        model.generator.prepare({k: v[None] for k, v in condition.items()}),
        Packed(step.sees.own),
    )
    slow = -model.heads["main"].logits(h).log_softmax(-1).gather(-1, canvas.chosen[..., None]).squeeze(-1)
    assert torch.allclose(each, slow, atol=1e-5)
    assert abs(loss(lesson, condition).item() - slow.mean().item()) < 1e-5


def test_a_truncated_step_has_the_losses_of_the_full_one():
    model, loss, full, condition = objective("var-class")
    part = replace(full, step=model.plan.training_step(2))
    whole, some = loss.losses(full, condition), loss.losses(part, condition)
    assert torch.allclose(whole[:, : some.shape[1]], some, atol=1e-5)
    expected = some.sum(1).mean() / full.step.target.shape[-1]
    assert abs(loss(part, condition).item() - expected.item()) < 1e-6


def test_coarse_scales_can_count_more():
    tokenizer, model = CASES["var-class"].build()
    latents = true_latents(tokenizer, model, 2)
    lessons = WholePlan(tokenizer, model.plan, step_power=0.5)
    assert lessons.lesson(latents).weights is None, "held-out losses count every target alike"
    weights = lessons.lesson(latents, 0).weights
    assert weights is not None and abs(weights.mean().item() - 1) < 1e-6
    sizes = [step.target.shape[-1] for step in model.plan.steps]
    first, last = weights[0].item(), weights[-1].item()
    assert abs(first / last - (sizes[-1] / sizes[0]) ** 0.5) < 1e-5


def test_the_newest_scale_of_a_growing_plan_weighs_little_at_first():
    tokenizer, model = CASES["var-class"].build()
    latents, levels = true_latents(tokenizer, model, 2), len(model.plan.steps)
    lessons = WholePlan(tokenizer, model.plan, step_power=0.5)
    lessons.progressive = Progressive(levels, steps=100, first=1, fraction=1.0, ramp=10)
    full = lessons.lesson(latents).step.target.shape[-1]
    fresh = next(s for s in range(100) if lessons.progressive.at(s)[0] == 2)
    lesson = lessons.lesson(latents, fresh)
    newest = model.plan.steps[1].target.shape[-1]
    assert lesson.weights is not None and lesson.total == full
    assert lesson.weights[-newest:].max() < 0.2 < lesson.weights[:-newest].min()


def test_scales_join_one_by_one_with_a_ramp():
    progressive = Progressive(levels=10, steps=1000, first=5, fraction=0.7, warmup=0, ramp=10)
    stages = [progressive.at(s) for s in range(1000)]
    levels = [n for n, _ in stages]
    assert levels == sorted(levels) and set(levels) == set(range(5, 11))
    assert stages[0] == (5, 1.0) and stages[-1] == (10, 1.0)
    first_of_six = levels.index(6)
    assert stages[first_of_six][1] == pytest.approx(0.01, abs=0.1) and stages[first_of_six + 10][1] == 1.0
    assert [levels[s] for s in (100, 200, 300, 400, 700)] == [
        5 + round(s / 700 * 5) for s in (100, 200, 300, 400, 700)
    ]


def constant_tokens(positions: int, items: int = 32) -> Tokens:
    """Each label always comes with the same ids: a model that reads its condition reaches zero loss."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 24, (5, positions)).astype(np.int32)
    labels = np.arange(items) % 5
    return Tokens({"ids": table[labels]}, labels.astype(np.int64))


@pytest.mark.parametrize("name", ["var-class", "llamagen-class"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_orders_learn_through_the_one_trainer(name: str, dtype: str, tmp_path: Path):
    tokenizer, model = CASES[name].build()
    torch.nn.init.normal_(model.heads["main"].out.weight, std=0.02)
    tokens = constant_tokens(tokenizer.canvas(1).revealed_at.shape[1])
    task = NextStepTask(
        Forced(tokenizer, model.generator, model.heads["main"], model.plan),
        tokens,
        tokens,
        batch_size=16,
        recipe={},
    )
    before = task.validate()["loss"]
    config = TrainConfig(steps=160, lr=5e-3, dtype=dtype, ema=0.5, validate_every=1000, checkpoint_every=1000)
    result = train(task, config, tmp_path / "run", quiet=True)
    assert result.metrics["loss"] < 0.5 * before


def test_each_epoch_takes_every_item_once():
    tokenizer, model = CASES["var-class"].build()
    tokens = constant_tokens(tokenizer.canvas(1).revealed_at.shape[1])
    parts = Forced(tokenizer, model.generator, model.heads["main"], model.plan)
    task = NextStepTask(parts, tokens, tokens, batch_size=8, recipe={})
    rows = [task._row(i, 0) for i in range(64)]
    assert sorted(rows[:32]) == list(range(32)) == sorted(rows[32:]) and rows[:32] != rows[32:]
    again = NextStepTask(parts, tokens, tokens, batch_size=8, recipe={})
    assert torch.equal(again.batch(5, 0)[0]["ids"], task.batch(5, 0)[0]["ids"])


@pytest.mark.parametrize("kind", ["tokenizer", "decoder"])
def test_a_tokenizer_training_resumed_equals_one_that_was_not_interrupted(kind: str, tmp_path: Path):
    """The codebook keeper's counts are part of a run: codes that were about to be revived still are."""

    def task():
        torch.manual_seed(0)
        conv = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8, attention=False)
        tokenizer = MultiScaleVQConfig(conv, vocab_size=64, code_channels=4, schedule=(1, 2, 4)).build()
        if kind == "decoder":
            return DecoderTask(tokenizer, open_dataset("digits"), 4, {})
        return ReconstructionTask(tokenizer, open_dataset("digits"), TokenizerLossConfig(), 4, {}, patience=4)

    config = TrainConfig(steps=9, dtype="bfloat16", validate_every=100, checkpoint_every=6, log_every=8)
    train(task(), config, tmp_path / "whole", quiet=True)
    with pytest.raises(Stopped):
        train(task(), config, tmp_path / "cut", quiet=True, on_log=lambda event: stop_at(event, 8))
    train(task(), config, tmp_path / "cut", resume=True, quiet=True)
    whole, cut = load_run(tmp_path / "whole", ema=False), load_run(tmp_path / "cut", ema=False)
    for part, state in whole.items():
        for name, value in state.items():
            assert torch.equal(value, cut[part][name]), name


class Stopped(Exception):
    pass


def stop_at(event: dict, step: int) -> None:
    if event["step"] >= step:
        raise Stopped

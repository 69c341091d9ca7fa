"""Learning from verdicts: advantages, the policy's gradient, who judges, and that it learns what is rewarded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contracts import CASES
from tests.models import tiny_pipeline
from varkit.adapt.method import Material
from varkit.adapt.reward import Reward, RewardTask, advantages
from varkit.data.real import Digits
from varkit.data.scenes import Scenes
from varkit.errors import UserError
from varkit.evaluate.judges import JUDGES, Judge, find_judge
from varkit.generators.conditioning import ClassConfig
from varkit.hub.pipeline import Pipeline, Settings, load
from varkit.hub.prompts import Prompt
from varkit.train.generator_task import Forced
from varkit.train.lessons import WholePlan
from varkit.train.loop import train
from varkit.train.task import TrainConfig
from varkit.train.tokens import Tokens


def brightness(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    assert len(images) == len(prompts)
    return images.mean(axis=(1, 2, 3)) / 255


def material(pipeline: Pipeline, batch_size: int = 12, anchor_data: int = 20) -> Material:
    images = torch.rand(anchor_data, 3, *pipeline.size) * 2 - 1
    with torch.no_grad():
        latents = pipeline.tokenizer.training_latents(images)
    arrays = {name: values.numpy() for name, values in latents.items()}
    tokens = Tokens(arrays, np.arange(anchor_data) % 3)
    parts = Forced(
        pipeline.tokenizer, pipeline.generator, pipeline.model.heads["main"], pipeline.model.plan,
        WholePlan(pipeline.tokenizer, pipeline.model.plan),  # type: ignore[arg-type]
    )  # fmt: skip
    return Material(parts, tokens, tokens, batch_size, {"method": "reward"}, start=pipeline)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> RewardTask:
    monkeypatch.setitem(JUDGES, "scenes", lambda pipeline: brightness)
    torch.manual_seed(0)
    pipeline = tiny_pipeline(ClassConfig(3), shared_modulation=False, adaln_init=1.0)
    pipeline.settings = Settings(guidance=2.0, ramp=True, temperature=(1.0, 0.5, 0.25), top_p=0.9)
    return Reward(group=3).task(material(pipeline))


def test_an_advantage_is_over_the_others_of_the_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.0, 1.0, 1.0]])
    expected = [
        [row[i] - (sum(row) - row[i]) / (len(row) - 1) for i in range(len(row))] for row in rewards.tolist()
    ]
    torch.testing.assert_close(advantages(rewards), torch.tensor(expected))
    assert not advantages(rewards)[1].any()


def test_the_gradient_is_that_of_advantage_times_log_probability(task: RewardTask):
    """At the head's bias it is the closed form: what was drawn less what was likely, by advantage."""
    latents, condition, prompts = task.batch(0, 0)
    assert len(prompts) == 4 and prompts == condition["label"].tolist()
    drawn, rewards = task.drawn(condition, prompts)
    assert rewards.shape == (4, 3) and len(drawn["ids"]) == 12
    advantage = advantages(rewards).flatten()
    advantage[4] = 0  # left out, and its group's others keep their own prompt
    loss = task.policy(drawn, condition, advantage)
    each = [stepwise(task, drawn["ids"][i : i + 1], prompts[i // 3]) for i in range(12)]
    expected = -sum(a * chance for a, (chance, _) in zip(advantage, each, strict=True)) / 12
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    slope = -sum(a * difference for a, (_, difference) in zip(advantage, each, strict=True)) / 12
    bias = task.pipeline.model.heads["main"].out.bias  # type: ignore[union-attr]
    torch.testing.assert_close(bias.grad, slope, atol=1e-7, rtol=1e-4)
    assert slope.abs().max() > 1e-4


@torch.no_grad()
def stepwise(task: RewardTask, ids: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Of one picture, as the decoding loop meets it: the mean of w log pi over its tokens, and of what each is less its
    probabilities, (V,).
    """
    pipeline = task.pipeline
    state = pipeline.start([prompt], settings=pipeline.settings)
    chances, differences = [], []
    for k, step in enumerate(task.whole.plan.steps):
        fed = state.canvas.feed(step.feed)
        h = pipeline.generator(fed, step, state.prepared, state.cache.open(step, state.cursor))
        state.cache.close()
        conditional, null = pipeline.model.heads["main"].logits(h).float()  # type: ignore[operator]
        right = ids[0, step.target]
        s, tau = 1 + k / 2, (1.0, 0.5, 0.25)[k]
        log_pi = ((s * conditional + (1 - s) * null) / tau).log_softmax(-1)
        chances.append(tau / s * log_pi.gather(-1, right[:, None])[:, 0])
        differences.append(torch.eye(log_pi.shape[-1])[right] - log_pi.exp())
        state.canvas.reveal(step, {"ids": ids[:, step.target]}, state.cursor)
        state.cursor = state.cursor + 1
    return torch.cat(chances).mean(), torch.cat(differences).mean(dim=0)


def test_where_all_of_a_group_are_alike_only_the_truth_teaches(task: RewardTask):
    task.judge = lambda images, prompts: np.ones(len(prompts))
    batch = task.batch(0, 0)
    loss, metrics = task.loss("generator", batch, 0)
    assert metrics["taught"] == 0 and metrics["reward"] == 1
    assert loss.item() == pytest.approx(0.1 * float(metrics["truth"]))
    loss.backward()


def test_drawing_follows_the_seed_and_leaves_modules_in_training(task: RewardTask):
    _, condition, prompts = task.batch(0, 0)
    for module in task.modules.values():
        module.train()
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(task.drawn(condition, prompts)[0]["ids"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert all(module.training for module in task.modules.values())


def test_the_first_steps_may_learn_alone(task: RewardTask):
    _, condition, prompts = task.batch(0, 0)
    drawn, rewards = task.drawn(condition, prompts)
    few = Reward(group=3, first=2).task(material(task.pipeline))
    other = {"ids": drawn["ids"].clone()}
    other["ids"][:, 5:] = 0  # of the last scale, 3 x 3
    advantage = advantages(rewards).flatten()
    whole, changed = (few.policy(x, condition, advantage) for x in (drawn, other))
    assert torch.equal(whole, changed)
    assert not torch.equal(task.policy(drawn, condition, advantage), task.policy(other, condition, advantage))


def test_what_is_rewarded_becomes_more_frequent(task: RewardTask, tmp_path: Path):
    before = drawn_brightness(task.pipeline)
    usual = np.median(before)
    task = Reward(group=8, anchor=0).task(material(task.pipeline, batch_size=96))
    task.judge = lambda images, prompts: (brightness(images, prompts) > usual).astype(np.float64)
    train(task, TrainConfig(steps=30, lr=1e-2, validate_every=30), tmp_path / "run")
    after = drawn_brightness(task.pipeline)
    spread = (before.var() / len(before) + after.var() / len(after)) ** 0.5
    assert after.mean() - before.mean() > 5 * spread


def drawn_brightness(pipeline: Pipeline) -> np.ndarray:
    images = pipeline.generate([0, 1, 2], n=32, seed=5, batch_size=96)
    return brightness(np.stack([np.asarray(image) for image in images]), images)  # type: ignore[arg-type]


def test_the_reader_of_scenes_judges_by_the_caption():
    judge = find_judge("scenes", load("scenes"))
    scenes = [Scenes("test", 0)[i] for i in range(12)]
    images, captions = np.stack([s.image((64, 64)) for s in scenes]), [s.caption for s in scenes]
    assert judge(images, captions).tolist() == [1] * 12
    assert judge(images[::-1], captions).sum() <= 2


def test_the_reader_of_digits_judges_by_the_label():
    judge = find_judge("digits", load("digits"))
    held_out = Digits().split("validation")
    batch = held_out.batch(range(100), (32, 32))
    assert batch.labels is not None
    labels = batch.labels.tolist()
    assert judge(batch.images, labels).mean() > 0.9
    assert judge(batch.images, [(label + 1) % 10 for label in labels]).mean() < 0.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="group is 1"):
        Reward(group=1)
    with pytest.raises(UserError, match="anchor is -1"):
        Reward(anchor=-1)
    with pytest.raises(UserError, match="unknown judge 'scene'"):
        find_judge("scene", load("digits"))
    with pytest.raises(UserError, match="takes class labels"):
        find_judge("scenes", load("digits"))
    with pytest.raises(UserError, match="takes captions"):
        find_judge("digits", load("scenes"))
    with pytest.raises(UserError, match="first is -1"):
        Reward(first=-1)
    smooth = tiny_pipeline(ClassConfig(3))
    smooth.settings = Settings(smooth=True)
    with pytest.raises(UserError, match="smooth"):
        Reward().task(material(smooth))
    masked = CASES["mar-class"].pipeline(Settings())
    parts = Forced(masked.tokenizer, masked.generator, masked.model.heads["main"], masked.model.plan)
    tokens = Tokens({"vectors": np.zeros((4, 4, 4), np.float32)}, np.zeros(4, np.int64))
    with pytest.raises(UserError, match="MaskedPlan"):
        Reward().task(Material(parts, tokens, tokens, 8, {}, start=masked))


def test_judges_are_what_they_are_called():
    made: Judge = find_judge("scenes", load("scenes"))
    assert made(np.zeros((1, 64, 64, 3), np.uint8), ["a red circle"]).shape == (1,)

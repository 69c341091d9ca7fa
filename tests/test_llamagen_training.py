"""LlamaGen trained: what guidance and size do on a toy (the sheet's check 6), and the recipe. Slow."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.contracts import CASES
from varkit.data.registry import open_dataset
from varkit.decode.loop import run
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import LlamaGenConfig
from varkit.hub.pipeline import Pipeline, Settings, load
from varkit.plans.raster import RasterConfig
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.loop import train
from varkit.train.recipes import llamagen_scenes
from varkit.train.run import Request, train_recipe
from varkit.train.task import TrainConfig
from varkit.train.tokens import Tokens

CLASSES, CODES, SIDE = 10, 16, 4


def chains() -> np.ndarray:
    """How each class goes from code to code, (10, 16, 16): mostly as all do."""
    logits = np.random.default_rng(0).normal(size=(CLASSES + 1, CODES, CODES)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return 0.7 * p[-1:] + 0.3 * p[:-1]


def drawn_by(p: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """A picture's codes (N, 16) for each label, in raster order."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, CODES, len(labels))]
    for _ in range(SIDE**2 - 1):
        rows = p[labels, ids[-1]].cumsum(-1)
        ids.append((rng.random((len(labels), 1)) > rows).sum(-1).clip(max=CODES - 1))
    return np.stack(ids, axis=1)


def accuracy(p: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> float:
    """How often the likeliest class of the codes is the one asked for: the best probe there is."""
    scores = np.log(p)[:, ids[:, :-1], ids[:, 1:]].sum(-1)
    return float((scores.argmax(0) == labels).mean())


def taught(width: int, folder: Path) -> tuple[Pipeline, np.ndarray]:
    """A model trained on the toy, and its loss on each of 2000 pictures that it has not seen."""
    p = chains()
    sets = []
    for count, seed in ((8192, 1), (2000, 2)):
        labels = np.random.default_rng(seed).integers(0, CLASSES, count)
        sets.append(Tokens({"ids": drawn_by(p, labels, seed).astype(np.int32)}, labels))
    tokenizer = replace(CASES["llamagen-class"].tokenizer, vocab_size=CODES, grid=SIDE)
    generator = LlamaGenConfig(2, width, 2, CODES, ClassConfig(CLASSES), multiple_of=16)
    configs = {"tokenizer": tokenizer, **generator.fitted(tokenizer)}
    torch.manual_seed(0)
    pipeline = Pipeline({name: c.build() for name, c in configs.items()}, configs, Settings())
    parts = Forced(pipeline.tokenizer, pipeline.generator, pipeline.model.heads["main"], pipeline.model.plan)
    task = NextStepTask(parts, *sets, 64, {})
    config = TrainConfig(steps=400, lr=5e-3, validate_every=10_000, checkpoint_every=10_000)
    train(task, config, folder, quiet=True)
    with torch.no_grad():
        latents, condition = task._take(sets[1], np.arange(2000))
        losses = task.objective.eval().losses(task.lessons.lesson(latents), condition)
    return pipeline, losses.mean(dim=1).numpy()


@pytest.mark.slow
def test_guidance_raises_class_accuracy_and_a_wider_model_predicts_better(tmp_path: Path):
    small, small_loss = taught(16, tmp_path / "small")
    _, large_loss = taught(32, tmp_path / "large")
    better = small_loss - large_loss
    assert better.mean() > 5 * better.std() / len(better) ** 0.5
    labels = np.arange(2000) % CLASSES
    found = {}
    for guidance in (1.0, 2.0):
        state = small.start(labels.tolist(), settings=Settings(guidance=guidance))
        ids = run(small.model, state).canvas.latents()["ids"].numpy()
        found[guidance] = accuracy(chains(), ids, labels)
    spread = sum(a * (1 - a) for a in found.values()) ** 0.5 / len(labels) ** 0.5
    assert found[2.0] - found[1.0] > 5 * spread, found


@pytest.mark.slow
def test_the_recipe_trains_a_text_model(tmp_path: Path):
    recipe = llamagen_scenes()
    recipe = replace(recipe, generator=replace(recipe.generator, batch_size=4, pictures=64))
    train_recipe(Request(recipe.name, steps=4), recipe, open_dataset(recipe.dataset), tmp_path / "run")
    trained = load(tmp_path / "run")
    assert trained.configs["plan"] == RasterConfig((16, 16), prefix=24)
    (picture,) = trained.generate(["a red circle"])
    assert picture.size == (64, 64)
    with pytest.raises(UserError, match="unknown word 'crimson'"):
        trained.generate(["a crimson circle"])

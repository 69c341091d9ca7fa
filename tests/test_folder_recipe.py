"""A recipe fitted to any data set: an array file with labels becomes a model of as many classes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.models import tiny_recipe
from varkit import load
from varkit.cli.main import main
from varkit.data.registry import open_dataset
from varkit.generators.conditioning import ClassConfig
from varkit.train.recipes import RECIPES, Recipe, find_recipe


def labelled(path: Path, labels: list[int]) -> str:
    """An array file of noise, 6 x 6, with these labels."""
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 6, 6, 3), np.uint8)
    np.savez(path, images=images, labels=np.array(labels))
    return str(path)


def shrunk(recipe: Recipe) -> Recipe:
    """The recipe with its three stages in parts that train in a moment; its condition and prompts stay."""
    tiny = tiny_recipe()
    tokenizer = replace(tiny.tokenizer, decoder=tiny.tokenizer.train)
    config = replace(tiny.generator.config, condition=recipe.generator.config.condition)
    generator = replace(tiny.generator, config=config)
    return replace(recipe, tokenizer=tokenizer, generator=generator)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_labelled_array_becomes_a_model_of_its_classes(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = labelled(tmp_path / "a.npz", [row % classes for row in range(12)])
    recipe, _ = find_recipe(spec)
    names = tuple(map(str, range(classes)))
    assert recipe.generator.config.condition == ClassConfig(classes, names)
    assert recipe.prompts == tuple(i % classes for i in range(8))
    tiny = shrunk(recipe)
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny)
    assert main(["train", "tiny", "--steps", "1", "--out", str(tmp_path / "run")]) == 0, (
        capsys.readouterr().err
    )
    made = load(tmp_path / "run")
    pictures = made.generate(list(names), seed=0)
    assert [picture.size for picture in pictures] == [(6, 6)] * classes


def test_an_array_without_labels_is_one_class(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 6, 6), np.uint8))
    recipe, _ = find_recipe(str(tmp_path / "a.npy"))
    assert recipe.generator.config.condition == ClassConfig(1, ("all",))
    assert open_dataset(str(tmp_path / "a.npy")).class_names is None

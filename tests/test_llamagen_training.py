"""The recipe `llamagen-scenes`, made tiny, on tiles of one colour: by the name of the colour and by a caption."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varkit import load
from varkit.cli.main import main
from varkit.generators.conditioning import ClassConfig
from varkit.generators.llamagen import LlamaGen
from varkit.generators.text import TextConfig
from varkit.plans.raster import RasterPlan
from varkit.tokenizers.patch import PatchEncoderConfig
from varkit.train.recipes import RECIPES, Recipe, llamagen_scenes

COLOURS = {"blue": (40, 80, 220), "green": (40, 160, 60), "red": (220, 40, 40), "white": (245, 245, 245)}
CAPTION = "a {} tile"
CONDITIONS = {
    "class": (ClassConfig(len(COLOURS), tuple(COLOURS)), "{}"),
    "text": (TextConfig(("a", "tile", *COLOURS), length=4, width=16, depth=1, heads=2), CAPTION),
}
"""What steers the model, and how a colour is asked for."""

SIDE, CODES = 8, 16


def tiles(folder: Path, each: int = 16) -> Path:
    """A folder for each colour of noisy tiles of it, with captions."""
    rng = np.random.default_rng(0)
    rows = []
    for colour, levels in COLOURS.items():
        (folder / colour).mkdir(parents=True)
        for i in range(each):
            noisy = np.clip(levels + rng.normal(0, 4, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            name = f"{colour}/{i:02d}.png"
            Image.fromarray(noisy).save(folder / name)
            rows.append({"file_name": name, "caption": CAPTION.format(colour)})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny(dataset: Path, condition: ClassConfig | TextConfig, prompts: tuple[str, ...]) -> Recipe:
    """The recipe with parts as small as can be, briefly trained on the tiles."""
    recipe = llamagen_scenes()
    tokenizer, generator = recipe.tokenizer, recipe.generator
    assert tokenizer.train is not None and tokenizer.decoder is not None
    codes = replace(
        tokenizer.config,  # type: ignore[type-var]
        conv=replace(tokenizer.config.conv, channels=16, latent_channels=8),  # type: ignore[attr-defined]
        vocab_size=CODES,
        grid=2,
        encoder=PatchEncoderConfig(16, 1),
    )
    network = replace(
        generator.config,  # type: ignore[type-var]
        depth=2, width=32, heads=2, vocab_size=CODES, condition=condition, multiple_of=16,
    )  # fmt: skip
    return replace(
        recipe,
        dataset=str(dataset),
        tokenizer=replace(
            tokenizer,
            config=codes,
            train=replace(tokenizer.train, steps=100),
            decoder=replace(tokenizer.decoder, steps=20),
        ),
        generator=replace(
            generator,
            config=network,
            train=replace(generator.train, steps=120, warmup=10, log_every=10),
            pictures=64,
        ),
        prompts=prompts,
    )


def losses(run: Path) -> list[float]:
    """The training's losses of the generator, in the order of its steps."""
    events = map(json.loads, (run / "generator" / "log.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if "loss" in event]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CONDITIONS))
def test_it_learns_to_draw_the_colour_asked_for(kind: str, tmp_path: Path, monkeypatch, capsys):
    condition, asking = CONDITIONS[kind]
    dataset, prompts = tiles(tmp_path / "tiles"), tuple(map(asking.format, COLOURS))
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny(dataset, condition, prompts))
    assert main(["train", "tiny", "--out", str(tmp_path / "run")]) == 0, capsys.readouterr()
    told = losses(tmp_path / "run")
    assert abs(told[0] - math.log(CODES)) < 0.3 and told[-1] < 0.5 * told[0], told

    pipeline = load(tmp_path / "run")
    assert isinstance(pipeline.generator, LlamaGen) and isinstance(pipeline.model.plan, RasterPlan)
    assert pipeline.condition == condition and pipeline.about["recipe"] == "llamagen-scenes"
    levels = np.array(list(COLOURS.values()), dtype=float)
    for number, prompt in enumerate(prompts):
        file = tmp_path / f"{number}.png"
        command = ["generate", prompt, "--model", str(tmp_path / "run"), "--out", str(file)]
        assert main(command) == 0, capsys.readouterr()
        picture = np.asarray(Image.open(file), dtype=float)
        assert picture.shape == (SIDE, SIDE, 3)
        assert np.linalg.norm(levels - picture.mean(axis=(0, 1)), axis=1).argmin() == number

"""Any pictures made into a model by any system: `varkit train PICTURES --system NAME`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import models
from tests.models import tiny_recipe
from varkit import load
from varkit.adapt.run import source_of
from varkit.catalog.registry import find
from varkit.cli.main import main
from varkit.data.registry import open_dataset
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.hmar import HMARConfig
from varkit.generators.text import TextConfig
from varkit.generators.var import VARConfig
from varkit.plans.scales import ScalesConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.recipes import RECIPES, Recipe, digit_scales, find_recipe, folder_recipe, recipe, scenes
from varkit.train.recipes.m_var import parameters
from varkit.train.recipes.systems import SYSTEMS, of_system

RATIOS = {"llamagen": (0.8, 1.1), "mar": (0.65, 0.95), "hmar": (1.3, 1.6), "flexvar": (0.95, 1.1)}
"""Parameters to the base's, where they differ: no cross-attention, no modulation, half the blocks twice, a table."""

SIDES, SIDE = (1, 2, 3, 4), 8


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve captioned pictures."""
    root, rng = tmp_path / "pictures", np.random.default_rng(0)
    root.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text("a red circle")
    return root


@pytest.fixture
def captioned(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe by VAR, known as `tiny`, over the captioned pictures."""
    base = tiny_recipe()
    conv = ConvConfig(8, (1, 2), res_blocks=1, latent_channels=8, attention=False, groups=4)
    text = TextConfig(models.WORDS, length=8, width=16, depth=1)
    made = replace(
        base,
        name="tiny",
        dataset=str(pictures),
        tokenizer=replace(base.tokenizer, config=MultiScaleVQConfig(conv, 16, 4, SIDES)),
        generator=replace(base.generator, config=VARConfig(2, 32, 4, SIDES, 4, text, reach=1), batch_size=4),
        prompts=("a red circle", "a blue square"),
    )
    monkeypatch.setitem(RECIPES, "tiny", lambda: made)
    return made


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_family_is_made_of_the_same_pictures(system: str, captioned: Recipe, tmp_path: Path, capsys):
    out = str(tmp_path / "run")
    command = ["train", "tiny", "--system", system, "--steps", "2", "--out", out]
    assert main(command) == 0, capsys.readouterr().err
    made = load(out)
    assert made.about["recipe"] == f"tiny-{system}" and made.about["request"]["system"] == system
    assert type(made.configs["generator"]) is type(of_system(captioned, system).generator.config)
    (picture,) = made.generate("a red circle", seed=0)
    assert picture.size == (SIDE, SIDE)
    assert source_of(made, None) == ("tiny", system) and source_of(made, "digits") == ("digits", None)
    assert main([*command[:2], *command[4:], "--resume"]) == 2
    assert f"system (was '{system}', now None)" in capsys.readouterr().err


@pytest.mark.parametrize("system", ["flexvar", "hmar", "m-var", "mvar-markov", "nfig"])
def test_it_goes_on_as_the_family_it_is(system: str, captioned: Recipe, tmp_path: Path, capsys):
    run, further = str(tmp_path / "run"), tmp_path / "further"
    assert main(["train", "tiny", "--system", system, "--steps", "2", "--out", run]) == 0
    assert main(["adapt", "sar", run, "--steps", "2", "--out", str(further)]) == 0, capsys.readouterr().err
    told = json.dumps(json.loads((further / "generator" / "config.json").read_text()))
    own = {"flexvar": "ScheduleLessons", "hmar": "FirstGuesses"}.get(system, "WholePlan")
    assert f'"kind": "{own}"' in told
    (picture,) = load(further).generate("a red circle", seed=0)
    assert picture.size == (SIDE, SIDE)


@pytest.mark.parametrize(
    "base", [digit_scales, scenes, lambda: folder_recipe("digits", open_dataset("digits"))]
)
@pytest.mark.parametrize("system", SYSTEMS)
def test_sizes_and_lengths_are_the_bases(system: str, base):
    own = base()
    if system == "infinity" and isinstance(own.generator.config.condition, ClassConfig):
        with pytest.raises(UserError, match="have no captions"):
            of_system(own, system)
        return
    made = of_system(own, system)
    assert find(system).name == system and made.dataset == own.dataset and made.prompts == own.prompts
    ratio = parameters(made.generator.config) / parameters(own.generator.config)
    least, most = RATIOS.get(system, (0.95, 1.05))
    assert least < ratio < most, ratio
    stages = [made.generator.train] + ([made.generator.further.train] if made.generator.further else [])
    for unit in ("steps", "minutes"):
        whole = getattr(own.generator.train, unit)
        parts = [getattr(stage, unit) for stage in stages]
        assert parts == [None] * len(parts) if whole is None else sum(parts) == pytest.approx(whole, abs=1)


@pytest.mark.parametrize(
    ("raster", "base"),
    [("digit-grid", "digit-scales"), ("digits-raster", "digits"), ("llamagen-scenes", "scenes-small")],
)
def test_raster_orders_recipes_have_the_parameters_of_their_base(raster: str, base: str):
    def size(name: str) -> int:
        part = RECIPES[name]()
        fitted = part.generator.config.fitted(part.tokenizer.config)  # type: ignore[arg-type]
        return sum(parameters(fitted[kind]) for kind in ("generator", "head"))

    assert size(raster) / size(base) == pytest.approx(1, abs=0.07)


def test_configurations_follow_the_base():
    base = scenes()
    assert of_system(base, "var") == replace(base, name="scenes-var")
    hmar = of_system(base, "hmar").generator.config
    assert isinstance(hmar, HMARConfig) and hmar.mask_depth == 4 and hmar.reach == 0
    plan = of_system(base, "mvar-markov").generator.parts["plan"]
    assert isinstance(plan, ScalesConfig) and plan.history == 0 and plan.windows is not None
    assert (plan.windows.side, plan.windows.least) == (5, 6)
    for system in ("llamagen", "infinity", "mar", "flexvar"):
        assert of_system(base, system).generator.settings.temperature == 1.0, (
            "a list is for the base's scales"
        )
    assert of_system(base, "flexvar").tokenizer.decoder is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["digits", "--system", "hmarr"], "unknown system 'hmarr'; did you mean 'hmar'"),
        (["digits-raster", "--system", "hmar"], "the recipe 'digits-raster' has a system of its own"),
        (["digits", "--system", "infinity"], "the pictures of 'digits' have no captions"),
        (["features", "--system", "hmar"], "--system is for models"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words: list[str], line: str, tmp_path: Path, capsys):
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_help_and_pages_name_every_system(capsys):
    assert main(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    words = re.findall(r"[\w-]+", told[told.index("--system") :])
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    assert set(SYSTEMS) <= set(words) and all(f"`{name}`" in page for name in SYSTEMS)


def test_a_share_of_a_training():
    train = digit_scales().generator.train
    assert recipe.part_of(train, 1 / 3).steps == 400
    minutes = replace(train, steps=None, minutes=9.0)
    assert recipe.part_of(minutes, 1 / 3).minutes == pytest.approx(3)
    assert find_recipe("digits", "nfig")[0].name == "digits-nfig"

"""Post-training: a trained model goes on by a method, from Python, the command line and experiments."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import models
from tests.contracts import CASES, true_latents
from tests.models import tiny_pipeline, tiny_recipe
from tests.test_reward import brightness
from varkit import load
from varkit.adapt.exposure import exposure
from varkit.adapt.finetune import Finetune
from varkit.adapt.lessons import lessons_for
from varkit.adapt.registry import METHODS, find_method, name_of
from varkit.adapt.run import check_condition, follow_up, source_of, steps_behind
from varkit.adapt.sar import SAR
from varkit.catalog.models import Store, Trained
from varkit.cli.adapt import Adapt
from varkit.cli.main import main
from varkit.data.registry import open_dataset
from varkit.errors import UserError
from varkit.evaluate.judges import JUDGES
from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.map_vq import MapVQConfig
from varkit.train.lessons import WholePlan
from varkit.train.masked_lessons import MaskedLessons
from varkit.train.recipes import RECIPES, GeneratorRecipe, Recipe, find_recipe, folder
from varkit.train.schedule_lessons import ScheduleLessons
from varkit.train.self_correction import SelfCorrection
from varkit.train.tokens import Tokens, no_more_than_seen

class_model = models.class_model


@pytest.fixture(autouse=True)
def bright(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pictures too small for a reader, brightness is rewarded."""
    monkeypatch.setitem(JUDGES, "scenes", lambda pipeline: brightness)


@pytest.fixture
def few(tmp_path: Path) -> Recipe:
    """The recipe of tiny digits over forty pictures, which are encoded at once."""
    images = np.random.default_rng(0).integers(0, 255, (40, 6, 6, 3), np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=np.arange(40) % 10)
    return replace(tiny_recipe(), dataset=str(tmp_path / "few.npz"))


@pytest.fixture
def tiny(few: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model of tiny digits that knows its recipe, `tiny`."""
    monkeypatch.setitem(RECIPES, "tiny", lambda: few)
    pipeline = tiny_pipeline(ClassConfig(10))
    pipeline.about = {"recipe": "tiny", "request": {"recipe": "tiny"}, "steps": 36}
    pipeline.save(tmp_path / "start")
    return tmp_path / "start"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    pipeline = load(folder)
    return {f"{n}.{k}": v for n in ("generator", "head") for k, v in pipeline.parts[n].state_dict().items()}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_goes_on_with_a_model(name: str, tiny: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    assert main(["adapt", name, str(tiny), "--out", str(out), "--seed", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "model")
    before, after = weights(tiny), weights(out)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    made, start = load(out), load(tiny)
    same = made.tokenizer.state_dict()
    assert all(torch.equal(v, same[k]) for k, v in start.tokenizer.state_dict().items())
    assert made.about["steps"] == max(1, round(36 * find_method(name).share))
    assert made.about["start"]["steps"] == 36 and steps_behind(made.about) == 36
    assert made.about["request"]["method"] == name and made.about["request"]["seed"] == 3
    assert len(made.generate([0, 1], seed=0)) == 2
    assert list((out / "generator" / "samples").iterdir())
    assert f"{name} (" in (Adapt.__doc__ or "")


def test_a_run_resumes_with_the_same_settings_alone(tiny: Path, tmp_path: Path, capsys):
    words = ["adapt", "sar", str(tiny), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert main([*words, "--gamma", "0.1"]) == 0
    once = weights(tmp_path / "run")
    assert main([*words, "--gamma", "0.1"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main([*words, "--gamma", "0.2", "--resume"]) == 2
    assert "started with other settings: settings" in capsys.readouterr().err
    assert main([*words, "--gamma", "0.1", "--resume"]) == 0
    again = weights(tmp_path / "run")
    assert all(torch.equal(once[k], again[k]) for k in once)
    told = json.loads((tmp_path / "run" / "request.json").read_text())
    assert told["settings"]["gamma"] == 0.1 and told["start"] == str(tiny)


def test_batch_and_pictures_may_be_told(tiny: Path, tmp_path: Path):
    words = ["--steps", "1", "--batch", "2", "--pictures", "60"]
    assert main(["adapt", "finetune", str(tiny), "--out", str(tmp_path / "run"), *words]) == 0
    told = json.loads((tmp_path / "run" / "generator" / "config.json").read_text())
    assert '"batch_size": 2' in json.dumps(told) and '"pictures": 60' in json.dumps(told)


def test_of_an_endless_set_no_more_pictures_are_encoded_than_are_seen():
    scenes, digits = open_dataset("scenes"), open_dataset("digits")
    assert no_more_than_seen(scenes, 400, steps=3, batch_size=8) == 24
    assert no_more_than_seen(scenes, 10, steps=3, batch_size=8) == 10
    assert no_more_than_seen(scenes, 400, steps=None, batch_size=8) == 400
    assert no_more_than_seen(digits, 400, steps=3, batch_size=8) == 400


def test_a_model_of_other_pictures_is_told_by_name(tiny: Path, class_model: Path, tmp_path: Path, capsys):
    out = str(tmp_path / "run")
    assert main(["adapt", "finetune", str(class_model), "--out", out]) == 2
    assert "does not say what it was trained on" in capsys.readouterr().err
    assert main(["adapt", "finetune", str(class_model), "--data", "tiny", "--out", out]) == 2
    assert "does not say how long it was trained" in capsys.readouterr().err
    assert main(["adapt", "finetune", str(class_model), "--data", "tiny", "--out", out, "--steps", "1"]) == 2
    assert "have the label 9, and this model knows 3 classes" in capsys.readouterr().err
    assert main(["adapt", "finetune", str(tiny), "--out", out, "--lr", "2"]) == 2
    assert "--lr is 2.0" in capsys.readouterr().err
    assert main(["adapt", "finetune", str(tiny), "--out", out, "--batch", "0"]) == 2
    assert "--batch is 0" in capsys.readouterr().err
    with pytest.raises(UserError, match="captions"):
        check_condition(TextConfig(("a",)), Tokens({"ids": torch.zeros(1, 2).numpy()}), "digits")


@pytest.fixture
def flexvar(tmp_path: Path) -> Path:
    """The folder of a FlexVAR with random weights; its maps go up to 4 x 4."""
    conv = ConvConfig(8, (1, 2), res_blocks=1, latent_channels=8, attention=False, groups=4)
    tokenizer = MapVQConfig(conv, 24, 6, (1, 2, 3, 4))
    generator = FlexVARConfig(2, 24, 2, 6, ClassConfig(10), table=8, adaln_init=1.0)
    configs = {"tokenizer": tokenizer} | generator.fitted(tokenizer)
    torch.manual_seed(0)
    parts = {name: config.build() for name, config in configs.items()}
    Pipeline(parts, configs, Settings(), {"steps": 36}).save(tmp_path / "flexvar")
    return tmp_path / "flexvar"


def brief(recipe: Recipe) -> Recipe:
    """A recipe's own kind of model and lessons, over few pictures and in small batches."""
    return replace(recipe, generator=replace(recipe.generator, pictures=40, batch_size=4))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_flexvar_goes_on_with_pictures_that_are_no_recipe_of_its_own(
    name: str, flexvar: Path, few: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its pictures are encoded at every grid, so lessons for one schedule would take wrong tokens."""
    monkeypatch.setattr(folder, "GeneratorRecipe", partial(GeneratorRecipe, batch_size=4))
    out = tmp_path / "run"
    assert main(["adapt", name, str(flexvar), "--data", few.dataset, "--steps", "2", "--out", str(out)]) == 0
    told = json.loads((out / "generator" / "config.json").read_text())
    assert "ScheduleLessons" in json.dumps(told)
    start = load(flexvar)
    lessons = lessons_for(start, find_recipe(few.dataset)[0])
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    lesson = lessons.lesson(start.tokenizer.training_latents(images))
    assert torch.equal(lesson.targets["ids"], start.tokenizer.encode(images)["ids"])


def test_another_model_goes_on_with_the_pictures_of_flexvars_recipe(
    tiny: Path, few: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = replace(brief(RECIPES["flexvar-digits"]()), dataset=few.dataset)
    monkeypatch.setitem(RECIPES, "flexvar-digits", lambda: recipe)
    out = tmp_path / "run"
    words = ["adapt", "sar", str(tiny), "--data", "flexvar-digits", "--steps", "2", "--out", str(out)]
    assert main(words) == 0
    assert type(lessons_for(load(tiny), recipe)) is WholePlan


def test_lessons_are_the_recipes_where_they_fit_and_the_models_otherwise(flexvar: Path, tiny: Path):
    own = RECIPES["flexvar-digits"]()
    lessons = lessons_for(load(flexvar), own)
    assert isinstance(lessons, ScheduleLessons) and lessons.others == ()  # validated up to 8, this model to 4
    tried = replace(own, generator=replace(own.generator, teach=partial(ScheduleLessons, others=((1, 4),))))
    assert lessons_for(load(flexvar), tried).others == ((1, 4),)
    for kind, found in (
        ("infinity-text", SelfCorrection),
        ("mar-class", MaskedLessons),
        ("llamagen-class", WholePlan),
    ):
        pipeline = CASES[kind].pipeline(Settings())
        assert type(lessons_for(pipeline, own)) is found
    raster = load(tiny)
    raster.model = replace(raster.model, plan=None)
    with pytest.raises(UserError, match="cannot be taught pictures of other recipes"):
        lessons_for(raster, own)


def test_mistakes_on_the_command_line_are_one_line(capsys):
    for words, line in (
        (["adapt"], "missing: MODEL, --out PATH"),
        (["adapt", "sra", "digits"], "unknown method 'sra'; did you mean 'sar'?"),
        (["adapt", "--out", "x", "digits"], "no method is named before 'digits'"),
        (["adapt", "sar", "digits", "--out", "x", "--gama", "1"], "did you mean '--gamma'"),
        (["adapt", "sar", "digits", "--out", "x", "--target", "hard"], "invalid choice 'hard'"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1
    assert main(["adapt", "sar", "--help"]) == 0
    assert "--gamma" in capsys.readouterr().out


def test_a_follow_up_takes_its_share_of_rate_and_steps():
    recipe, method = tiny_recipe(), SAR()
    short = follow_up(recipe, method, 180)
    assert short.generator.train.steps == 10 and short.generator.train.minutes is None
    assert short.generator.train.lr == pytest.approx(0.1 * recipe.generator.train.lr)
    assert short.name == "tiny-sar" and name_of(method) == "sar"
    assert follow_up(recipe, Finetune(), None).generator.train.steps is None


def test_the_source_is_what_was_asked_for_or_what_the_model_says(tiny: Path):
    assert source_of(load(tiny), None) == ("tiny", None)
    assert source_of(load(tiny), "scenes") == ("scenes", None)


def test_experiments_train_a_model_from_a_trained_one_and_share_it(few: Recipe, tmp_path: Path):
    store, base = Store(tmp_path), Trained(few)
    recipe = replace(few, name="tiny-after")
    arms = [Trained(recipe, 0, start=base, method=method) for method in (Finetune(), SAR(), SAR(gamma=1.0))]
    second = Trained(recipe, 0, start=arms[0], method=SAR())
    assert len({model.address for model in (base, second, *arms)}) == 5
    assert store.missing([second]) == [base, arms[0], second]
    tiny_pipeline(ClassConfig(10)).save(store.run(base) / "model")
    assert store.missing([arms[1]]) == [arms[1]]
    store.train(arms[1], lambda text: None)
    assert not store.missing([arms[1]])
    made = store.load(arms[1])
    assert made.about["request"]["start"] == base.address
    shared = store.load(base).tokenizer.state_dict()
    assert all(torch.equal(v, shared[k]) for k, v in made.tokenizer.state_dict().items())


def test_addresses_of_plain_models_do_not_know_of_starts():
    """A model trained before there were post-trainings is found again."""
    assert Trained(tiny_recipe()).address == Trained(tiny_recipe(), start=None, method=None).address
    with pytest.raises(AssertionError):
        Trained(tiny_recipe(), method=Finetune())


@pytest.mark.parametrize("name", ["var-class", "infinity-text"])
def test_exposure_is_nothing_at_the_first_scale_and_for_a_model_that_is_always_right(name: str):
    case = CASES[name]
    tokenizer, model = case.build()
    lesson = WholePlan(tokenizer, model.plan).lesson(true_latents(tokenizer, model, 3))
    condition = {k: v[0] for k, v in case.conditions(3).items()}
    head = model.heads["main"]
    found = exposure(model.generator, head, lesson, condition)
    assert found.gaps[0] == 0 and len(found.gaps) == len(model.plan.steps)
    assert all(gap != 0 for gap in found.gaps[1:])
    total = sum(gap * size for gap, size in zip(found.gaps, found.sizes, strict=True))
    assert found.gap == pytest.approx(total / sum(found.sizes[1:]))

    def right(generator, head, lesson, condition, h):
        return {k: v[:, lesson.step.target] for k, v in lesson.targets.items()}

    sure = exposure(model.generator, head, lesson, condition, right)  # type: ignore[arg-type]
    assert sure.gaps == (0.0,) * len(found.gaps) and sure.teacher == found.teacher

"""docs/adding-a-method.md, built: its files are written as it says, and its experiment runs, trained for a moment."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contracts import CASES, start, true_latents
from tests.test_contracts import force
from varkit.catalog import harness
from varkit.catalog.models import Store
from varkit.catalog.registry import read_record
from varkit.catalog.standing import is_defined
from varkit.hub import registry
from varkit.train.task import TrainConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-a-method.md"
BLOCK = re.compile(r"^```\w+\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r'^"(\w+)": "([\w.:]+)",$', re.MULTILINE)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files, its module importable and its part registered."""
    text = PAGE.read_text(encoding="utf-8")
    for name, block in BLOCK.findall(text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block, encoding="utf-8")
    ((name, target),) = LINE.findall(text)
    monkeypatch.setitem(registry.PARTS, name, target)
    module_name = target.partition(":")[0]
    spec = importlib.util.spec_from_file_location(
        module_name, tmp_path / f"{module_name.replace('.', '/')}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module_name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(harness, "experiments_folder", lambda: tmp_path / "experiments")
    return tmp_path


def test_the_order_keeps_the_contract(page: Path) -> None:
    config = registry.config_type("diagonal")((3, 4))
    case = replace(CASES["llamagen-class"], plan=config)
    tokenizer, model = case.build(torch.float64)
    assert registry.type_name(config) == "diagonal"
    assert len(model.plan.steps) == 6  # type: ignore[attr-defined]
    latents = true_latents(tokenizer, model, 2)
    first = force(model, start(tokenizer, model, case.conditions(2)), latents)
    again = force(model, start(tokenizer, model, case.conditions(2)), latents)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_record_is_valid(page: Path) -> None:
    record = read_record(page / "varkit" / "catalog" / "systems" / "diagonal.toml")
    assert record.family == "token" and record.claims[0].value == "7"
    assert not is_defined("varkit.plans.nothing:Nothing")


def test_the_experiment_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = harness.find_experiment("diagonal")
    (part,) = experiment.parts

    def briefly(model):
        stages = (model.recipe.tokenizer, model.recipe.generator)
        tokenizer, generator = (
            replace(stage, train=TrainConfig(minutes=1e-3), batch_size=4) for stage in stages
        )
        return replace(
            model, recipe=replace(model.recipe, tokenizer=tokenizer, generator=replace(generator, pictures=8))
        )

    arms = tuple(replace(arm, model=lambda seed, arm=arm: briefly(arm.model(seed))) for arm in part.arms)
    experiment = replace(experiment, parts=(replace(part, arms=arms),))
    store = Store(page / "cache")
    harness.prepare(experiment, store, 1, train=True, say=lambda text: None)
    result = harness.reproduce(experiment, store, page / "out", seeds=1)
    measured = result["parts"][0]["arms"]
    assert (
        measured["diagonal"]["evaluations"]["mean"] == 7 and measured["raster"]["evaluations"]["mean"] == 16
    )
    assert measured["diagonal"]["parameters"] == measured["raster"]["parameters"]
    assert (page / "out" / "diagonal.json").is_file()

"""Models that cannot be: damaged, of parts that do not belong together, or without what they read."""

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import failing, models, text_models
from tests.contracts import CASES
from tests.failing import Fails
from varkit.errors import UserError
from varkit.heads.bits import BitsConfig
from varkit.heads.categorical import CategoricalConfig
from varkit.heads.diffusion import DiffusionConfig
from varkit.hub.embeddings import save_embeddings
from varkit.hub.pipeline import WEIGHTS, Pipeline, Settings, bundled
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.plans.masked import MaskedConfig
from varkit.plans.raster import RasterConfig
from varkit.plans.ratios import scales
from varkit.plans.refined import RefinedConfig
from varkit.plans.scales import ScalesConfig

class_model, text_model = models.class_model, models.text_model
here, fails = failing.here, failing.fails


@pytest.fixture
def model(class_model: Path, here: Path) -> Path:
    """A copy of the class model, to be damaged."""
    return Path(shutil.copytree(class_model, here / "model"))


def edit_config(model: Path, *keys: str, value: object) -> None:
    whole = json.loads((model / "config.json").read_text())
    put(whole, keys, value)
    (model / "config.json").write_text(json.dumps(whole))


def put(inner: Any, keys: tuple, value: object) -> None:
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value


def edit_weights(model: Path, part: str, change: Callable[[dict], object]) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(model / f"{part}.safetensors").items()}
    change(state)
    save_file(state, model / f"{part}.safetensors")


def test_models_that_are_not_there(fails: Fails, here: Path, text_model: Path) -> None:
    assert "unknown model 'scense'" in fails("generate", "a", "--model", "scense")
    assert "unknown model" in fails("generate", "a", "--model", here / "nowhere")
    (here / "empty").mkdir()
    assert "has no config.json" in fails("generate", "a", "--model", here / "empty")
    (here / "file").write_text("x")
    assert "unknown model" in fails("generate", "a", "--model", here / "file")


def test_a_training_that_has_not_finished(fails: Fails, here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "request.json").write_text("{}")
    assert "has made no model yet; go on with" in fails("generate", "a", "--model", here / "run")


def test_missing_and_foreign_checkpoints(fails: Fails, model: Path) -> None:
    file = model / "generator.safetensors"
    file.unlink()
    assert f"there is no file '{file}'" in fails("generate", "--label", 0, "--model", model)
    torch.save({"w": torch.zeros(1)}, file)
    assert "varkit convert" in fails("generate", "--label", 0, "--model", model)
    file.write_bytes(b"<html>404</html>")
    assert "is damaged or not safetensors" in fails("generate", "--label", 0, "--model", model)
    save_file({"lm_head.weight": torch.zeros(2)}, file)
    line = fails("generate", "--label", 0, "--model", model)
    assert "missing start (1, 32)" in line and "more" in line
    (model / "config.json").write_text('{"architectures": ["T5"]}')
    assert "not a varkit model: it has architectures" in fails("generate", "--label", 0, "--model", model)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (["type"], "VARR", "unknown part type 'VARR'; did you mean 'VAR'"),
        (["type"], "LlamaGen", "unknown field"),
        (["config", "depth"], 0, "depth 0 is below 1"),
        (["config", "depth"], "two", "generator.config.depth is 'two'; it must be an integer"),
        (["config", "depth"], 10**9, "more weights than generator.safetensors holds"),
        (["config", "width"], 64, "should be"),
        (["config", "width"], 0, "width is 0; it must be at least 1"),
        (["config", "width"], 10**7, "its largest size is width, 10000000"),
        (["config", "width"], 10**30, "its largest size is width, 1000"),
        (["config", "heads"], 0, "heads is 0; it must be at least 1"),
        (["config", "mlp_ratio"], -1, "mlp_ratio is -1.0; it must be above 0"),
        (["config", "condition", "names"], ["cat"], "names has 1 entries; it must have 3"),
        (["config", "condition", "type"], "ImageConfig", "unknown type 'ImageConfig'"),
    ],
)
def test_wrong_architecture(fails: Fails, model: Path, keys: list[str], value: object, says: str) -> None:
    edit_config(model, "parts", "generator", *keys, value=value)
    assert says in fails("generate", "--label", 0, "--model", model)


OTHERS = {"var": "var-class", "llamagen": "llamagen-class", "mar": "mar-class", "infinity": "infinity-text"}
"""Models of several families, by their cases."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, by their names in `OTHERS`."""
    folder = tmp_path_factory.mktemp("families")
    for name, case in OTHERS.items():
        CASES[case].pipeline(Settings(guidance=2.0)).save(folder / name)
    return folder


@pytest.mark.parametrize("part", ["tokenizer", "generator"])
@pytest.mark.parametrize("own", OTHERS)
@pytest.mark.parametrize("other", OTHERS)
def test_parts_of_two_families(
    fails: Fails, families: Path, here: Path, own: str, other: str, part: str
) -> None:
    """The weights of another family's part, first alone, then with what the configuration says of them."""
    if own == other:
        return
    mixed = Path(shutil.copytree(families / own, here / "mixed"))
    shutil.copy(families / other / f"{part}.safetensors", mixed)
    asked = ["a red ring"] if own == "infinity" else ["--label", 1]
    generate = ("generate", *asked, "--model", mixed, "--out", "new.png")
    assert f"{part}.safetensors' does not fit its configuration: " in fails(*generate)
    entry = json.loads((families / other / "config.json").read_text())["parts"][part]
    edit_config(mixed, "parts", part, value=entry)
    line = fails(*generate)
    assert f"'{mixed / 'config.json'}': " in line and "take generator and tokenizer from one model" in line


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("var", {"code_channels": 8}, "code_width of the generator is 6 and would be 8 for its tokenizer"),
        ("var", {"schedule": (1, 2, 3)}, "schedule of the generator is ((1, 1), (2, 2), (2, 3), (4, 6))"),
        ("llamagen", {"vocab_size": 32}, "vocab_size of the generator is 24 and would be 32"),
    ],
)
def test_parts_of_two_models_of_a_family(
    fails: Fails, here: Path, name: str, changes: dict[str, Any], says: str
) -> None:
    case = CASES[OTHERS[name]]
    replace(case, tokenizer=replace(case.tokenizer, **changes)).pipeline(Settings()).save(here / "mixed")  # type: ignore[type-var]
    assert says in fails("generate", "--label", 1, "--model", "mixed")


PYRAMID = ((1, 1), (2, 2), (2, 3), (4, 6))


@pytest.mark.parametrize(
    ("case", "part", "other", "says"),
    [
        ("var-class", "plan", ScalesConfig((1, 2)), f"schedule of the plan is ((1, 1), (2, 2)) and would be {PYRAMID}"),
        ("var-class", "plan", ScalesConfig((*PYRAMID, (4, 6))), f"(4, 6), (4, 6)) and would be {PYRAMID}"),
        ("var-class", "plan", RasterConfig((4, 6)), "kind of the plan is raster and would be scales"),
        ("var-class", "plan", RefinedConfig(PYRAMID), "kind of the plan is refined and would be scales"),
        ("var-class", "head", CategoricalConfig(24, 32), "vocab_size of the head is 32 and would be 24"),
        ("var-class", "head", CategoricalConfig(32, 24), "width of the head is 32 and would be 24"),
        ("var-class", "head", BitsConfig(24, 6), "kind of the head is BitsHead and would be CategoricalHead"),
        ("hmar-refined", "plan", RefinedConfig((1, 2)), "schedule of the plan is"),
        ("hmar-refined", "head_mask", CategoricalConfig(24, 32), "vocab_size of the head_mask is 32"),
        ("flexvar-class", "plan", ScalesConfig(PYRAMID), "kind of the plan is scales and would be flexible-scales"),
        ("infinity-text", "plan", ScalesConfig((1,) * 16), "scales of the plan is 16 and would be at most 15"),
        ("llamagen-text", "plan", RasterConfig((3, 5), prefix=8), "grid of the plan is (3, 5) and would be (3, 4)"),
        ("llamagen-text", "plan", RasterConfig((3, 4), prefix=7), "prefix of the plan is 7 and would be 8"),
        ("pixelcnn-class", "head", CategoricalConfig(8, 256), "kind of the head is CategoricalHead"),
        ("mar-class", "plan", MaskedConfig((2, 4), 5, prefix=8), "grid of the plan is (2, 4) and would be (3, 4)"),
        ("mar-class", "head", DiffusionConfig(24, 4), "channels of the head is 4 and would be 8"),
    ],
)  # fmt: skip
def test_a_plan_or_head_of_another_model(
    fails: Fails, here: Path, case: str, part: str, other: Any, says: str
) -> None:
    pipeline = CASES[case].pipeline(Settings())
    pipeline.swapped({part: other.build()}, {part: other}).save(here / "mixed")
    line = fails("generate", "--label", 1, "--model", "mixed")
    assert says in line and "take tokenizer, generator, plan and heads from one model" in line


def test_a_model_without_a_head_of_its_plan(fails: Fails, here: Path) -> None:
    pipeline = CASES["hmar-refined"].pipeline(Settings())
    del pipeline.parts["head_mask"]
    pipeline.save(here / "headless")
    assert "the part head_mask is missing" in fails("generate", "--label", 1, "--model", "headless")


@pytest.mark.parametrize(
    ("case", "plan"),
    [
        ("var-class", ScalesConfig([list(side) for side in PYRAMID], history=0)),  # as JSON writes it
        ("hmar-refined", RefinedConfig(PYRAMID, guided=True)),
        ("flexvar-class", FlexibleScalesConfig((1, 3, 5))),
        ("infinity-text", ScalesConfig((1, 3, 5), frame=(64, 64), ratios=True)),
        ("mar-class", MaskedConfig((3, 4), 2, prefix=8, order="raster")),
    ],
)
def test_plans_that_a_generator_takes_as_well(here: Path, case: str, plan: Any) -> None:
    CASES[case].pipeline(Settings()).over(plan).save(here / "model")
    assert Pipeline.from_folder(here / "model").configs["plan"] == plan


FUZZED = (*bundled(), "flexvar-text", "hmar-refined", "infinity-text", "llamagen-text", "m-var-class", "mar-text",
          "pixelcnn-class")  # fmt: skip
"""Bundled models, and cases of the other families."""


@pytest.mark.parametrize("name", FUZZED)
def test_numbers_that_no_model_has(here: Path, name: str) -> None:
    """Each number of config.json at 0 and below it: the model opens or says what is wrong."""
    model = here / "model"
    if name in CASES:
        CASES[name].pipeline(Settings()).save(model)
    else:
        shutil.copytree(WEIGHTS / name, model)
    parts = json.loads((model / "config.json").read_text())["parts"]
    refused = 0
    for keys in numbers(parts):
        for value in (0, -1):
            changed = copy.deepcopy(parts)
            put(changed, keys, value)
            (model / "config.json").write_text(json.dumps({"format_version": 1, "parts": changed}))
            try:
                Pipeline.from_folder(model)
            except UserError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{keys} at {value}: {error!r}") from error
    assert refused > len(parts)


def numbers(inner: Any) -> Iterator[tuple]:
    """The keys to the numbers in nested dicts and lists, of a list to those of its first item."""
    if type(inner) in (int, float):
        yield ()
    elif isinstance(inner, dict | list):
        for key, value in inner.items() if isinstance(inner, dict) else [*enumerate(inner)][:1]:
            yield from ((key, *rest) for rest in numbers(value))


@pytest.mark.filterwarnings("error:Detected pickle protocol")  # it would be a second line
def test_weights_that_run_code_or_were_cut(fails: Fails, model: Path, here: Path) -> None:
    file, generate = model / "generator.safetensors", ("generate", "--label", 0, "--model", model)
    whole = file.read_bytes()
    for cut in (0, 7, 8, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert "is damaged or not safetensors" in fails(*generate), cut
    evil = pickle.dumps(Evil(here / "ran"))
    file.write_bytes(evil)
    assert "is a pickled checkpoint under a safetensors name" in fails(*generate)
    (here / "evil.pth").write_bytes(evil)
    assert "'evil.pth'" in fails("convert", "evil.pth", "--out", "new")
    np.save(here / "evil.npy", np.array([Evil(here / "ran")] * 4, dtype=object), allow_pickle=True)
    assert "damaged or pickled objects; write numbers" in fails("train", "evil.npy", "--out", "new")
    assert not (here / "ran").exists() and not (here / "new").exists()


class Evil:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_settings_that_no_sampler_takes(fails: Fails, model: Path) -> None:
    edit_config(model, "defaults", "top_p", value=3.0)
    assert "top-p 3.0 is outside 0 to 1" in fails("generate", "--label", 0, "--model", model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("position"), "missing position (14, 32)"),
        (lambda s: s.update(positoin=s.pop("position")), "missing position (14, 32) (nearest: positoin (14, 32))"),
        (lambda s: s.update(more=torch.zeros(2)), "unexpected more (2,)"),
        (lambda s: s.update(position=torch.zeros(15, 32)), "position (15, 32) should be (14, 32)"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit(fails: Fails, model: Path, change: Callable, says: str) -> None:
    edit_weights(model, "generator", change)
    assert says in fails("generate", "--label", 0, "--model", model)


# What a model reads, and what it makes


def test_features_that_are_missing_or_do_not_fit(fails: Fails, here: Path) -> None:
    text_models.infinity().save(here / "features")
    model = ("generate", "a red circle", "--model", "features")
    assert "give --text-encoder or --embeddings" in fails(*model)
    assert "this model takes features of a text encoder" in fails("evaluate", "features", "--suite", "scenes")
    save_embeddings(here / "narrow.safetensors", {"a red circle": torch.ones(3, 16)})
    line = fails(*model, "--embeddings", "narrow.safetensors")
    assert "features of 16 channels do not fit this model, which takes 32; use the text encoder" in line
    for suffix in (".npz", ".safetensors"):
        save_embeddings(here / f"cut{suffix}", {"a red circle": torch.ones(3, 32)})
        (here / f"cut{suffix}").write_bytes((here / f"cut{suffix}").read_bytes()[:-20])
        assert f"'cut{suffix}' is damaged" in fails(*model, "--embeddings", f"cut{suffix}")
    np.savez(here / "evil.npz", features=np.array([Evil(here / "ran")], dtype=object), mask=np.ones((1, 3)))
    assert "holds more than plain arrays" in fails(*model, "--embeddings", "evil.npz")
    assert not (here / "ran").exists()


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("256x1024", "size 256x1024 is none of this model's; the nearest is 288x864"),
        ("1024x256", "the nearest is 864x288"),
        ("250x250", "the nearest is 256x256"),
        ("100000x1", "the nearest is 432x144"),
        ("0x0", "size 0x0 has no pixels"),
        ("256x0", "size 256x0 has no pixels"),
    ],
)
def test_shapes_outside_the_table(fails: Fails, here: Path, size: str, says: str) -> None:
    plan = scales(1.0, "0.06M")
    text_models.infinity(plan.schedule, stages=5).over(plan).save(here / "ratios")
    save_embeddings(here / "e.npz", {"a red circle": torch.ones(3, 32)})
    assert says in fails("generate", "--model", "ratios", "--embeddings", "e.npz", "--size", size)

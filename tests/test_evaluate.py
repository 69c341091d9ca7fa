"""`varkit evaluate`: known errors give known figures, right pictures pass and wrong ones fail, draws are pure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import models
from varkit.canvases.base import Canvas
from varkit.cli.main import main
from varkit.data.captions import CATEGORIES
from varkit.data.real import Digits
from varkit.data.registry import open_dataset
from varkit.data.scenes import Scenes
from varkit.errors import UserError
from varkit.evaluate import digits, geneval, scenes
from varkit.evaluate.drawing import BATCH, draw, padded
from varkit.evaluate.reconstruction import pictures, psnr, reconstruct
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import load
from varkit.plans.schedule import Schedule
from varkit.tokenizers.base import Tokenizer

class_model = models.class_model
text_model = models.text_model


@pytest.fixture
def array(tmp_path: Path) -> str:
    """A file of 200 pictures of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", noise)
    return str(tmp_path / "noise.npy")


class Offset(Tokenizer):
    """A tokenizer whose reconstruction is off by `amount` times the picture's number, counted over the batches."""

    schedule = Schedule.of(1, 2)

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount, self.seen = amount, 0

    def encode(self, images: Tensor, schedule: Schedule | None = None) -> dict[str, Tensor]:
        return {"vectors": images}

    def canvas(self, batch: int, schedule: Schedule | None = None) -> Canvas:
        raise NotImplementedError

    def decode(
        self, latents: dict[str, Tensor], schedule: Schedule | None = None, levels: int | None = None
    ) -> Tensor:
        numbers = torch.arange(self.seen, self.seen + len(latents["vectors"]))
        self.seen += len(numbers)
        return latents["vectors"] + self.amount * numbers[:, None, None, None]


# --- reconstruction ------------------------------------------------------------


def test_known_errors_give_known_figures() -> None:
    images = torch.zeros(4, 3, 8, 8)
    report = reconstruct(Offset(0.1), [images[:3], images[3:]])
    squares = [0.0, 0.01, 0.04, 0.09]
    assert report.pictures == 4
    assert report.psnr == pytest.approx(10 * np.log10(4 / np.mean(squares)), abs=1e-4)
    assert report.psnr_of_pictures == pytest.approx(np.mean([psnr(square) for square in squares]), abs=1e-4)
    assert report.psnr_of_pictures > report.psnr and report.codebook is None
    assert [round(float(pair[1].mean()), 1) for pair in report.worst] == [0.3, 0.2, 0.1, 0.0]
    assert report.sheet().size == (4 * 8 + 3 * 2, 4 * 8 + 3 * 2)


def test_psnr_of_a_tenth_of_the_range_is_20_decibels() -> None:
    assert psnr(0.2**2) == pytest.approx(20.0)
    assert psnr(0.0) == pytest.approx(120.0)


def test_ssim_is_one_for_the_picture_itself_and_less_for_another() -> None:
    pytest.importorskip("skimage")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same, off = reconstruct(Offset(0.0), [images]), reconstruct(Offset(0.5), [images])
    assert same.ssim == pytest.approx(1.0) and off.ssim is not None and off.ssim < 0.99
    assert reconstruct(Offset(0.0), [images[..., :6, :6]]).ssim is None


def test_codebook_figures_are_those_of_the_ids(class_model: Path, array: str) -> None:
    tokenizer = load(class_model).tokenizer
    batches = list(pictures(open_dataset(array), tokenizer.image_size(), 40))
    assert [len(batch) for batch in batches] == [32, 8]
    report = reconstruct(tokenizer, batches)
    ids = torch.cat([tokenizer.encode(batch)["ids"] for batch in batches])
    assert report.codebook is not None
    assert report.codebook.usage == pytest.approx(len(ids.unique()) / models.CODES)
    first = torch.bincount(ids[:, 0], minlength=models.CODES) / len(ids)
    assert report.levels[0].perplexity == pytest.approx(
        torch.special.entr(first).sum().exp().item(), rel=1e-5
    )
    assert len(report.levels) == len(models.SCHEDULE)


def test_no_picture_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match="no pictures"):
        reconstruct(Offset(0.1), [])


# --- drawing ---------------------------------------------------------------------


def test_a_picture_does_not_depend_on_how_many_are_drawn(class_model: Path) -> None:
    pipeline = load(class_model)
    few = list(draw(pipeline, [i % 3 for i in range(padded(3))], seed=5))
    many = list(draw(pipeline, [i % 3 for i in range(padded(BATCH + 1))], seed=5))
    assert len(few) == BATCH and len(many) == 2 * BATCH
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert not np.array_equal(many[0], many[3 * (BATCH // 3) + 3])  # same label, another sample
    other = next(draw(pipeline, [0] * BATCH, seed=6))
    assert not np.array_equal(few[0], other)


# --- scenes ------------------------------------------------------------------------


@pytest.fixture
def scene_model():
    """A text model with the right size and words; its pictures come from a patched `draw`."""
    pipeline = models.tiny_pipeline(TextConfig())
    pipeline.tokenizer.stride = 32
    return pipeline


def truth(wanted: list[str]) -> dict[str, np.ndarray]:
    """The picture from whose scene each of the captions was taken."""
    found: dict[str, np.ndarray] = {}
    for scene in Scenes("test"):
        if scene.caption in wanted:
            found.setdefault(scene.caption, scene.image())
        if len(found) == len(set(wanted)):
            return found
    raise AssertionError


def test_true_pictures_pass_and_exchanged_ones_fail(scene_model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = geneval.prompts(padded(42))
    pictures_of = truth(prompts)
    monkeypatch.setattr(scenes, "draw", lambda pipeline, asked, *rest: (pictures_of[p] for p in asked))
    right = scenes.evaluate_scenes(scene_model, 42, range(2)).summary()
    assert right["overall"] > 0.95 and right["pictures"] == 84 and right["captions"] == 42
    assert right["spread"] == 0.0
    assert {name: c["pictures"] for name, c in right["categories"].items()} == dict.fromkeys(CATEGORIES, 14)
    shifted = prompts[1:] + prompts[:1]
    monkeypatch.setattr(scenes, "draw", lambda pipeline, asked, *rest: (pictures_of[p] for p in shifted))
    wrong = scenes.evaluate_scenes(scene_model, 42)
    assert wrong.summary()["overall"] < 0.2
    assert wrong.failures[0][0].caption == prompts[0]
    assert wrong.sheet().width == 8 * 128


def test_a_sheet_without_failures_says_so() -> None:
    assert scenes.captioned([]).size[0] > 0
    assert scenes.SceneReport().sheet().height < 40


def test_models_that_cannot_take_a_suite_are_named() -> None:
    with pytest.raises(UserError, match="takes class labels"):
        scenes.check_model(models.tiny_pipeline(ClassConfig(3)))
    with pytest.raises(UserError, match="6x6 are too small"):
        scenes.check_model(models.tiny_pipeline(TextConfig()))
    with pytest.raises(UserError, match="takes captions"):
        digits.check_model(models.tiny_pipeline(TextConfig()))
    with pytest.raises(UserError, match="this model has 3"):
        digits.check_model(models.tiny_pipeline(ClassConfig(3)))


# --- digits ------------------------------------------------------------------------


def test_real_digits_are_read_as_well_as_the_classifier_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pipeline = models.tiny_pipeline(ClassConfig(10))
    pipeline.tokenizer.stride = 8
    held_out = Digits().split("validation")
    batch = held_out.batch(range(len(held_out)), (24, 24))
    assert batch.labels is not None
    of_class = [batch.images[batch.labels == digit] for digit in range(10)]

    def real(pipeline, prompts, *rest):
        return (of_class[p][i // 10 % len(of_class[p])] for i, p in enumerate(prompts))

    monkeypatch.setattr(digits, "draw", real)
    report = digits.evaluate_digits(pipeline, 20)
    summary = report.summary()
    assert summary["pictures"] == 200 and summary["classifier_on_real"] > 0.9
    assert summary["accuracy"] > 0.9 and min(summary["classes"].values()) > 0.6
    assert report.sheet().size == (16 * 26 - 2, 10 * 26 - 2)
    monkeypatch.setattr(digits, "draw", lambda pipeline, prompts, *rest: (of_class[3][0] for _ in prompts))
    assert digits.evaluate_digits(pipeline, 2).summary()["accuracy"] == pytest.approx(0.1)


# --- the command -------------------------------------------------------------------


def test_json_and_sheet(
    class_model: Path, array: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    words = ["--suite", "reconstruction", "--data", array, "--n", "9", "--json", "--sheet", str(sheet)]
    assert main(["evaluate", str(class_model), *words]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["suite"] == "reconstruction" and facts["part"] == "validation" and facts["pictures"] == 9
    assert 0 < facts["psnr"] < 40 and len(facts["levels"]) == 3 and facts["ssim"] is None
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_tables_show_every_figure(class_model: Path, array: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(class_model), "--suite", "reconstruction", "--data", array, "--n", "4"]) == 0
    out = capsys.readouterr().out
    first = [line.split()[0] for line in out.splitlines()]
    spectrum = ["PSD", "low", "mid", "high"]
    assert first == ["figure", "pictures", "PSNR,", "PSNR,", *spectrum, "codebook", "level", "level", "level"]


def test_a_recipes_model_is_measured_on_the_recipes_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = models.tiny_pipeline(ClassConfig(10))
    pipeline.about = {"request": {"recipe": "nfig-digits"}}
    pipeline.save(tmp_path / "model")
    assert main(["evaluate", str(tmp_path / "model"), "--suite", "reconstruction", "--n", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["data"] == "digits" and 0 < facts["spectrum"]["high"]["kept"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "sceens"], "did you mean 'scenes'"),
        (["--suite", "scenes"], "takes class labels"),
        (["--suite", "digits"], "this model has 3"),
        (["--suite", "reconstruction"], "add --data"),
        (["--suite", "reconstruction", "--data", "nowhere"], "unknown dataset 'nowhere'"),
        (["--suite", "reconstruction", "--top-k", "5"], "--top_k is for drawing"),
        (["--suite", "digits", "--data", "digits"], "brings its own"),
        (["--suite", "digits", "--seeds", "2"], "raise --n"),
        (["--suite", "scenes", "--n", "0"], "--n is 0"),
    ],
)
def test_mistakes_are_one_line(
    class_model: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(class_model), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


def test_a_text_model_is_told_of_the_size_it_lacks(
    text_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(text_model), "--suite", "scenes"]) == 2
    assert "too small" in capsys.readouterr().err

"""What commands may be told of sampling and order, and models that are no numbers."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests import models
from tests.contracts import CASES
from tests.models import tiny_pipeline
from varkit.cli.generate import Generate
from varkit.cli.main import main
from varkit.cli.models import is_repository
from varkit.cli.sampling import parse_by_steps
from varkit.decode.guidance import until
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.heads.base import Ask
from varkit.heads.diffusion import DiffusionHead
from varkit.hub.pipeline import Pipeline, Settings, load
from varkit.pictures import to_array

class_model = models.class_model


@pytest.fixture
def mar(tmp_path: Path) -> Path:
    """The folder of a MAR with random weights."""
    CASES["mar-class"].pipeline(Settings(guidance=2.0)).save(tmp_path / "mar")
    return tmp_path / "mar"


def draw(model: Path, out: Path, *options: object) -> bytes:
    """The bytes of the picture of label 1."""
    words = ["generate", "--model", str(model), "--label", "1", "--out", str(out)]
    assert main([*words, *map(str, options)]) == 0
    return out.read_bytes()


# Numbers for each step


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 9)), min_size=1, max_size=9))
def test_runs_of_numbers_are_read_as_written(runs: list[tuple[float, int]]):
    text = ",".join(f"{value!r}*{count}" for value, count in runs)
    assert parse_by_steps("guidance", text) == tuple(v for value, count in runs for v in [value] * count)
    assert parse_by_steps("guidance", repr(runs[0][0])) == runs[0][0]


def test_an_interval_is_a_run_of_numbers():
    assert parse_by_steps("guidance", "4*101,1*155") == until(4.0, 100, 256)


@pytest.mark.parametrize(
    "text", ["", "much", "1,", "3*", "3*x", "3*0", "3*-1", "1*10001", "9*6000,1*6000", "1*2*3"]
)
def test_what_is_no_list_is_told(text: str):
    with pytest.raises(UserError, match=r"--temperature '.*' is .*; write e\.g\. 3, or 4,3,1\*8"):
        parse_by_steps("temperature", text)


def test_lists_reach_the_sampler(class_model: Path, tmp_path: Path):
    """Schedule 1, 2, 3: three steps."""
    ours = load(class_model)
    by_python = ours.generate(1, guidance=(1.0, 3.0, 5.0), temperature=(1.0, 0.0, 0.5))[0]
    assert not ours.chosen({"guidance": [1.0, 2.0]}).ramp and ours.chosen({"guidance": 3.0}) == Settings(
        guidance=3.0
    )
    options = ("--guidance", "1,3,5", "--temperature", "1,0,0.5")
    drawn = draw(class_model, tmp_path / "a.png", *options)
    by_python.save(tmp_path / "b.png")
    assert (
        drawn
        == (tmp_path / "b.png").read_bytes()
        != draw(class_model, tmp_path / "c.png", "--guidance", "1,3,5")
    )
    rising = Settings(guidance=4.0, ramp=True)
    assert not Pipeline(ours.parts, ours.configs, rising).chosen({"guidance": (1.0, 2.0)}).ramp


def test_guidance_at_a_layer_reaches_the_blocks(class_model: Path, capsys: pytest.CaptureFixture[str]):
    assert Generate(guidance_layer=-2).chosen() == {"guidance_layer": -2}
    words = ["generate", "--model", str(class_model), "--label", "1", "--guidance-layer", "-9"]
    assert main(words) == 2 and "use -2 to -1" in capsys.readouterr().err


def test_what_rises_or_is_a_list_is_not_for_a_layer(
    class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["generate", "--model", str(class_model), "--label", "1", "--guidance-layer", "-1"]
    words += ["--out", str(tmp_path / "a.png")]
    assert main([*words, "--guidance", "3", "--ramp", "on"]) == 2
    said = capsys.readouterr().err
    assert "guidance at a layer is one number, not one that rises; say --ramp off" in said and "(" not in said
    assert main([*words, "--guidance", "3,2,1"]) == 2
    said = capsys.readouterr().err
    assert "guidance at a layer is one number, not one for each step; say e.g. --guidance 3" in said
    assert main([*words, "--guidance", "3", "--ramp", "off"]) == 0


# Steps of MAR


def test_iterations_and_diffusion_steps(mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours = load(mar)
    own, other = ours.scheduled(3), ours.diffused(7)
    assert (own.model.plan.evaluations, len(other.model.heads["main"].reverse)) == (3, 7)
    assert len(ours.model.heads["main"].reverse) != 7 != ours.configs["head"].sampling_steps
    assert other.model.heads["main"].net is ours.model.heads["main"].net
    other.save(tmp_path / "saved")
    assert load(tmp_path / "saved").configs["head"].sampling_steps == 7

    sampled: list[int] = []
    sample = DiffusionHead.sample

    def watched(self: DiffusionHead, h: torch.Tensor, ask: Ask) -> dict[str, torch.Tensor]:
        sampled.append(len(self.reverse))
        return sample(self, h, ask)

    monkeypatch.setattr(DiffusionHead, "sample", watched)
    draw(mar, tmp_path / "a.png", "--steps", 3, "--diffusion-steps", 7)
    assert sampled == [7, 7, 7]


def test_steps_that_a_model_does_not_have(mar: Path, class_model: Path):
    for steps, says in ((0, "takes 1 to 12"), (13, "takes 1 to 12")):
        with pytest.raises(UserError, match=says):
            load(mar).scheduled(steps)
    with pytest.raises(UserError, match="in the one order .*; leave the schedule"):
        load(mar).scheduled([1, 2])
    with pytest.raises(UserError, match="use 2 to 1000"):
        load(mar).diffused(1)
    with pytest.raises(UserError, match="no diffusion head; leave the diffusion steps out"):
        load(class_model).diffused(9)


# Pictures drawn together


def test_a_batch_is_as_large_as_asked(class_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    start_from = Pipeline.start_from

    def watched(self: Pipeline, condition, seed, samples, *rest):
        sizes.append(len(samples))
        return start_from(self, condition, seed, samples, *rest)

    monkeypatch.setattr(Pipeline, "start_from", watched)
    words = ["generate", "--model", str(class_model), "--label", "1", "--n", "7", "--out"]
    for batch, expected in (("3", [3, 3, 3]), ("7", [7]), ("8", [7])):
        sizes.clear()
        assert main([*words, str(tmp_path / batch), "--batch", batch]) == 0
        assert sizes == expected and len(list((tmp_path / batch).glob("*.png"))) == 7


def test_packed_weights_draw_the_same_picture(
    class_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    packed: list[Pipeline] = []
    pack = Pipeline.packed
    monkeypatch.setattr(Pipeline, "packed", lambda self: packed.append(self) or pack(self))
    plain = Image.open(io.BytesIO(draw(class_model, tmp_path / "a.png")))
    assert not packed
    other = Image.open(io.BytesIO(draw(class_model, tmp_path / "b.png", "--packed")))
    assert packed and np.abs(np.asarray(plain, int) - np.asarray(other, int)).max() <= 1
    with pytest.raises(UserError, match="--packed keeps a second copy .*; leave one out"):
        Generate(label=1, packed=True, offload="disk")


def test_a_batch_of_none_is_told():
    with pytest.raises(UserError, match="--batch is 0; ask for 1 to"):
        Generate(label=1, batch=0)


# Models by their names on the hub


def test_names_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert all(map(is_repository, ("FoundationVision/var:d16", "someone/else", "a/b.c:d_e-1")))
    for name in ("scenes", "./a/b", "/a/b", "a/b/c", "a/b:", "a/b:c:d", "../a"):
        assert not is_repository(name), name
    (tmp_path / "runs").mkdir()
    assert not is_repository("runs/digits")  # a slip in a path asks no network
    assert main(["generate", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "a folder of published files, or OWNER/NAME or OWNER/NAME:VARIANT on the Hugging Face hub" in told


# What is no number


@pytest.mark.parametrize("part", ["generator", "head"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_draws_nothing(part: str, temperature: float):
    broken = tiny_pipeline(ClassConfig(3))
    with torch.no_grad():
        list(broken.parts[part].parameters())[-1][0] = torch.nan
    with pytest.raises(
        UserError,
        match="what the head gives has NaN: .* is damaged; try float32",
    ):
        broken.generate(1, temperature=temperature)


@pytest.mark.parametrize("part", ["tokenizer", "head"])
def test_nor_does_one_whose_numbers_make_the_picture(part: str):
    broken = CASES["mar-class"].pipeline(Settings())
    with torch.no_grad():
        list(broken.parts[part].parameters())[-1][:] = torch.nan
    with pytest.raises(UserError, match="a picture has NaN"):
        broken.generate(1)


def test_pictures_beyond_their_range_are_cut_and_those_of_nan_refused():
    assert to_array(torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1)).ravel().tolist() == [0, 255, 128]
    with pytest.raises(UserError, match="a picture has NaN"):
        to_array(torch.full((1, 3, 2, 2), torch.nan))

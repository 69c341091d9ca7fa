"""Drawing shared among processes or machines gives the pictures of one, byte for byte."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import models
from tests.launch import launch
from tests.models import CLASSES, tiny_pipeline
from varkit.cli.generate import Generate
from varkit.cli.main import main
from varkit.cli.ray_data import movable
from varkit.decode.state import State
from varkit.generators.conditioning import ClassConfig
from varkit.hub.pipeline import Pipeline, load
from varkit.hub.prompts import Prompt

class_model = models.class_model


def drawn(folder: Path) -> dict[str, bytes]:
    """The pictures in a folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Eleven labels, so that shares do not come out even."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{i % 3}\n" for i in range(11)))
    return file


def generate(model: Path, prompts: Path, out: Path, *options: str) -> None:
    """`varkit generate` with the prompts."""
    assert (
        main(["generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out), *options]) == 0
    )


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_shares_together_are_the_whole(class_model: Path, prompts: Path, tmp_path: Path, shares: int):
    generate(class_model, prompts, tmp_path / "whole")
    for share in range(shares):
        generate(class_model, prompts, tmp_path / "parts", "--shard", f"{share}/{shares}")
    whole = drawn(tmp_path / "whole")
    assert len(whole) == 11 and len(set(whole.values())) > 5
    assert drawn(tmp_path / "parts") == whole


@pytest.mark.parametrize("count", [1, 5])
def test_few_pictures_are_drawn_in_the_batches_of_many(
    class_model: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
):
    """Sums of small models hardly round differently, so the batches themselves are looked at."""
    sizes: list[int] = []
    starts = Pipeline.starts

    def watched(self: Pipeline, prompts: Sequence[Prompt], *rest: Any) -> Iterator[State]:
        for state in starts(self, prompts, *rest):
            sizes.append(state.canvas.batch)
            yield state

    monkeypatch.setattr(Pipeline, "starts", watched)
    few = tmp_path / "few.txt"
    few.write_text("".join(f"{i % 3}\n" for i in range(count)))
    generate(class_model, few, tmp_path / "whole")
    for share in range(2):
        generate(class_model, few, tmp_path / "parts", "--shard", f"{share}/2")
    assert drawn(tmp_path / "parts") == drawn(tmp_path / "whole")
    assert sizes and set(sizes) == {Generate.batch}


def test_a_list_of_one_is_drawn_alike_however_shared(class_model: Path, tmp_path: Path):
    (tmp_path / "cat.txt").write_text("cat\n")
    words = ["generate", "--prompts", str(tmp_path / "cat.txt"), "--model", str(class_model)]
    words += ["--n", "3", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    for share in range(3):
        assert main([*words, str(tmp_path / "parts"), "--shard", f"{share}/3"]) == 0
    assert drawn(tmp_path / "whole") == drawn(tmp_path / "parts")
    assert (tmp_path / "whole/.generate.json").read_text() == (tmp_path / "parts/.generate.json").read_text()


def refused(capsys: pytest.CaptureFixture[str], model: Path, prompts: Path, out: Path, *options: str) -> str:
    """The line with which going on is refused; nothing is drawn."""
    before = {path: path.read_bytes() for path in out.iterdir()}
    command = ["generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out), "--resume"]
    capsys.readouterr()
    assert main([*command, *options]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    return said.err


def test_pictures_of_another_run_are_not_gone_on_with(
    class_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, others = tmp_path / "out", tmp_path / "others.txt"
    others.write_text("2\n" * 11)
    tiny_pipeline(ClassConfig(len(CLASSES), CLASSES), seed=1).save(tmp_path / "retrained")
    generate(class_model, prompts, out, "--seed", "3")
    for path in sorted(out.glob("*.png"))[:4]:
        path.unlink()
    assert "are of another run (seed 3, not 4); leave out --resume" in refused(
        capsys, class_model, prompts, out, "--seed", "4"
    )
    same = ("--seed", "3")
    for name, options in {
        "top_k": ("--top-k", "2"),
        "guidance": ("--guidance", "3"),
        "dtype": ("--dtype", "bfloat16"),
        "n": ("--n", "2"),
    }.items():
        assert f"({name} " in refused(capsys, class_model, prompts, out, *same, *options)
    assert "(prompts " in refused(capsys, class_model, others, out, *same)
    assert "(model " in refused(capsys, tmp_path / "retrained", prompts, out, *same)
    with torch.no_grad():
        for weight in (noisy := load(class_model)).generator.blocks.parameters():  # type: ignore[union-attr]
            weight += 0.1 * torch.randn_like(weight)
    noisy.save(tmp_path / "noisy")
    for options in ((), ("--offload", "disk")):
        assert "(model " in refused(capsys, tmp_path / "noisy", prompts, out, *same, *options)
    generate(class_model, prompts, out, *same, "--resume", "--shard", "0/2", "--offload", "ram")
    generate(class_model, prompts, out, *same, "--resume", "--shard", "1/2")
    generate(class_model, prompts, tmp_path / "whole", *same)
    assert drawn(out) == drawn(tmp_path / "whole")


def test_drawing_over_another_run_is_no_mixture_until_it_is_done(
    class_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    generate(class_model, prompts, out, "--seed", "3")
    generate(class_model, prompts, out, "--seed", "4", "--shard", "0/2")  # the others are of seed 3 still
    assert "(pictures of several runs, not of one)" in refused(
        capsys, class_model, prompts, out, "--seed", "4"
    )
    generate(class_model, prompts, out, "--seed", "4")
    generate(class_model, prompts, out, "--seed", "4", "--resume")
    assert "(seed 4, not 3)" in refused(capsys, class_model, prompts, out, "--seed", "3")


def test_without_a_name_each_picture_has_its_prompts(
    class_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("cat\ndog\n")
    assert main(["generate", "--model", str(class_model), "--prompts", "prompts.txt"]) == 0
    assert sorted(drawn(tmp_path)) == ["0-cat.png", "1-dog.png"]


def test_a_run_that_was_interrupted_draws_only_what_is_missing(
    class_model: Path, prompts: Path, tmp_path: Path
):
    generate(class_model, prompts, tmp_path / "whole")
    whole = drawn(tmp_path / "whole")
    again = tmp_path / "again"
    again.mkdir()
    names = sorted(whole)
    for name in names[:4]:
        Image.new("RGB", (6, 6)).save(again / name)
    mine = drawn(again)
    generate(class_model, prompts, again, "--resume")
    assert drawn(again) == whole | mine and len(mine) == 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_what_is_no_whole_picture_is_drawn_anew(class_model: Path, tmp_path: Path, suffix: str):
    words = ["generate", "--model", str(class_model), "--label", "1", "--n", "5", "--resume", "--out"]
    assert main([*words, str(tmp_path / f"a{suffix}")]) == 0
    files = sorted(tmp_path.glob(f"*{suffix}"))
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(b"")
    files[1].write_bytes(whole[1][: len(whole[1]) // 2])
    files[2].write_bytes(whole[2][:-12])  # a PNG's last chunk
    files[3].write_bytes(b"a picture of mine")
    last = files[4].stat()
    assert main([*words, str(tmp_path / f"a{suffix}")]) == 0
    assert [file.read_bytes() for file in files] == whole
    assert files[4].stat().st_ino == last.st_ino


def test_strips_that_are_missing_are_drawn_beside_finished_pictures(
    class_model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    generate(class_model, prompts, tmp_path / "whole", "--previews")
    generate(class_model, prompts, tmp_path / "out")
    kept = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.png")}
    for said in (11, 0):
        capsys.readouterr()
        generate(class_model, prompts, tmp_path / "out", "--resume", "--previews")
        assert capsys.readouterr().out.count("-previews.png\n") == said
    assert drawn(tmp_path / "out") == drawn(tmp_path / "whole")
    assert all(path.stat().st_ino == file for path, file in kept.items())


def test_workers_open_the_model_that_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bundled name is one whatever folders are here; paths become whole, since workers start elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "mine"):
        Path(name).mkdir()
    assert movable(Generate(model="digits")).model == "digits"
    assert movable(Generate(model="./digits")).model == str(tmp_path / "digits")
    moved = movable(Generate(model="mine", text_encoder="digits"))
    assert (moved.model, moved.text_encoder) == (str(tmp_path / "mine"), str(tmp_path / "digits"))


@pytest.mark.parametrize("shard", ["2/2", "0/0", "1", "-1/2", "a/b"])
def test_wrong_shares_are_refused(
    class_model: Path, prompts: Path, shard: str, capsys: pytest.CaptureFixture[str]
):
    command = ["generate", "--model", str(class_model), "--prompts", str(prompts), f"--shard={shard}"]
    assert main(command) == 2
    assert "is not I/N" in capsys.readouterr().err


def test_a_sheet_is_not_shared(class_model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    command = ["generate", "--model", str(class_model), "--prompts", str(prompts), "--grid", "--shard", "0/2"]
    assert main(command) == 2
    assert "--grid needs all pictures" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path: Path):
    """Real processes; of the two, one speaks and writes."""

    def evaluate(ranks: int) -> tuple[dict, bytes]:
        sheet = tmp_path / f"sheet{ranks}.png"
        options = ("--suite", "scenes", "--n", 48, "--json", "--sheet", sheet)
        done = launch(ranks, "varkit", "evaluate", "scenes", *options)
        return json.loads(done.stdout), sheet.read_bytes()

    assert evaluate(2) == evaluate(1)

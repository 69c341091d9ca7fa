"""Drawing shared among processes or machines gives the pictures of one, byte for byte."""

import json
from pathlib import Path

import pytest

from tests import models
from tests.launch import launch
from varkit.cli.main import main

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


def test_a_run_that_was_interrupted_draws_only_what_is_missing(
    class_model: Path, prompts: Path, tmp_path: Path
):
    generate(class_model, prompts, tmp_path / "whole")
    whole = drawn(tmp_path / "whole")
    again = tmp_path / "again"
    again.mkdir()
    names = sorted(whole)
    for name in names[:4]:
        (again / name).write_bytes(b"a picture of mine")
    generate(class_model, prompts, again, "--resume")
    assert {name: drawn(again)[name] for name in names[4:]} == {name: whole[name] for name in names[4:]}
    assert all(drawn(again)[name] == b"a picture of mine" for name in names[:4])


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

"""The folder of a training while pictures are encoded, after `kill -9`, and what the command says at its end."""

import errno
import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import failing
from tests.models import CLASSES, SCHEDULE, WORDS, tiny_recipe, train_tiny
from varkit.cli.main import main
from varkit.data.registry import open_dataset
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.tokenizers.kl import KLConfig
from varkit.tokenizers.pixels import PixelsConfig
from varkit.train import progress, run
from varkit.train.recipes import RECIPES
from varkit.train.run import encoded, example
from varkit.train.task import TrainConfig
from varkit.train.tokenizer_loss import MovingCodesConfig, TokenizerLossConfig
from varkit.train.tokenizer_task import ReconstructionTask
from varkit.train.tokens import Tokens, encode
from varkit.train.trainer import Trainer

here = failing.here
COMMAND = ("train", "tiny", "--steps", "1", "--out", "run")


@pytest.fixture(autouse=True)
def tiny(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny recipe has a name."""
    monkeypatch.setitem(RECIPES, "tiny", tiny_recipe)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that is over."""
    return train_tiny(tmp_path_factory.mktemp("finished") / "run")


def fallocate_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith((".part-", ".old-"))]


# A full disk


def test_a_disk_without_room_for_the_tokens(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fallocate_fails(monkeypatch, errno.ENOSPC)
    assert main([*COMMAND]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("varkit: error: no space left on device while writing ") and "run/tokens'" in line
    assert not (here / "run" / "tokens").exists() and not leftovers(here)


@pytest.mark.parametrize("lacks", ["the platform", "the file system"])
def test_tokens_have_their_place_on_disk_before_they_are_made(
    lacks: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_recipe().tokenizer.config.build()
    whole = encode(tokenizer, open_dataset("digits"), 300, here / "whole")
    if lacks == "the platform":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        fallocate_fails(monkeypatch, errno.EOPNOTSUPP)
    blocks: list[int] = []

    def look(done: int, total: int) -> None:
        (file,) = here.glob(".part-*/ids.npy")
        blocks.append(file.stat().st_blocks * 512)

    encode(tokenizer, open_dataset("digits"), 300, here / "other", progress=look)
    assert blocks[0] >= 300 * sum(side * side for side in SCHEDULE) * 4
    assert (Tokens.load(here / "other").latents["ids"] == whole.latents["ids"]).all()


# After kill -9


def test_what_a_killed_training_left_is_removed_on_resuming(
    finished: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, here / "run")
    (here / "run" / ".part-0123").mkdir()
    (here / "run" / ".part-0123" / "ids.npy").write_bytes(b"half")
    (here / "run" / ".old-4567").mkdir()
    (here / "run" / "generator" / "DONE").unlink()
    for folder in ("tokenizer", "model", "generator", "generator/samples", "generator/checkpoints"):
        (here / "run" / folder / ".part-89ab.json").write_text("{")
    assert main([*COMMAND, "--resume"]) == 0, capsys.readouterr().err
    assert not leftovers(here)


def test_what_was_killed_at_once_can_be_begun_and_says_how_to_draw(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "tiny", "--steps", "1", "--out", "my run"]
    (here / "my run").mkdir()
    (here / "my run" / ".part-0123.json").write_text("{")
    assert main([*command, "--resume"]) == 2
    assert "leave --resume out to start there" in capsys.readouterr().err
    assert main(command) == 0, capsys.readouterr().err
    assert not leftovers(here)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "the model is in my run; try: varkit generate --label 0 --model 'my run'"
    assert main(shlex.split(last.partition("try: varkit ")[2])) == 0


# What the command says


@pytest.mark.parametrize(
    ("condition", "prompts", "words"),
    [
        (ClassConfig(3, CLASSES), (2, 1), "--label 2"),
        (ClassConfig(3, CLASSES), (7, "a red circle"), "--label 0"),
        (TextConfig(WORDS), ("a red circle", "a blue square"), "'a red circle'"),
        (TextConfig(WORDS), ("a green circle", 3, "a blue square"), "'a blue square'"),
        (TextConfig(WORDS[1:]), (0,), "red"),
        (TextConfig(), ("", "the king's\n cat"), """'the king'"'"'s cat'"""),
        (TextConfig(), (), "'a picture'"),
    ],
)
def test_an_example_is_a_prompt_that_the_model_knows(
    condition: ClassConfig | TextConfig, prompts: tuple[str | int, ...], words: str
) -> None:
    assert example(condition, prompts) == words


def test_encoding_shows_how_far_it_is(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = PixelsConfig(32).build()

    def shown(folder: str) -> str:
        encoded(tokenizer, open_dataset("scenes"), 128, here / folder, lambda text: None)
        return capsys.readouterr().err

    monkeypatch.setattr(run, "HELD_OUT", 8)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1000.0)
    assert shown("brief") == ""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines = shown("lines")
    assert [line.split("  ")[0] for line in lines.splitlines()] == [
        "encoded 64/128", "encoded 128/128", "encoded 8/8",
    ]  # fmt: skip
    assert shown("lines") == "", "they are there already"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "encoding" in shown("bar")


# Codes by moving averages


def reconstruction(loss: TokenizerLossConfig) -> ReconstructionTask:
    torch.manual_seed(0)
    return ReconstructionTask(tiny_recipe().tokenizer.config.build(), open_dataset("digits"), loss, 4, {})


def test_a_recipe_may_ask_for_codes_by_moving_averages() -> None:
    task = reconstruction(MovingCodesConfig(codebook_decay=0.9))
    assert task.keeper is not None
    codes = task.keeper.codebook
    before, ids = codes.weight.detach().clone(), []
    assert torch.equal(task.keeper.sums, before), "averages begin at codes that were made of features"
    trainer = Trainer(task, TrainConfig(steps=1))
    assert trainer.step(1) is not None
    ids, vectors = task._outputs["ids"].flatten(), task._outputs["residuals"].detach().flatten(0, 1)
    counts = torch.bincount(ids, minlength=len(before))[:, None]
    sums = torch.zeros_like(before).index_add_(0, ids, vectors)
    torch.testing.assert_close(codes.weight.detach(), (0.9 * before + 0.1 * sums) / (0.9 + 0.1 * counts))
    assert not codes.weight.requires_grad


def test_codes_are_trained_by_gradients_by_default() -> None:
    task = reconstruction(TokenizerLossConfig())
    assert task.keeper is not None and task.keeper.decay is None
    assert task.keeper.codebook.weight.requires_grad


def test_decays_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"codebook decay 1.0 is outside \[0, 1\)"):
        MovingCodesConfig(codebook_decay=1.0)
    conv = tiny_recipe().tokenizer.config.conv  # type: ignore[attr-defined]
    kl = KLConfig(replace(conv, latent_channels=4), grid=3)
    with pytest.raises(UserError, match="codebook_decay 0.99 averages codes, and KL has none"):
        ReconstructionTask(kl.build(), open_dataset("digits"), MovingCodesConfig(), 4, {})

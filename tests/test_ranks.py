"""Training by several real processes equals training by one, also when their number changes on the way."""

import json
from pathlib import Path

import pytest
import torch

from tests.launch import launch
from varkit.errors import UserError
from varkit.ranks import Ranks
from varkit.train.loop import load_run
from varkit.train.run import Request

PROGRAM = "tests.programs.train_ranks"


def run(folder: Path, ranks: int, *stop: int) -> None:
    """The program, by `ranks` processes."""
    launch(ranks, PROGRAM, folder, *stop)


def losses(folder: Path) -> list[float]:
    """The training losses of a run, step by step."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if "loss" in event]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(folder, 1)
    return folder


def test_two_processes_have_the_losses_of_one(alone: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", 2)
    assert len(losses(alone)) == 10
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    ours, theirs = load_run(tmp_path / "run", ema=False), load_run(alone, ema=False)
    for part, weights in theirs.items():
        for name, value in weights.items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    alone: Path, tmp_path: Path, before: int, after: int
) -> None:
    folder = tmp_path / "run"
    run(folder, before, 4)
    assert len(losses(folder)) == 4
    run(folder, after)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)


def test_shares_cover_every_micro_batch_once() -> None:
    shares = [list(Ranks(rank, 3).share(6)) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(6))
    with pytest.raises(UserError, match="4 micro-batches a step cannot be shared by 3 ranks"):
        Ranks(0, 3).share(4)


def test_a_batch_is_split_evenly() -> None:
    assert Request("digits", accumulation=4).micro_batch(64) == 16
    with pytest.raises(UserError, match="a batch of 64 cannot be split into 3"):
        Request("digits", accumulation=3).micro_batch(64)
    with pytest.raises(UserError, match="--accumulation is 0"):
        Request("digits", accumulation=0)

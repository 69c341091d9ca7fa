"""Training whose weights are spread over two real processes equals training by one; any number goes on with it.

This file is also the program of those processes: `python -m tests.test_sharding FOLDER CASE...`, where FOLDER has the
runs of one process. All that two of them have to do is done in one go, because starting them takes longest.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.contracts import CASES, true_latents
from tests.launch import launch
from varkit.errors import UserError
from varkit.hub.pipeline import Settings
from varkit.pictures import grid
from varkit.ranks import Ranks, together
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.loop import load_run, train
from varkit.train.run import Request, check_run
from varkit.train.sharding import check_shardable
from varkit.train.task import Phase, TrainConfig
from varkit.train.tokens import Tokens

CONFIG = TrainConfig(steps=10, lr=3e-3, accumulation=2, log_every=1, checkpoint_every=5, validate_every=5)
SHORT = replace(CONFIG, steps=3)
CONFIGS = {
    "var-class": CONFIG,
    "var-text": replace(SHORT, optimizer="muon"),
    "llamagen-class": replace(SHORT, optimizer="muon", dtype="bfloat16"),
    "var-shared-modulation": SHORT,
    "pixelcnn-class": SHORT,
}
QUICK = ["var-class", "llamagen-class"]
SPOILT = "llamagen-class"
"""In this one, the second process has no finite loss at its second step, which both then skip."""


class Spoilt(NextStepTask):
    """One micro-batch, of step 1, has a loss that is not a number."""

    def batch(self, step: int, micro: int):
        """Remember whether this is the one."""
        self.spoil = (step, micro) == (1, 1)
        return super().batch(step, micro)

    def loss(self, phase: str, batch, step: int):
        """What it is, or not a number."""
        loss, metrics = super().loss(phase, batch, step)
        return (loss * float("nan") if self.spoil else loss), metrics


def go(case: str, folder: Path, sharded: bool = False) -> None:
    """Train, or go on with the run in `folder`."""
    pipeline = CASES[case].pipeline(Settings())
    tokenizer, model = pipeline.tokenizer, pipeline.model
    latents = {name: value.numpy() for name, value in true_latents(tokenizer, model, 32).items()}
    prompts = ["a red ring", "ring", "a ring", "red"]
    tokens = Tokens(latents, np.arange(32) % 4, [prompts[i % 4] for i in range(32)])
    parts = Forced(tokenizer, model.generator, model.heads["main"], model.plan)
    prompt = "ring" if case == "var-text" else 1
    task = (Spoilt if case == SPOILT else NextStepTask)(
        parts, tokens, tokens, 4, {}, condition_drop=0.3,
        draw=lambda: grid(pipeline.generate([prompt], seed=0), columns=1),
    )  # fmt: skip
    resume = (folder / "config.json").exists()
    train(task, CONFIGS[case], folder, resume, quiet=True, sharded=sharded)


def cut(source: Path, folder: Path) -> Path:
    """A copy of a run of ten steps as it was after five."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000010")
    (folder / "DONE").unlink()
    return folder


def main(root: Path, cases: list[str]) -> None:
    """What two processes do together: train the cases and, if the first ran long enough, go on from its middle."""
    with together() as ranks:
        for case in cases:
            go(case, root / case / "sharded", sharded=True)
        first = root / cases[0]
        if CONFIGS[cases[0]].steps == 10:
            for source in ("alone", "sharded"):
                if ranks.first:
                    cut(first / source, first / f"from-{source}")
                ranks.wait()
                go(cases[0], first / f"from-{source}", sharded=True)


def losses(folder: Path) -> list[float]:
    """The training losses of a run, step by step."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if "loss" in event]


def validation(folder: Path) -> dict[str, float]:
    """The last validation's metrics."""
    return json.loads((folder / "DONE").read_text())["metrics"]


def run_all(root: Path, cases: list[str]) -> None:
    """Train the cases by one process, in root/CASE/alone, and by two, in root/CASE/sharded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for case in cases:
        go(case, root / case / "alone")
    torch.set_num_threads(threads)
    done = launch(2, "tests.test_sharding", root, *cases)
    assert "Warning" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs but those of slow tests."""
    root = tmp_path_factory.mktemp("runs")
    run_all(root, QUICK)
    return root


@pytest.fixture(scope="module")
def runs(quick: Path) -> Path:
    """The runs of a VAR."""
    return quick / "var-class"


def assert_alike(folder: Path, case: str) -> None:
    """Sharded training has the losses of one process."""
    ours, theirs = folder / case / "sharded", folder / case / "alone"
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    # A bfloat16 run that is sharded validates in bfloat16 too.
    rel = 1e-5 if CONFIGS[case].dtype == "float32" else 1e-2
    assert validation(ours) == pytest.approx(validation(theirs), rel=rel)
    assert (ours / "samples" / f"step-{CONFIGS[case].steps:06d}.png").exists()


@pytest.mark.parametrize("case", QUICK)
def test_two_sharded_processes_train_as_one(quick: Path, case: str) -> None:
    assert len(losses(quick / case / "alone")) == (2 if case == SPOILT else 10)
    assert_alike(quick, case)


@pytest.mark.slow
def test_other_generators_can_be_sharded(tmp_path: Path) -> None:
    others = [case for case in CONFIGS if case not in QUICK]
    run_all(tmp_path, others)
    for case in others:
        assert_alike(tmp_path, case)


@pytest.mark.parametrize("ema", [True, False])
def test_the_finished_model_is_that_of_one_process(runs: Path, ema: bool) -> None:
    ours, theirs = load_run(runs / "sharded", ema), load_run(runs / "alone", ema)
    assert ours.keys() == theirs.keys()
    for part, weights in theirs.items():
        assert ours[part].keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["weights", "ema", "optimizer"])
def test_each_process_holds_half(runs: Path, kind: str) -> None:
    folder = runs / "sharded" / "checkpoints" / "step-000010"
    files = sorted((folder / kind).iterdir())
    held = [sum(t.numel() for t in load_file(file).values()) for file in files]
    whole = load_file(runs / "alone" / "checkpoints" / "step-000010" / f"{kind}.safetensors")
    assert len(held) == 2
    assert max(held) < 0.56 * sum(t.numel() for t in whole.values())


@pytest.mark.parametrize("name", ["from-alone", "from-sharded"])
def test_two_sharded_processes_go_on_from_any_checkpoint(runs: Path, name: str) -> None:
    assert losses(runs / name) == pytest.approx(losses(runs / "alone"), rel=1e-5)


def test_one_process_goes_on_from_a_sharded_checkpoint(runs: Path, tmp_path: Path) -> None:
    folder = cut(runs / "sharded", tmp_path / "run")
    go("var-class", folder)
    assert losses(folder) == pytest.approx(losses(runs / "alone"), rel=1e-5)


def test_nothing_in_a_sharded_checkpoint_can_execute_code(runs: Path) -> None:
    files = [path for path in (runs / "sharded" / "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_a_damaged_shard_is_noticed(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs / "sharded", folder)
    shard = sorted((folder / "checkpoints" / "step-000010" / "ema").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    now, before = load_run(folder), load_run(runs / "sharded")
    assert "is not what was written" in capsys.readouterr().err
    name = "position"
    assert not torch.equal(now["generator"][name], before["generator"][name])


class Unfit(NextStepTask):
    """A task that `check_shardable` is asked about, without any of the rest."""

    def __init__(self) -> None:
        self.modules = {"a": torch.nn.Linear(2, 2)}
        self.phases = (Phase("a", ("a",)),)


def test_what_cannot_be_sharded_is_refused() -> None:
    mixed = TrainConfig(dtype="bfloat16")
    check_shardable(Unfit(), mixed)
    two, moving, keeping = Unfit(), Unfit(), Unfit()
    two.phases = (Phase("a", ("a",)), Phase("b", ("a",)))
    moving.moved = lambda: [torch.zeros(1)]  # type: ignore[method-assign]
    keeping.keeps_float32 = lambda name: name == "a.bias"  # type: ignore[method-assign]
    check_shardable(keeping, TrainConfig())
    for task, reason in ((two, "2 optimisers"), (moving, "between steps"), (keeping, "a.bias in float32")):
        with pytest.raises(UserError, match=reason):
            check_shardable(task, mixed)


def test_a_training_may_go_on_sharded(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps({"recipe": "digits", "shard": False}))
    check_run(tmp_path, Request("digits", shard=True), resume=True)


def test_entries_of_one_rank_are_its_own() -> None:
    assert Ranks().merged({"a": 1}) == {"a": 1}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])

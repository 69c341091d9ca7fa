"""The trainer: exact resuming after any interruption, and what it does with bad numbers, disks and settings."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from varkit.cli.runner import explain
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.train import loop, progress, runs
from varkit.train import trainer as trainer_module
from varkit.train.loop import TrainingDiverged, load_run, recorded_steps, steps_for, train
from varkit.train.optim import EMA, NamedOptimizer, cosine, decays, in_block, lr_factor
from varkit.train.task import Phase, Task, TrainConfig
from varkit.train.trainer import Trainer

CONFIG = TrainConfig(
    steps=60, accumulation=2, lr=1e-2, log_every=7, validate_every=20, checkpoint_every=10, ema=0.9
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Nets this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Toy(Task):
    """Regression with everything that could break exact resuming: dropout, batch statistics, state beside modules."""

    batch_size = 8
    recipe = {"name": "toy"}
    phases: tuple[Phase, ...] = (Phase("net", ("net",)),)

    def __init__(self, poison: range = range(0), delay: float = 0.0) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 1)
        )
        self.modules = {"net": net}
        self.poison, self.delay = poison, delay
        self.seen = torch.zeros(4)

    def batch(self, step: int, micro: int) -> Tensor:
        x = torch.randn(self.batch_size, 4, generator=torch.Generator().manual_seed(2 * step + micro))
        return x * (float("nan") if step in self.poison else 1.0)

    def loss(self, phase: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        time.sleep(self.delay)
        self.last = batch
        predicted = self.modules["net"](batch)
        loss = (predicted - batch.sin().sum(1, keepdim=True)).square().mean()
        return loss, {"error": loss.detach().sqrt()}

    def after_step(self, step: int) -> dict[str, float]:
        self.seen += self.last.mean(0)
        self.modules["net"][0].bias += 1e-3 * torch.randn(16) + 1e-3 * self.seen.sum()
        return {"seen": float(self.seen.sum())}

    def validate(self) -> dict[str, float]:
        assert not self.modules["net"].training and not torch.is_grad_enabled()
        return {"level": float(self.modules["net"](torch.ones(3, 4)).mean() + torch.rand(()))}

    def samples(self) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].clone()


def assert_same_run(a: Path, b: Path) -> None:
    """Equal weights, averages and moments, bit for bit, and equal logs but for the times."""
    for name in runs.TENSOR_FILES:
        x, y = (runs.load_file(p / "checkpoints/step-000060" / f"{name}.safetensors") for p in (a, b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x), name
    assert log_of(a) == log_of(b)


def log_of(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("seconds", "pictures_per_second")} for e in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(Toy(), CONFIG, path, quiet=True)
    return path


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException | None = None) -> None:
    """At `step`, raise `error`, or press Ctrl-C."""
    original = Toy.batch

    def batch(self: Toy, now: int, micro: int) -> Tensor:
        if now == step:
            monkeypatch.setattr(Toy, "batch", original)
            if error:
                raise error
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, now, micro)

    monkeypatch.setattr(Toy, "batch", batch)


# --- the folder ---------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything_behind(whole: Path) -> None:
    assert sorted(p.name for p in whole.iterdir()) == [
        "DONE",
        "checkpoints",
        "config.json",
        "log.jsonl",
        "samples",
    ]
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-000050", "step-000060"]
    assert sorted(p.name for p in (whole / "samples").iterdir()) == [
        f"step-0000{n}.png" for n in (20, 40, 60)
    ]
    losses = [e["loss"] for e in log_of(whole) if "loss" in e]
    assert losses[-1] < 0.7 * losses[0]
    assert [e["step"] for e in log_of(whole) if "loss" in e] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert [e["step"] for e in log_of(whole) if "validation" in e] == [20, 40, 60]
    first = log_of(whole)[0]
    assert first.keys() == {"step", "error", "loss", "grad_norm", "seen", "lr", "skipped"}
    assert recorded_steps(whole) == 60
    assert json.loads((whole / "config.json").read_text())["train"]["lr"] == 1e-2


def test_a_finished_run_is_not_trained_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 0, AssertionError("trained"))
    result = train(Toy(), CONFIG, whole, resume=True)
    assert result.step == 60 and result.metrics == log_of(whole)[-1]["validation"]


def test_load_run_gives_averaged_or_last_weights_by_part(whole: Path) -> None:
    averaged, last = load_run(whole)["net"], load_run(whole, ema=False)["net"]
    net = Toy().modules["net"]
    net.load_state_dict(averaged)
    net.load_state_dict(last)
    assert not torch.equal(averaged["0.weight"], last["0.weight"])
    assert torch.equal(averaged["1.running_mean"], last["1.running_mean"])


def test_folders_that_cannot_be_used_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume, or choose a new folder"):
        train(Toy(), CONFIG, whole)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="not a run that can be resumed"):
            train(Toy(), CONFIG, path, resume=True)
        with pytest.raises(UserError, match="not a run"):
            load_run(path)
    with pytest.raises(UserError, match="neither steps nor minutes"):
        train(Toy(), TrainConfig(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_changed_settings_are_named_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 3)
    task = Toy()
    task.recipe = {"data": {"name": "digits", "sides": (1, 2)}, "width": 64}
    with pytest.raises(KeyboardInterrupt):
        train(task, TrainConfig(steps=6), tmp_path, quiet=True)
    with pytest.raises(UserError, match=r"steps \(was 6, now 7\)"):
        train(task, TrainConfig(steps=7), tmp_path, resume=True)
    other = Toy()
    other.recipe = {"data": {"name": "emoji", "sides": (1, 2)}, "depth": 2, "width": 64}
    with pytest.raises(
        UserError, match=r"recipe.data.name \(was 'digits', now 'emoji'\), recipe.depth .* train.lr"
    ):
        train(other, TrainConfig(steps=6, lr=2e-3), tmp_path, resume=True)
    assert train(task, TrainConfig(log_every=1), tmp_path, resume=True, quiet=True).step == 6


# --- interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_outright_ends_as_the_uninterrupted_run(kills: int, whole: Path, tmp_path: Path) -> None:
    run, rng = tmp_path / "run", random.Random(time.time_ns())
    code = (
        "import sys, torch, pathlib; torch.set_num_threads(1); from test_trainer import *; "
        "train(Toy(delay=0.002), CONFIG, sys.argv[1], resume=pathlib.Path(sys.argv[1], 'config.json').exists())"
    )
    for after in ("step-000010", "step-000020", "step-000040")[:kills]:
        with open(tmp_path / "stderr", "w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", code, run], cwd=Path(__file__).parent, stderr=stderr
            )
        limit = time.monotonic() + 60
        while not (run / "checkpoints" / after).exists() and time.monotonic() < limit:
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.002)
        delay = rng.uniform(0, 0.05)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"it ended within {delay} s of {after}"
    train(Toy(), CONFIG, run, resume=True, quiet=True)
    assert_same_run(run, whole)


@pytest.mark.parametrize("step", [0, 9, 33])
def test_ctrl_c_saves_the_step_and_says_how_to_go_on(
    step: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(Toy(), CONFIG, tmp_path, quiet=True)
    assert explain(caught.value) == (
        130, f"interrupted; step {step + 1} of 60 is saved in {tmp_path}; go on with --resume"
    )  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(Toy(), CONFIG, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("step", [5, 25])
def test_a_crash_between_checkpoints_doubles_nothing(
    step: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, step, RuntimeError("power"))
    with pytest.raises(RuntimeError, match="power"):
        train(Toy(), CONFIG, tmp_path, quiet=True)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 2')
    (tmp_path / "checkpoints" / ".part-000000").mkdir()
    train(Toy(), CONFIG, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, whole)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, file",
    [
        (cut, "weights.safetensors"),
        (flip, "optimizer.safetensors"),
        (cut, "state.json"),
        (Path.unlink, "ema.safetensors"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage,
    file: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    stop_at(monkeypatch, 25, RuntimeError())
    with pytest.raises(RuntimeError):
        train(Toy(), CONFIG, tmp_path, quiet=True)
    damage(tmp_path / "checkpoints/step-000020" / file)
    train(Toy(), CONFIG, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, whole)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "step-000020 is damaged" in warning


def test_nothing_to_fall_back_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 5, RuntimeError())
    with pytest.raises(RuntimeError):
        train(Toy(), CONFIG, tmp_path, quiet=True)
    cut(tmp_path / "checkpoints/step-000000/ema.safetensors")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        train(Toy(), CONFIG, tmp_path, resume=True, quiet=True)
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_run(tmp_path)


def test_a_full_disk_leaves_the_earlier_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = runs.save_file, []

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 3 * len(runs.TENSOR_FILES):  # the last file of the checkpoint at step 20
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path)

    monkeypatch.setattr(runs, "save_file", save_file)
    with pytest.raises(OSError) as caught:
        train(Toy(), CONFIG, tmp_path, quiet=True)
    assert caught.value.errno == errno.ENOSPC
    code, line = explain(caught.value)
    assert code == 1 and "no space left on device" in line and "step-000020" in line
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000000", "step-000010"]
    train(Toy(), CONFIG, tmp_path, resume=True, quiet=True)
    assert_same_run(tmp_path, whole)


# --- numbers that are not finite ----------------------------------------------------------------------------------


def test_a_poisoned_batch_is_skipped_whole(tmp_path: Path) -> None:
    trainer = Trainer(Toy(poison=range(3, 4)), CONFIG)
    for _ in range(3):
        trainer.step(60)
    before = {k: v.clone() for k, v in trainer.checkpoint().tensors["weights"].items()}
    assert trainer.step(60) is None
    after = trainer.checkpoint()
    assert all(torch.equal(after.tensors["weights"][k], v) for k, v in before.items())
    assert after.scalars["skipped"] == 1 and after.scalars["step"] == 4
    assert trainer.step(60) is not None and trainer.at.bad_in_a_row == 0


def test_a_gradient_that_is_not_finite_is_skipped_too() -> None:
    class InfiniteSlope(Toy):
        def loss(self, phase, batch, step):
            loss, metrics = super().loss(phase, batch, step)
            return loss + (self.modules["net"][0].weight[0, 0] * 0).sqrt(), metrics

    trainer = Trainer(InfiniteSlope(), CONFIG)
    assert trainer.step(60) is None and trainer.at.bad_in_a_row == 1
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_ten_bad_steps_go_back_to_the_checkpoint_once_with_half_the_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(Toy(poison=range(12, 22)), CONFIG, tmp_path, quiet=True)
    assert "step 22: back to the weights of the last checkpoint" in capsys.readouterr().err
    end = log_of(tmp_path)[-2]
    assert end["skipped"] == 10
    assert end["lr"] < 0.5 * CONFIG.lr * (CONFIG.final + 0.2)


def test_training_that_stays_bad_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="10 steps in a row before step 32") as caught:
        train(Toy(poison=range(12, 60)), CONFIG, tmp_path, quiet=True)
    assert explain(caught.value)[0] == 1
    assert all(bool(v.isfinite().all()) for v in load_run(tmp_path)["net"].values())


def test_metrics_that_are_not_finite_become_null(tmp_path: Path) -> None:
    class Odd(Toy):
        def validate(self):
            return {"psnr": float("inf")}

    train(Odd(), TrainConfig(steps=2, checkpoint_every=1), tmp_path, quiet=True)
    assert log_of(tmp_path)[-1] == {"step": 2, "validation": {"psnr": None}}


# --- one step -----------------------------------------------------------------------------------------------------


class Line(Task):
    """A linear map, without noise: steps can be recomputed by hand."""

    recipe = {"name": "line"}
    phases: tuple[Phase, ...] = (Phase("all", ("line",)),)

    def __init__(self, batch_size: int = 4) -> None:
        torch.manual_seed(1)
        self.modules = {"line": nn.Linear(3, 2)}
        self.batch_size = batch_size
        self.dtypes: set[torch.dtype] = set()

    def batch(self, step: int, micro: int) -> Tensor:
        first = (step * 8 + micro * self.batch_size) * 3
        return torch.arange(first, first + 3 * self.batch_size).view(-1, 3).sin()

    def loss(self, phase: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        line = self.modules["line"]
        self.dtypes.add(line.weight.dtype)
        return (line(batch.to(line.weight.dtype)).float() - batch[:, :2]).square().mean(), {}


def trained(task: Task, **settings) -> dict[str, Tensor]:
    trainer = Trainer(task, TrainConfig(steps=20, **settings))
    for _ in range(20):
        trainer.step(20)
    return trainer.checkpoint().tensors["weights"]


def test_accumulated_micro_batches_equal_one_batch() -> None:
    whole, parts = trained(Line(8)), trained(Line(4), accumulation=2)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(whole["line.weight"], Line().modules["line"].weight)


def test_bfloat16_computes_with_cast_weights_and_trains_float32_masters() -> None:
    task = Line()
    low, full = trained(task, dtype="bfloat16"), trained(Line())
    assert task.dtypes == {torch.bfloat16}
    assert all(v.dtype == torch.float32 for v in low.values())
    assert not torch.equal(low["line.weight"], full["line.weight"])
    torch.testing.assert_close(low["line.weight"], full["line.weight"], rtol=0.02, atol=2e-3)
    assert not torch.equal(low["line.weight"], low["line.weight"].bfloat16().float())


def test_a_task_may_keep_parameters_in_float32() -> None:
    class Kept(Line):
        def keeps_float32(self, name: str) -> bool:
            return name == "line.weight"

        def loss(self, phase, batch, step):
            line = self.modules["line"]
            assert (line.weight.dtype, line.bias.dtype) == (torch.float32, torch.bfloat16)
            return nn.functional.linear(batch, line.weight, line.bias.float()).square().mean(), {}

    trained(Kept(), dtype="bfloat16")


class Game(Task):
    """Two players; the second uses what the first one kept, and starts later."""

    phases = (
        Phase("maker", ("maker",)),
        Phase("critic", ("critic",), lr_scale=2.0, betas=(0.0, 0.9), start=2),
    )
    batch_size = 4
    recipe = {"name": "game"}

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.modules = {"maker": nn.Linear(2, 2), "critic": nn.Linear(2, 1)}

    def batch(self, step: int, micro: int) -> Tensor:
        return torch.randn(4, 2)

    def loss(self, phase: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        maker, critic = self.modules["maker"], self.modules["critic"]
        assert maker.weight.requires_grad == (phase == "maker")
        assert critic.weight.requires_grad == (phase == "critic")
        if phase == "maker":
            self.made = maker(batch)
            return -critic(self.made).mean(), {}
        return critic(self.made.detach()).mean() - critic(batch).mean(), {"real": 1.0}


def test_each_phase_trains_its_own_parts_from_its_start() -> None:
    game = Game()
    trainer = Trainer(game, TrainConfig(steps=10, accumulation=2, weight_decay=0.0))
    critic = game.modules["critic"].weight.clone()
    for step in range(4):
        maker = game.modules["maker"].weight.clone()
        metrics = trainer.step(10)
        assert metrics is not None and ("critic_real" in metrics) == (step >= 2)
        assert not torch.equal(game.modules["maker"].weight, maker)
        assert torch.equal(game.modules["critic"].weight, critic) == (step < 2)
    assert {"loss", "grad_norm", "critic_loss", "critic_grad_norm"} <= metrics.keys()
    assert all(p.requires_grad for m in game.modules.values() for p in m.parameters())


def test_parameters_without_gradients_are_averaged_but_not_trained() -> None:
    task = Line()
    task.modules["line"].bias.requires_grad_(False)
    trainer = Trainer(task, TrainConfig(steps=4))
    trainer.step(4)
    assert not task.modules["line"].bias.requires_grad
    assert "all/line.bias/exp_avg" not in trainer.checkpoint().tensors["optimizer"]
    with pytest.raises(UserError, match="no parameter to train"):
        task.modules["line"].requires_grad_(False)
        Trainer(task, TrainConfig(steps=4))


# --- optimiser, schedule, average ---------------------------------------------------------------------------------


def test_schedules() -> None:
    def at(schedule: str, step: int, final: float = 0.1, warmup: int | float = 10) -> float:
        return lr_factor(schedule, step, 111, warmup, final)

    assert at("cosine", 0) == pytest.approx(0.005)
    assert at("cosine", 5) == pytest.approx(0.005 + 0.995 / 2)
    for schedule in ("cosine", "linear", "lin0", "wsd"):
        assert at(schedule, 10) == 1 and at(schedule, 110) == pytest.approx(0.1)
    assert at("cosine", 60) == pytest.approx(0.55) and at("linear", 60) == pytest.approx(0.55)
    assert at("lin0", 15) == 1 and at("lin0", 60) == pytest.approx(0.1 + 0.9 * 0.5 / 0.95)
    assert at("wsd", 89) == 1 > at("wsd", 91) and at("wsd", 100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert at("constant", 110) == 1 and at("linear", 0, warmup=0) == 1
    assert at("linear", 10, warmup=0.09) == 1 and at("linear", 9, warmup=0.09) < 1
    assert lr_factor("linear", 0, 1, 0.5, 0.1) == 1 and lr_factor("cosine", 2, 3, 100, 0.1) < 1


def test_decay_spares_what_var_spares() -> None:
    model = VARConfig(
        depth=1,
        width=8,
        heads=2,
        schedule=(1, 2),
        code_width=4,
        condition=ClassConfig(3),
        shared_modulation=True,
    ).build()
    decayed = {name for name, p in model.named_parameters() if decays(name, p)}
    assert decayed == {
        "conditioner.embed.weight", "embed.weight", "shared_modulation.weight", "final_modulation.weight",
        "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight",
        "blocks.0.ffn.up.weight", "blocks.0.ffn.down.weight",
    }  # fmt: skip
    assert not decays("tokenizer.quantizer.embedding.weight", torch.zeros(4, 2))


def test_muon_moves_the_matrices_of_blocks_and_resumes_by_name() -> None:
    """Its step is orthogonal, scaled to 0.2 sqrt(larger side): the root mean square of AdamW's (arXiv 2502.16982)."""
    torch.manual_seed(0)
    names = ("blocks.0.up.weight", "blocks.0.bias", "embed.weight")
    shapes = ((8, 4), (4,), (8, 4))

    def make() -> NamedOptimizer:
        parameters = {
            name: nn.Parameter(torch.zeros(shape)) for name, shape in zip(names, shapes, strict=True)
        }
        return NamedOptimizer(parameters, decays, 0.1, (0.9, 0.95), in_block)

    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]

    def step(optimizer: NamedOptimizer, at: int) -> None:
        for p, g in zip(optimizer.parameters.values(), gradients[at], strict=True):
            p.grad = g.clone()
        optimizer.step(0.01)

    one = make()
    step(one, 0)
    moved = one.parameters["blocks.0.up.weight"].detach() / (0.01 * 0.2 * 8**0.5)
    assert torch.linalg.svdvals(moved).sub(1).abs().max() < 0.4  # five Newton-Schulz steps come that near
    assert one.parameters["embed.weight"].detach().abs().sub(0.01).abs().max() < 1e-6  # AdamW's first step
    assert set(one.state_dict()) == {
        "blocks.0.up.weight/momentum_buffer",
        *(f"{name}/{kind}" for name in names[1:] for kind in ("exp_avg", "exp_avg_sq", "step")),
    }
    two = make()
    for name, p in two.parameters.items():
        p.data.copy_(one.parameters[name].data)
    two.load_state_dict({k: x.clone() for k, x in one.state_dict().items()})
    for at in (1, 2, 3):
        step(one, at)
        step(two, at)
    for name in names:
        assert torch.equal(one.parameters[name], two.parameters[name])


def test_weight_decay_follows_its_cosine() -> None:
    assert cosine(0.05, 0.08, 0, 101) == pytest.approx(0.05)
    assert cosine(0.05, 0.08, 50, 101) == pytest.approx(0.065)
    assert cosine(0.05, 0.08, 100, 101) == pytest.approx(0.08)
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = NamedOptimizer({"up.weight": p}, decays, 0.1, (0.9, 0.95))
    p.grad = torch.zeros(2, 2)
    optimizer.step(0.5, decay_factor=2.0)
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 1 - 0.5 * 0.2))


def test_adamw_matches_the_definition_and_its_state_moves_by_name() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(5, 3, 2)
    a, b = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    one = NamedOptimizer({"w": a}, decays, 0.1, (0.9, 0.95))
    expected, m, v = torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    for t, g in enumerate(gradients, 1):
        if t == 4:
            with torch.no_grad():
                b.copy_(a)
            two = NamedOptimizer({"other": nn.Parameter(torch.ones(2)), "w": b}, decays, 0.1, (0.9, 0.95))
            two.load_state_dict({k: x.clone() for k, x in one.state_dict().items()})
        a.grad = g.clone()
        one.step(0.01)
        if t >= 4:
            b.grad = g.clone()
            two.step(0.01)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / (
            (v / (1 - 0.95**t)).sqrt() + 1e-8
        )
    torch.testing.assert_close(a.detach(), expected)
    assert torch.equal(a, b)


def test_the_average_warms_up_and_swaps_in_and_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight  # tied
    ema, expected = EMA(module, 0.3), module[0].weight.detach().clone()
    for n in range(5):
        with torch.no_grad():
            module[0].weight.add_(1.0)
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module[0].weight.detach()
    live = module[0].weight.detach().clone()
    with pytest.raises(RuntimeError), ema.swapped_in():
        torch.testing.assert_close(module[0].weight.detach(), expected)
        assert not module.training
        raise RuntimeError
    assert torch.equal(module[0].weight, live) and module.training


# --- time, settings, progress -------------------------------------------------------------------------------------


class Clock:
    """Stands in for the module `time`: a step takes 1 s, the first two 10 s, and validating 30 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.steps = 0.0, 0
        monkeypatch.setattr(trainer_module, "time", self)
        monkeypatch.setattr(Toy, "after_step", self.after_step)
        monkeypatch.setattr(Toy, "validate", self.validate)

    def monotonic(self) -> float:
        return self.now

    def after_step(self, step: int) -> dict[str, float]:
        self.steps += 1
        self.now += 10 if self.steps <= 2 else 1
        return {}

    def validate(self) -> dict[str, float]:
        self.now += 30
        return {}


def test_minutes_become_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    task, config = Toy(), TrainConfig(minutes=10, validate_every=300)
    before = {k: v.clone() for k, v in task.modules["net"].state_dict().items()}
    expected = int(
        (600 - 25 - 30 - 30) / 1.1
    )  # less the measured steps and validation, and the last validation
    assert steps_for(10, task, config) == expected
    assert all(torch.equal(v, before[k]) for k, v in task.modules["net"].state_dict().items())


def test_a_resumed_run_keeps_the_steps_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    config = TrainConfig(minutes=1.5)
    original, calls = Toy.loss, []

    def loss(self: Toy, phase: str, batch: Tensor, step: int):
        calls.append(step)
        if len(calls) == 7 + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, phase, batch, step)

    monkeypatch.setattr(Toy, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        train(Toy(), config, tmp_path, quiet=True)
    assert recorded_steps(tmp_path) == int((90 - 25 - 30 - 30) / 1.06)
    assert train(Toy(), config, tmp_path, resume=True, quiet=True).step == recorded_steps(tmp_path)
    assert calls == [*range(7), *range(recorded_steps(tmp_path))]


def test_a_run_with_a_stable_phase_can_be_made_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(steps=20, schedule="wsd", warmup=2)
    stop_at(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        train(Toy(), config, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    longer = TrainConfig(steps=30, schedule="wsd", warmup=2)
    assert train(Toy(), longer, tmp_path / "run", resume=True, quiet=True).step == 30
    assert train(Toy(), longer, tmp_path / "whole", quiet=True).step == 30
    for name, value in load_run(tmp_path / "whole")["net"].items():
        assert torch.equal(load_run(tmp_path / "run")["net"][name], value)


def test_a_run_whose_decay_has_begun_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 18)
    with pytest.raises(KeyboardInterrupt):
        train(Toy(), TrainConfig(steps=20, schedule="wsd", warmup=2), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    for steps in (30, 10):
        other = TrainConfig(steps=steps, schedule="wsd", warmup=2)
        with pytest.raises(UserError, match=rf"steps \(was 20, now {steps}\)"):
            train(Toy(), other, tmp_path / "run", resume=True, quiet=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps is 0"), ({"minutes": -1}, "minutes is -1"), ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"), ({"accumulation": 0}, "accumulation is 0"), ({"ema": 1.0}, "ema is 1.0"),
        ({"warmup": 1.5}, "warmup is 1.5"), ({"warmup": -3}, "warmup is -3"), ({"betas": (0.9, 1.0)}, "betas are"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"), ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"seed": -1}, "seed -1"), ({"clip": -1.0}, "clip is -1.0"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig(**settings)
    assert "\n" not in str(caught.value)


def test_progress_in_lines_on_a_bar_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = TrainConfig(steps=4, log_every=1)
    train(Toy(), config, tmp_path / "quiet", quiet=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    train(Toy(), config, tmp_path / "lines")
    out, lines = capsys.readouterr()
    assert out == "" and "step 2/4  loss " in lines and "pictures/s" in lines and "left" in lines
    assert "validation level" in lines.splitlines()[-1] and "4/4" in lines.splitlines()[-1]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(Toy(), config, tmp_path / "bar")
    assert "4/4" in capsys.readouterr().err


def test_the_log_is_seen_as_it_is_written(tmp_path: Path) -> None:
    seen: list[dict] = []
    train(Toy(), TrainConfig(steps=3, log_every=1), tmp_path, quiet=True, on_log=seen.append)
    assert seen == [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert seen[0]["pictures_per_second"] > 0 and loop.BAD_STEPS == 10

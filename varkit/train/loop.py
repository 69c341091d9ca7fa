"""Training in a run's folder: start or resume, log, validate, checkpoint, end.

The order of events after a step (log lines, then the checkpoint) and truncating the log to the checkpoint on resume
are what makes a killed and resumed run equal an uninterrupted one, in its weights bit for bit and in its log.
"""

import dataclasses
import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit import __version__
from varkit.errors import UserError
from varkit.files import StrPath
from varkit.train.memory import keep_freed_memory
from varkit.train.optim import lr_factor
from varkit.train.progress import Progress, say
from varkit.train.runs import Run
from varkit.train.task import Task, TrainConfig
from varkit.train.trainer import Trainer, measure

BAD_STEPS = 10
"""Non-finite steps in a row before the last checkpoint is restored, and later before training gives up."""

MAY_CHANGE = ("steps", "minutes", "log_every", "validate_every", "checkpoint_every", "checkpoint_minutes")
"""Settings that a resumed run may change (`steps` is compared with the resolved number)."""

SHOWN = 3
"""Validation metrics beside the progress bar: the first ones."""


class TrainingDiverged(RuntimeError):
    """Losses or gradients stayed non-finite, also after restoring a checkpoint with half the learning rate."""


@dataclass(frozen=True)
class Result:
    """step: steps done. metrics: the last validation's. path: the run's folder."""

    step: int
    metrics: dict[str, float]
    path: Path


def train(
    task: Task,
    config: TrainConfig,
    run_dir: StrPath,
    resume: bool = False,
    quiet: bool = False,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    sharded: bool = False,
) -> Result:
    """Train `task` in the folder `run_dir`, or continue the run that is there.

    A continued run ends with the same weights, bit for bit, as one that was never interrupted (same machine, versions
    and threads). `on_log` sees each line of the log. Under `varkit.ranks.together` all processes call this, and
    the first writes; `sharded` spreads the weights over them, and the task's modules stay so afterwards.
    """
    keep_freed_memory()
    trainer = Trainer(task, config, sharded)
    ranks = trainer.ranks
    run, steps = _open(trainer, run_dir, resume)
    if done := run.finished():
        return Result(done["step"], done["metrics"], run.path)
    with Progress(steps, quiet or not ranks.first) as progress, _held_interrupt() as pressed:
        _restore_or_start(trainer, run, progress)
        saved_at = time.monotonic()
        while trainer.at.step < steps:
            _advance(trainer, run, steps, progress)
            for event in _events(trainer, run, steps, progress):
                run.log(event)
                if on_log:
                    on_log(event)
            step = trainer.at.step
            interrupted = ranks.any(pressed())
            late = ranks.any(time.monotonic() - saved_at > 60 * config.checkpoint_minutes)
            if late or step % config.checkpoint_every == 0 or step == steps or interrupted:
                _save(trainer, run)
                saved_at = time.monotonic()
            if interrupted and step < steps:
                raise KeyboardInterrupt(f"step {step} of {steps} is saved in {run.path}; go on with --resume")
    if ranks.first:
        run.finish(steps, trainer.at.metrics)
    ranks.wait()
    return Result(steps, trainer.at.metrics, run.path)


def load_run(run_dir: StrPath, ema: bool = True) -> dict[str, dict[str, Tensor]]:
    """The newest weights of a run, finished or not: part -> state dict. Averaged ones unless `ema` is False."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in Run.open(run_dir).weights(ema, say).items():
        part, _, path = name.partition(".")
        parts.setdefault(part, {})[path] = value
    return parts


def steps_for(minutes: float, task: Task, config: TrainConfig) -> int:
    """Steps, with their share of validation, that fit into `minutes` on this machine; the task is left as it was."""
    return measure(Trainer(task, config), minutes)


def recorded_steps(run_dir: StrPath) -> int:
    """The steps that a run was started with, for a recipe that needs them to build its task again."""
    return int(Run.open(run_dir).read_config()["steps"])


def _open(trainer: Trainer, run_dir: StrPath, resume: bool) -> tuple[Run, int]:
    """The run's folder, and its steps: given, measured once, or read from a run that is resumed."""
    config, ranks = trainer.config, trainer.ranks
    # Through JSON, so that tuples compare with the lists that they become.
    now = json.loads(json.dumps({"recipe": trainer.task.recipe, "train": dataclasses.asdict(config)}))
    if resume:
        run = Run.open(run_dir)
        record = run.read_config()
        before = int(record["steps"])
        steps = config.steps or before
        free = not run.finished() and _same_so_far(config, run.reached(), before, steps)
        _check_unchanged(record, now | {"steps": before if free else steps})
        if ranks.first:
            _warn_if_moved(record["versions"])
            if steps != before:
                run.write_config(record | {"steps": steps})
        return run, steps
    if config.steps is None and config.minutes is None:
        raise UserError("neither steps nor minutes were given; say how long to train, e.g. --minutes 10")
    run = Run.create(run_dir) if ranks.first else Run(run_dir)
    steps = ranks.told(config.steps or measure(trainer, config.minutes or 0.0))
    if ranks.first:
        run.write_config({"format_version": 1, **now, "steps": steps, "versions": _versions()})
    ranks.wait()
    return run, steps


def _same_so_far(config: TrainConfig, reached: int, before: int, after: int) -> bool:
    """Whether the steps done would have been the same in a run of `after` steps as in one of `before`, so that the
    end may be moved: those of `wsd` are, while it is stable.
    """

    def rate(step: int, steps: int) -> float:
        return lr_factor(config.schedule, step, steps, config.warmup, config.final)

    decays_alike = config.final_weight_decay is None or reached == 0
    return (
        reached <= after and decays_alike and all(rate(s, before) == rate(s, after) for s in range(reached))
    )


def _versions() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "varkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _check_unchanged(record: dict[str, Any], now: dict[str, Any]) -> None:
    # A setting that came later than the run had its default then.
    defaults = {"train": json.loads(json.dumps(dataclasses.asdict(TrainConfig())))}
    before, after = _flat(defaults) | _flat({key: record[key] for key in now}), _flat(now)
    skip = {f"train.{name}" for name in MAY_CHANGE}
    changed = [
        f"{key} (was {before.get(key)!r}, now {after.get(key)!r})"
        for key in sorted((before.keys() | after.keys()) - skip)
        if before.get(key) != after.get(key)
    ]
    if changed:
        raise UserError(
            f"the run was started with other settings: {', '.join(changed)}; resume with the same ones, or start "
            "a new run"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one, with keys `a.b.c`."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _warn_if_moved(before: dict[str, Any]) -> None:
    moved = [f"{k} {v} (was {before.get(k)})" for k, v in _versions().items() if v != before.get(k)]
    if moved:
        say(
            f"resuming with {', '.join(moved)}: the weights may differ from an uninterrupted run's in their last bits"
        )


def _save(trainer: Trainer, run: Run) -> None:
    """A checkpoint, by those who together have what is in it."""
    if trainer.replicas.first:
        run.save(trainer.at.step, trainer.checkpoint(), trainer.holders)


def _restore_or_start(trainer: Trainer, run: Run, progress: Progress) -> None:
    checkpoint = run.newest(progress.say, trainer.holders)
    if checkpoint:
        trainer.restore(checkpoint)
    trainer.ranks.wait()
    if trainer.ranks.first:
        run.rewind(trainer.at.step)
    if not checkpoint:
        _save(trainer, run)
    progress.begin(trainer.at.step)


def _advance(trainer: Trainer, run: Run, steps: int, progress: Progress) -> None:
    """One step, its time, and the consequences when it was not finite."""
    start = time.monotonic()
    metrics = trainer.step(steps)
    seconds = time.monotonic() - start
    at = trainer.at
    at.seconds += seconds
    if metrics is not None:
        at.add(metrics | {"seconds_per_step": seconds})
    elif at.bad_in_a_row == 1:
        progress.say(f"step {at.step}: the loss or its gradient is not finite; the step is skipped")
    if at.bad_in_a_row >= BAD_STEPS:
        _go_back(trainer, run, progress)
    progress.advance()


def _go_back(trainer: Trainer, run: Run, progress: Progress) -> None:
    """The last checkpoint's weights at the present step, so on other data, with half the learning rate; but once."""
    at = trainer.at
    if at.restored:
        raise TrainingDiverged(
            f"loss or gradients were not finite for {BAD_STEPS} steps in a row before step {at.step}, again after "
            "going back to a checkpoint with half the learning rate; use a learning rate well below "
            f"{trainer.config.lr:g}, or look at the data"
        )
    checkpoint = run.newest(progress.say, trainer.holders)
    assert checkpoint is not None, "a run begins with a checkpoint"
    trainer.restore_tensors(checkpoint)
    at.restored, at.lr_scale, at.bad_in_a_row = True, at.lr_scale / 2, 0
    progress.say(f"step {at.step}: back to the weights of the last checkpoint, with half the learning rate")


def _events(trainer: Trainer, run: Run, steps: int, progress: Progress) -> list[dict[str, Any]]:
    """Lines for the log that are due at this step; the picture, if one is due, is saved."""
    at, config, last = trainer.at, trainer.config, trainer.at.step == steps
    events: list[dict[str, Any]] = []
    if at.step % config.log_every == 0 or last:
        means = at.means()
        if seconds := means.pop("seconds_per_step", 0.0):
            means["pictures_per_second"] = trainer.task.batch_size * config.accumulation / seconds
            progress.note({"loss": means["loss"], "pictures/s": means["pictures_per_second"]})
        events.append({"step": at.step, **means, "skipped": at.skipped, "seconds": round(at.seconds, 3)})
    if at.step % config.validate_every == 0 or last:
        at.metrics, picture = trainer.validate() if trainer.replicas.first else ({}, None)
        at.metrics = trainer.ranks.told(at.metrics)
        if picture is not None and trainer.ranks.first:
            run.save_sample(at.step, picture)
        if at.metrics:
            events.append({"step": at.step, "validation": at.metrics})
            progress.note({f"validation {name}": v for name, v in list(at.metrics.items())[:SHOWN]})
    return events if trainer.ranks.first else []


@contextmanager
def _held_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, and acted on between steps; a second one interrupts at once. Yields whether it was pressed."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def hold(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)

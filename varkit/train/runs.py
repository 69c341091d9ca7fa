"""The folder of a training: its settings, log, pictures and checkpoints, at any instant ready to be resumed.

    RUN/config.json                        recipe, training settings, resolved steps, versions
    RUN/log.jsonl                          one JSON object a line
    RUN/samples/step-000500.png
    RUN/checkpoints/step-000500/           weights, ema, optimizer and task .safetensors, state.json; of a sharded run,
                                           folders weights, ema and optimizer with a file from each rank
    RUN/DONE                               the final metrics

A checkpoint appears by one rename, complete and on disk, under a name of its own; the two newest are kept. `kill -9`
therefore costs at most the steps since the last one.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from varkit.errors import UserError
from varkit.files import StrPath, atomic_write, ensure_writable, write_json
from varkit.ranks import Ranks
from varkit.train.sharding import load_shards, save_shards, shared_folder

if TYPE_CHECKING:
    from PIL import Image

KEPT = 2
TENSOR_FILES = ("weights", "ema", "optimizer", "task")
ALONE = Ranks()


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by file (`weights`, `ema`, `optimizer`, `task`), then by name. scalars: JSON."""

    tensors: dict[str, dict[str, Tensor]]
    scalars: dict[str, Any]


class Run:
    """A run's folder; see the head of this file."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"
        self.log_file = self.path / "log.jsonl"

    @classmethod
    def create(cls, path: StrPath) -> "Run":
        """A new run; a folder with anything in it is refused."""
        run = cls(path)
        if run.path.is_dir() and any(not is_partial(p) for p in run.path.iterdir()):
            raise UserError(
                f"the folder {str(path)!r} already has files in it; continue that run with --resume, or choose "
                "a new folder"
            )
        ensure_writable(run.path)
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    @classmethod
    def open(cls, path: StrPath) -> "Run":
        """An existing run."""
        run = cls(path)
        if not (run.path / "config.json").is_file():
            raise UserError(
                f"{str(path)!r} is not a run that can be resumed (it has no config.json); give the folder of an "
                "earlier training, or start a new one without --resume"
            )
        return run

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote."""
        path = self.path / "config.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{str(path)!r} is damaged ({error}); start a new run") from error

    def write_config(self, config: dict[str, Any]) -> None:
        """Record what is trained and how."""
        write_json(self.path / "config.json", config)

    def log(self, event: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null."""
        line = json.dumps(_finite(event), allow_nan=False)
        try:
            with open(self.log_file, "a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        except OSError as error:
            error.filename = str(self.log_file)  # unlike `open`, a failing write does not name the file
            raise

    def rewind(self, step: int) -> None:
        """Drop whatever is later than `step`: log lines, and checkpoints that turned out to be damaged; and what a
        process killed outright left half-written.
        """
        for path in self._saved():
            if _step_of(path) > step:
                shutil.rmtree(path)
        remove_leftovers(self.path, self.checkpoints, self.samples)
        lines = self.log_file.read_text(encoding="utf-8").splitlines() if self.log_file.exists() else []
        kept = [line for line in lines if _logged_step(line) <= step]
        with atomic_write(self.log_file) as part:
            part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def save_sample(self, step: int, picture: "Image.Image") -> None:
        """Keep a picture as samples/step-N.png."""
        with atomic_write(self.samples / f"step-{step:06d}.png") as part:
            picture.save(part)

    def save(self, step: int, checkpoint: Checkpoint, holders: Ranks = ALONE) -> None:
        """Write a checkpoint, then drop all but the newest two; all `holders` of a sharded one call it."""
        with shared_folder(self.checkpoints / f"step-{step:06d}", holders) as part:
            for name in TENSOR_FILES:
                _write(part, name, checkpoint.tensors[name], holders)
            holders.wait()
            files = sorted(part.rglob("*.safetensors"))[holders.rank :: holders.world]
            own = {file.relative_to(part).with_suffix("").as_posix(): _digest(file) for file in files}
            digests = holders.merged(own)
            if holders.first:
                write_json(part / "state.json", {"digests": digests, **_finite(checkpoint.scalars)})
        if holders.first:
            for old in self._saved()[KEPT:]:
                shutil.rmtree(old)

    def reached(self) -> int:
        """The step of the newest checkpoint, 0 before there is one."""
        return max(map(_step_of, self._saved()), default=0)

    def newest(self, warn: Callable[[str], None], holders: Ranks = ALONE) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None when there is none yet."""
        saved = self._saved()
        for path in saved:
            try:
                return _read(path, TENSOR_FILES, holders)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                warn(f"checkpoint {path} is damaged ({error}); trying the one before it")
        if saved:
            raise UserError(
                f"no checkpoint in {str(self.checkpoints)!r} can be read; start a new run in another folder"
            )
        return None

    def weights(self, ema: bool, warn: Callable[[str], None]) -> dict[str, Tensor]:
        """The newest readable (averaged) weights by `part.path`."""
        name = "ema" if ema else "weights"
        for path in self._saved():
            try:
                return _read(path, (name,), ALONE).tensors[name]
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                warn(f"checkpoint {path} is damaged ({error}); trying the one before it")
        raise UserError(
            f"there is no readable checkpoint in {str(self.checkpoints)!r}; train first, or give another folder"
        )

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Mark the run as complete."""
        write_json(self.path / "DONE", {"step": step, "metrics": _finite(metrics)})

    def finished(self) -> dict[str, Any] | None:
        """The step and the final metrics of a complete run, or None."""
        done = self.path / "DONE"
        return dict(json.loads(done.read_text(encoding="utf-8"))) if done.exists() else None

    def _saved(self) -> list[Path]:
        """Checkpoints, newest first."""
        return sorted(self.checkpoints.glob("step-*"), key=_step_of, reverse=True)


def is_partial(path: Path) -> bool:
    """Whether a process was killed outright while it wrote this file or folder (`varkit.files`)."""
    return path.name.startswith(".part-")


def remove_leftovers(*folders: Path) -> None:
    """Remove what processes killed outright left in the folders themselves: half-written, or moved aside."""
    for path in [p for folder in folders for pattern in (".part-*", ".old-*") for p in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write(part: Path, name: str, tensors: dict[str, Tensor], holders: Ranks) -> None:
    if holders.world > 1 and name != "task":  # a task's tensors are whole on every rank
        save_shards(part / name, tensors)
    elif holders.first:
        # Copies, because safetensors refuses tensors that share memory.
        copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(copies, part / f"{name}.safetensors")


def _read(path: Path, names: tuple[str, ...], holders: Ranks) -> Checkpoint:
    """Sharded over the holders, where it was written so; each of them looks for damage in some of the files."""
    scalars = json.loads((path / "state.json").read_text(encoding="utf-8"))
    digests = scalars.pop("digests")
    files = sorted(file for file in digests if file.partition("/")[0] in names)
    damaged = [
        file
        for file in files[holders.rank :: holders.world]
        if not _is_intact(path / f"{file}.safetensors", digests[file])
    ]
    if not holders.all(not damaged):
        raise ValueError(f"{' and '.join(damaged) or 'a file'} is not what was written")
    return Checkpoint({name: _load(path / name, holders) for name in names}, scalars)


def _load(path: Path, holders: Ranks) -> dict[str, Tensor]:
    return load_shards(path, holders) if path.is_dir() else load_file(path.with_suffix(".safetensors"))


def _is_intact(file: Path, digest: str) -> bool:
    return file.is_file() and _digest(file) == digest


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "blake2b").hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _logged_step(line: str) -> float:
    """The step of a log line; a line torn by a crash is later than any step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a training was asked for, and whether its folder may be used for that."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from varkit.devices import AUTO, find_device
from varkit.errors import UserError
from varkit.files import StrPath
from varkit.ranks import current
from varkit.train.runs import is_partial
from varkit.train.task import TrainConfig


@dataclass(frozen=True)
class Request:
    """What a user asked for. minutes and steps replace the recipe's; tokenizer is a folder with a trained one.

    compile: compile blocks and losses first, which pays off in longer trainings. accumulation: micro-batches that each
    batch is split into; several processes share them. shard: processes hold one copy of the generator together. start:
    the folder of a trained model whose tokenizer is used and whose generator and heads are trained further. device: as
    `varkit.devices.find_device` knows it. system: what the recipe is made into, if not left as it is.
    """

    recipe: str
    minutes: float | None = None
    steps: int | None = None
    tokenizer: str | None = None
    seed: int = 0
    compile: bool = False
    accumulation: int = 1
    shard: bool = False
    start: str | None = None
    device: str = "cpu"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise UserError(
                f"both --minutes {self.minutes} and --steps {self.steps} were given; give one of them"
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UserError(
                f"--minutes {self.minutes} is not a number above 0; say how long to train, e.g. --minutes 10"
            )
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps {self.steps} is below 1; train for at least 1 step")
        if self.start is not None and self.tokenizer is not None:
            raise UserError(
                f"both --from {self.start} and --tokenizer {self.tokenizer} were given; --from brings its own tokenizer"
            )
        if self.accumulation < 1:
            raise UserError(f"--accumulation is {self.accumulation}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed} is out of range; use an integer from 0 to 2^63 - 1")

    def apply(self, config: TrainConfig, share: float) -> TrainConfig:
        """A stage's settings, with its share of the minutes."""
        if self.steps is not None:
            config = replace(config, steps=self.steps, minutes=None)
        elif self.minutes is not None:
            config = replace(config, steps=None, minutes=self.minutes * share)
        return replace(config, seed=self.seed, compile=self.compile, accumulation=self.accumulation)

    @property
    def place(self) -> torch.device:
        """The device. Raises `UserError` for one that is not there, or for several processes beside a CPU."""
        if current().world > 1 and self.device == AUTO:
            return torch.device("cpu")
        device = find_device(self.device)
        if current().world > 1 and device.type != "cpu":
            raise UserError(
                f"several processes train on CPUs, not on {self.device!r}; use --device cpu, or one process"
            )
        return device

    def micro_batch(self, batch_size: int) -> int:
        """Pictures of a micro-batch."""
        if batch_size % self.accumulation:
            raise UserError(
                f"a batch of {batch_size} cannot be split into {self.accumulation}; use an --accumulation that "
                f"divides {batch_size}"
            )
        return batch_size // self.accumulation


def check_run(out: StrPath, request: Request, resume: bool) -> None:
    """Raise `UserError` unless `out` is new or empty, or, with `resume`, was begun with the same request.

    What a process killed outright left half-written does not count; `varkit.train.run.begin` removes it.
    """
    root = Path(out)
    if resume:
        # A setting that came later than the run had its default then.
        before = asdict(type(request)(request.recipe)) | _begun_with(root)
        asked = asdict(request)
        changed = [
            f"{k} (was {before.get(k)!r}, now {v!r})"
            for k, v in asked.items()
            if k not in ("steps", "shard", "device") and before.get(k) != v
        ]
        if changed:
            raise UserError(
                f"the training in {str(root)!r} was started with other settings: {', '.join(changed)}; "
                "resume with those"
            )
        return
    if root.exists() and (not root.is_dir() or any(not is_partial(path) for path in root.iterdir())):
        raise UserError(f"{str(root)!r} is not an empty folder; choose another --out, or go on with --resume")


def _begun_with(root: Path) -> dict[str, Any]:
    record = root / "request.json"
    if not record.is_file():
        raise UserError(f"{str(root)!r} is not a training's folder; leave --resume out to start there")
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(record)!r} is damaged ({error}); start a new training") from error

"""What the trainer is given: a task (modules, batches, losses) and how to train it.

A recipe writes a `Task`; `varkit.train.loop.train` does everything else. Randomness: torch's generator is seeded
from (seed, step, ...) before each call into the task, and `batch` is a pure function of (step, micro), so a resumed
run needs no state of the data and repeats an uninterrupted one bit for bit.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from varkit.errors import UserError, unknown_name
from varkit.train.optim import decays

if TYPE_CHECKING:
    from PIL import Image

SCHEDULES = ("cosine", "linear", "constant", "lin0", "wsd")
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Phase:
    """One optimiser over some parts; most tasks have one, adversarial ones a second for the discriminator.

    It takes part from step `start` on. `betas` and `weight_decay` default to the
    run's. `decays(name, parameter)` says which parameters are decayed (VAR's rule by default).
    """

    name: str
    parts: tuple[str, ...]
    lr_scale: float = 1.0
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    decays: Callable[[str, Tensor], bool] = decays
    start: int = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError(f"phase {self.name!r} trains no part; name at least one of the task's modules")
        if self.start < 0:
            raise UserError(f"phase {self.name!r} starts at step {self.start}; it must be >= 0")


class Task(Protocol):
    """What is trained. Subclass it: the methods with a body may be left as they are.

    modules: everything trained, by part name. recipe: JSON that says what the task is; a run resumes only with an equal
    one. batch_size: pictures in one `batch`. Of a micro-batch the losses of all phases are computed one after the
    other, so a phase may use what an earlier one kept; then every optimiser steps.
    """

    modules: Mapping[str, nn.Module]
    phases: tuple[Phase, ...]
    recipe: dict[str, Any]
    batch_size: int

    def batch(self, step: int, micro: int) -> Any:
        """The micro-batch number `micro` of `step`, a pure function of both."""
        ...

    def loss(self, phase: str, batch: Any, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The phase's loss, a scalar, and metrics to log. In a bfloat16 run the modules' weights are bfloat16 here."""
        ...

    def keeps_float32(self, name: str) -> bool:
        """Whether the parameter (`part.path`) stays float32 in a bfloat16 run: quantizers, discriminators."""
        return False

    def after_step(self, step: int) -> dict[str, float]:
        """Bookkeeping without gradients after the optimisers' step, such as reviving dead codes; metrics to log."""
        return {}

    def moved(self) -> Iterable[Tensor]:
        """Parameters that `after_step` may have changed; several processes then make them equal again."""
        return ()

    def validate(self) -> dict[str, float]:
        """Metrics of the averaged weights, which the modules hold during the call."""
        return {}

    def samples(self) -> "Image.Image | None":
        """A picture of where training is, made with the averaged weights."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors beside the modules that a resumed run needs (a codebook keeper's counts)."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        return None


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Give `steps`, or `minutes`, which are turned into steps once and recorded in the run.

    warmup: steps (an integer), or a part of the run (a float below 1; VAR's is 0.02). final: the learning rate at the
    end, as a fraction of `lr`. final_weight_decay: where the weight decay goes along a cosine (VAR's twde). optimizer:
    "muon" moves the matrices of blocks by Muon (arXiv 2502.16982) and the rest by AdamW. accumulation: micro-batches in
    a step. ema: decay of the averaged weights, which ramps up from 0.1. clip: largest gradient norm, 0 for none. A
    checkpoint is due every `checkpoint_every` steps and every `checkpoint_minutes`. compile: `torch.compile` for what
    modules name as `compilable`; it needs a C++ compiler.
    """

    steps: int | None = None
    minutes: float | None = None
    accumulation: int = 1
    lr: float = 1e-3
    warmup: int | float = 0.02
    schedule: str = "cosine"
    final: float = 0.1
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 2.0
    ema: float = 0.999
    dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("accumulation", "log_every", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}; train for at least 1 step")
        for name in ("minutes", "lr", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} is {value}; it must be a number above 0")
        for name, below_1 in (("final", False), ("ema", True), ("weight_decay", False), ("clip", False)):
            value = getattr(self, name)
            if not 0 <= value < (1 if below_1 else math.inf):
                raise UserError(f"{name} is {value}; it must be >= 0{' and below 1' if below_1 else ''}")
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup >= 1):
            raise UserError(
                f"warmup is {self.warmup}; give steps as an integer >= 0, or a part of the run in [0, 1)"
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"betas are {self.betas}; give two numbers in [0, 1), such as (0.9, 0.95)")
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        for name, known in (("dtype", DTYPES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        if self.final_weight_decay is not None and not 0 <= self.final_weight_decay < math.inf:
            raise UserError(f"final_weight_decay is {self.final_weight_decay}; it must be >= 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is out of range; use an integer from 0 to 2^63 - 1")

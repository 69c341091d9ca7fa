"""`varkit adapt`: go on with a trained model by a method of post-training, whose settings are its options."""

from dataclasses import asdict, dataclass, field, make_dataclass
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from varkit.cli.console import log
from varkit.errors import UserError
from varkit.files import ensure_writable


@dataclass(frozen=True)
class Adapt:
    """Go on with a trained model by a method of post-training.

    varkit adapt METHOD MODEL --out RUN; methods: finetune (train on, on the same or other pictures), sar (refine a
    next-scale model on its own predictions), reward (learn from verdicts on one's own pictures).
    varkit adapt METHOD --help tells a method's own options.
    """

    model: Positional[str]
    """The model to begin with: a bundled one, a saved folder, or a training's output folder."""
    out: Path
    """Folder for checkpoints, logs, sample grids and the finished model."""
    data: str | None = None
    """A recipe, or a data set, folder of pictures or array file; by default what the model was trained on."""
    steps: int | None = None
    """Steps of training; by default a small part of the model's own."""
    minutes: float | None = None
    """How long to train, in place of steps; turned into steps once."""
    lr: float | None = None
    """Highest learning rate; by default a part of the recipe's."""
    batch: int | None = None
    """Pictures in a step; by default the recipe's."""
    pictures: int | None = None
    """Pictures to encode and learn from, of a finite set at least all; by default the recipe's."""
    resume: bool = False
    """Go on with the training in --out where it stopped."""
    seed: int = 0
    """Seed of everything random."""
    accumulation: int = 1
    """Split each batch into this many micro-batches, which the processes of torchrun share."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ...; by default CUDA's first device if there is one."""
    compile: bool = False
    """Compile the networks' blocks first: faster steps after minutes of waiting. Needs a C++ compiler."""

    @staticmethod
    def narrowed(name: str) -> type["Adapt"]:
        """The command of one method, with its settings as options. Raises `UserError` for an unknown one."""
        from varkit.adapt.registry import find_method

        method = find_method(name)
        settings = ("settings", Annotated[method, arg(name="")], field(default_factory=method))
        command = make_dataclass("Adapt", [settings], bases=(_By,), frozen=True, namespace={"method": name})
        command.__doc__ = getdoc(method)
        return command

    def run(self) -> None:
        """Raise `UserError`: a method is named first."""
        from varkit.adapt.registry import METHODS

        raise UserError(
            f"no method is named before {self.model!r}; write: varkit adapt METHOD {self.model} --out {self.out}, "
            f"with one of {', '.join(METHODS)}"
        )


class _By(Adapt):
    """A command with a method's settings."""

    method: ClassVar[str]
    settings: Any

    def run(self) -> None:
        """Train, and say where the result is; under torchrun, the first process says it."""
        from varkit.adapt.run import Adaptation, adapt_model, source_of
        from varkit.hub.pipeline import load
        from varkit.ranks import together
        from varkit.train.run import check_run

        with together() as ranks:
            told, start = asdict(self.settings), load(self.model)
            source, system = source_of(start, self.data)
            request = Adaptation(
                source, self.minutes, self.steps, None, self.seed, self.compile,
                self.accumulation, start=self.model, device=self.device, system=system, method=self.method,
                settings=told, lr=self.lr, batch=self.batch, pictures=self.pictures,
            )  # fmt: skip
            if ranks.first:
                check_run(self.out, request, self.resume)
                ensure_writable(self.out / "request.json")
            made = adapt_model(request, start, self.settings, self.out, self.resume, log)
            if ranks.first:
                print(made)

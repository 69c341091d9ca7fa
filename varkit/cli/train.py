"""`varkit train`: make a model from a recipe or from a folder of pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from varkit.cli.console import log
from varkit.errors import UserError
from varkit.files import ensure_writable

if TYPE_CHECKING:
    from varkit.train.run import Request


@dataclass(frozen=True)
class Train:
    """Train a tokenizer and a generator from a recipe or your own pictures."""

    recipe: Positional[str]
    """A recipe (scenes, digits), a data set (emoji, photographs), a folder of pictures, or an .npy / .npz file;
    `features` makes the network that `varkit evaluate --suite fid` compares pictures by."""
    out: Path
    """Folder for checkpoints, logs, sample grids and the finished model."""
    system: str | None = None
    """Make the model by another system, of the same pictures, sizes and time: var, llamagen, infinity, mar, flexvar,
    m-var, mvar-markov, hmar or nfig."""
    minutes: float | None = None
    """How long to train in all; turned into steps once."""
    steps: int | None = None
    """Steps of each stage, in place of minutes."""
    tokenizer: Path | None = None
    """Folder of a trained model whose tokenizer is used, so that only the generator is trained."""
    start: Annotated[Path | None, arg(name="from")] = None
    """Folder of a trained model whose tokenizer is used, and whose generator is trained further, as by this recipe."""
    resume: bool = False
    """Go on with the training in --out where it stopped."""
    seed: int = 0
    """Seed of everything random."""
    accumulation: int = 1
    """Split each batch into this many micro-batches, which the processes of torchrun share."""
    shard: bool = False
    """The processes of torchrun hold one copy of the generator together, each a part of it, in place of one each."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ...; by default CUDA's first device if there is one."""
    compile: bool = False
    """Compile the networks' blocks first: faster steps after minutes of waiting. Needs a C++ compiler."""

    def run(self) -> None:
        """Train, and say where the result is; under torchrun, the first process says it."""
        from varkit.ranks import together

        with together() as ranks:
            made = self._features() if self.recipe == "features" else self._model(ranks.first)
            if ranks.first:
                print(made)

    def _request(self) -> "Request":
        from varkit.train.run import Request

        tokenizer = None if self.tokenizer is None else str(self.tokenizer)
        return Request(
            self.recipe,
            self.minutes,
            self.steps,
            tokenizer,
            self.seed,
            self.compile,
            self.accumulation,
            self.shard,
            None if self.start is None else str(self.start),
            self.device,
            self.system,
        )

    def _model(self, first: bool) -> Path:
        from varkit.train.recipes import find_recipe
        from varkit.train.run import check_run, train_recipe

        request = self._request()
        if first:
            check_run(self.out, request, self.resume)
            ensure_writable(self.out / "request.json")
        recipe, dataset = find_recipe(self.recipe, self.system)
        model = train_recipe(request, recipe, dataset, self.out, self.resume, log)
        if first and dataset.report.counts:
            log(f"pictures: {dataset.report}")
        return model

    def _features(self) -> Path:
        from varkit.train.features_task import train_features

        if self.tokenizer is not None:
            raise UserError("--tokenizer is for models; features are trained on pictures, without one")
        if self.start is not None:
            raise UserError("--from is for models; features are trained from the beginning, leave it out")
        if self.system is not None:
            raise UserError("--system is for models; features have none, leave it out")
        if self.shard:
            raise UserError("--shard is for models; the network of the features is small, train it without")
        return train_features(self.out, self._request(), self.resume)

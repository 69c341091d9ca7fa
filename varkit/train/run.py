"""`varkit train`: tokenizer first, then the generator over its tokens, then a folder that `varkit.load` takes as it is.

RUN/request.json   what was asked for          RUN/tokenizer/, RUN/decoder/, RUN/generator/   the trainer's folders
RUN/tokens/        pictures encoded once       RUN/model/                       the finished pipeline
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from varkit.data.base import Dataset
from varkit.devices import AUTO, find_device
from varkit.errors import UserError
from varkit.files import StrPath, write_json
from varkit.hub.config import to_json
from varkit.hub.folder import load_parts
from varkit.hub.pipeline import Pipeline
from varkit.hub.states import check_state
from varkit.pictures import grid
from varkit.ranks import current
from varkit.tokenizers.base import Tokenizer
from varkit.tokenizers.kl import KL
from varkit.tokenizers.map_vq import MapVQ
from varkit.tokenizers.residual import QuantizedTokenizer
from varkit.train.generator_task import Forced, NextStepTask, drawing
from varkit.train.lessons import Lessons, WholePlan
from varkit.train.loop import Result, load_run, recorded_steps, steps_for, train
from varkit.train.map_task import MapTask
from varkit.train.progressive import Progressive
from varkit.train.recipes import Recipe
from varkit.train.task import Task, TrainConfig
from varkit.train.tokenizer_task import DecoderTask, ReconstructionTask
from varkit.train.tokens import Tokens, encode, no_more_than_seen

Say = Callable[[str], None]
HELD_OUT = 512


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


def train_recipe(
    request: Request, recipe: Recipe, dataset: Dataset, out: StrPath, resume: bool = False, say: Say = print
) -> Path:
    """Train both stages in the folder `out`; with `resume`, go on where it stopped. Returns the finished model's
    folder. Under `varkit.ranks.together` all processes call this, and the first writes.
    """
    root = Path(out)
    if current().first:
        check_run(root, request, resume)
    trained = request.tokenizer or request.start
    given = _given_tokenizer(trained, type(recipe.tokenizer.config)) if trained else None
    if isinstance(given, nn.Module):
        given.to(request.place)
    say = begin(root, request, resume, say)
    share = 0.0 if given or recipe.tokenizer.train is None else recipe.tokenizer.share
    tokenizer = given or _train_tokenizer(request, recipe, dataset, root, share, say)
    part = recipe.generator
    pictures = no_more_than_seen(dataset, part.pictures, request.steps, part.batch_size)
    tokens, validation = encoded(tokenizer, dataset, pictures, root, say)
    further = recipe.generator.further
    left = (1 - share) * (1 - further.share if further else 1)
    pipeline, result = _train_generator(request, recipe, tokenizer, tokens, validation, root, left, say)
    if further is not None:
        left, data = (1 - share) * further.share, (tokens, validation)
        result.metrics.update(_train_further(request, recipe, pipeline, data, root, left, say))
    return finish(pipeline, request, recipe, result, root, say)


def begin(root: Path, request: Request, resume: bool, say: Say) -> Say:
    """Write down what is asked for in a checked folder, and seed torch. Returns what this process says."""
    ranks = current()
    if ranks.first and not resume:
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / "request.json", asdict(request))
    torch.manual_seed(request.seed)
    return say if ranks.first else _silent


def finish(
    pipeline: Pipeline, request: Request, recipe: Recipe, result: Result, root: Path, say: Say, **about: Any
) -> Path:
    """Save the trained model with what is told about it; returns its folder."""
    told = {
        "recipe": recipe.name,
        "request": asdict(request),
        "steps": result.step,
        "metrics": result.metrics,
    }
    pipeline.about = told | about
    if current().first:
        pipeline.save(root / "model", replace=True)
    current().wait()
    say(f"the model is in {root}; try: varkit generate --model {root}")
    return root / "model"


def _silent(text: str) -> None:
    """What every process but the first says."""


def encoded(
    tokenizer: Tokenizer, dataset: Dataset, pictures: int, root: Path, say: Say
) -> tuple[Tokens, Tokens]:
    """A data set's pictures to train on, at least as many as asked for, and held-out ones, encoded once."""
    say("encoding pictures")
    train_part, held_out = dataset.split("train"), dataset.split("validation")
    wanted = pictures if train_part.size is None else max(train_part.size, pictures)
    tokens = _encoded(tokenizer, train_part, wanted, root / "tokens")
    source = held_out if held_out.size != 0 else train_part
    count = HELD_OUT if source.size is None else min(HELD_OUT, source.size)
    return tokens, _encoded(tokenizer, source, count, root / "tokens-validation")


def _encoded(tokenizer: Tokenizer, dataset: Dataset, count: int, folder: Path) -> Tokens:
    """Encode once, by the first process, and read by all."""
    ranks = current()
    if ranks.first:
        encode(tokenizer, dataset, count, folder)
    ranks.wait()
    return Tokens.load(folder)


def check_run(out: StrPath, request: Request, resume: bool) -> None:
    """Raise `UserError` unless `out` is new or empty, or, with `resume`, was begun with the same request."""
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
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{str(root)!r} is not an empty folder; choose another --out, or go on with --resume")


def _begun_with(root: Path) -> dict[str, Any]:
    record = root / "request.json"
    if not record.is_file():
        raise UserError(f"{str(root)!r} is not a training's folder; leave --resume out to start there")
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(record)!r} is damaged ({error}); start a new training") from error


def _given_tokenizer(folder: str, kind: type) -> Tokenizer:
    """The tokenizer in a trained model's folder; its configuration must be a `kind`."""
    tokenizer = _trained_parts(folder).get("tokenizer")
    if not isinstance(getattr(tokenizer, "config", None), kind):
        wanted = kind.__name__.removesuffix("Config")
        raise UserError(
            f"the folder {folder!r} has no {wanted} tokenizer, which the recipe needs; give that of a model with one"
        )
    return tokenizer  # type: ignore[return-value]


def _trained_parts(folder: str) -> dict[str, Any]:
    """The parts in a trained model's folder, by name."""
    root = Path(folder)
    return load_parts(root / "model" if (root / "model").is_dir() else root).built


def _begin_with(pipeline: Pipeline, folder: str) -> None:
    """Give the generator and heads the weights of a trained model's, which must have the same parameters."""
    trained = _trained_parts(folder)
    for name, part in pipeline.parts.items():
        if isinstance(part, nn.Module) and name != "tokenizer":
            state = trained[name].state_dict() if name in trained else {}
            check_state(part.state_dict(), state, f"the {name} of {folder!r}")
            part.load_state_dict(state)


def _train_tokenizer(
    request: Request, recipe: Recipe, dataset: Dataset, root: Path, share: float, say: Say
) -> Tokenizer:
    part = recipe.tokenizer
    tokenizer = part.config.build()
    if isinstance(tokenizer, nn.Module):
        tokenizer.to(request.place)
    if part.train is None:
        return tokenizer
    assert isinstance(tokenizer, QuantizedTokenizer | KL), "nothing to learn here; the recipe says train=None"
    settings = {
        "recipe": recipe.name,
        "tokenizer": to_json(part.config),
        "loss": asdict(part.loss),
        "batch_size": part.batch_size,
    }
    batch_size = request.micro_batch(part.batch_size)
    kind = MapTask if isinstance(tokenizer, MapVQ) else ReconstructionTask
    task = kind(tokenizer, dataset, part.loss, batch_size, settings, request.seed)  # type: ignore[arg-type]
    say("training the tokenizer")
    decoder_share = 0.2 * share if part.decoder is not None else 0.0
    stage(task, request.apply(part.train, share - decoder_share), root / "tokenizer")
    tokenizer.load_state_dict(load_run(root / "tokenizer")["tokenizer"])
    if part.decoder is not None:
        assert isinstance(tokenizer, QuantizedTokenizer), "only decoders of quantised features go on alone"
        say("training its decoder further")
        polish = DecoderTask(tokenizer, dataset, batch_size, settings, request.seed)
        stage(polish, request.apply(part.decoder, decoder_share), root / "decoder")
        averaged = load_run(root / "decoder")
        tokenizer.decoder.load_state_dict(averaged["decoder"])
        tokenizer.post_quant_conv.load_state_dict(averaged.get("post_quant_conv", {}))
    return tokenizer


def _train_generator(
    request: Request,
    recipe: Recipe,
    tokenizer: Tokenizer,
    tokens: Tokens,
    held_out: Tokens,
    root: Path,
    share: float,
    say: Say,
) -> tuple[Pipeline, Result]:
    part = recipe.generator
    configs = part.config.fitted(tokenizer.config) | dict(part.parts)  # type: ignore[arg-type]

    def assembled() -> Pipeline:
        torch.manual_seed(request.seed + 1)
        parts = {"tokenizer": tokenizer} | {name: config.build() for name, config in configs.items()}
        return Pipeline(parts, {"tokenizer": tokenizer.config} | configs, part.settings).to(request.place)

    pipeline = assembled()
    if request.start is not None:
        _begin_with(pipeline, request.start)
    lessons = part.teach(tokenizer, pipeline.model.plan)
    task = _task(request, recipe, pipeline, (tokens, held_out), lessons, part.batch_size)
    say("training the generator")
    train_config = request.apply(part.train, share)
    if part.progressive:
        train_config = _with_steps(task, train_config, root / "generator")
        assert isinstance(lessons, WholePlan), "only whole plans grow scale by scale"
        task.recipe["progressive_steps"] = train_config.steps  # what was done depends on the end
        lessons.progressive = Progressive.over(len(lessons.plan.steps), train_config, part.progressive)
    result = stage(task, train_config, root / "generator", request.shard)
    averaged = load_run(root / "generator")
    if request.shard:
        pipeline = assembled()
    pipeline.generator.load_state_dict(averaged["generator"])
    pipeline.model.heads["main"].load_state_dict(averaged["head"])
    return pipeline, result


def _train_further(
    request: Request,
    recipe: Recipe,
    pipeline: Pipeline,
    data: tuple[Tokens, Tokens],
    root: Path,
    share: float,
    say: Say,
) -> dict[str, float]:
    """Train the pipeline's generator on, in place; the validation's metrics, named after the stage."""
    part = recipe.generator.further
    assert part is not None
    generator, heads = pipeline.generator, pipeline.model.heads
    trained = {id(p) for p in part.begin(generator, heads["main"], heads[part.route])}
    for parameter in generator.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    lessons = part.teach(pipeline.tokenizer, pipeline.model.plan)
    task = _task(request, recipe, pipeline, data, lessons, part.batch_size, part.route)
    say(f"training further: {part.name}")
    result = stage(task, request.apply(part.train, share), root / part.name, request.shard)
    averaged = load_run(root / part.name)
    generator.load_state_dict(averaged["generator"])
    heads[part.route].load_state_dict(averaged["head"])
    generator.requires_grad_(True)
    return {f"{part.name}_{name}": value for name, value in result.metrics.items()}


def _task(
    request: Request,
    recipe: Recipe,
    pipeline: Pipeline,
    data: tuple[Tokens, Tokens],
    lessons: Lessons,
    batch_size: int,
    route: str = "main",
) -> NextStepTask:
    """What the trainer is given for a route of the pipeline, over tokens for training and held-out ones."""
    tokens, held_out = data
    settings = {
        "recipe": recipe.name,
        "generator": to_json(pipeline.configs["generator"]),
        "batch_size": batch_size,
        "pictures": len(tokens),
        "lessons": lessons.settings,
    }
    model = pipeline.model
    parts = Forced(pipeline.tokenizer, pipeline.generator, model.heads[route], model.plan, lessons)
    return NextStepTask(
        parts, tokens, held_out, request.micro_batch(batch_size), settings, request.seed,
        recipe.generator.condition_drop, draw=lambda: sheet(pipeline, recipe.prompts),
    )  # fmt: skip


def _with_steps(task: NextStepTask, config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings with minutes turned into steps: recorded ones when the stage has begun before, else measured."""
    if config.steps is not None:
        return config
    begun = current().told((folder / "config.json").exists())
    steps = recorded_steps(folder) if begun else steps_for(config.minutes or 0.0, task, config)
    return replace(config, steps=current().told(steps))


def stage(task: Task, config: TrainConfig, folder: Path, sharded: bool = False) -> Result:
    """Train, going on when the stage has begun before."""
    begun = current().told((folder / "config.json").exists())
    return train(task, config, folder, resume=begun, sharded=sharded)


def sheet(pipeline: Pipeline, prompts: Sequence[str | int]) -> Image.Image:
    """Two samples a prompt, in columns."""
    with drawing((pipeline.generator, pipeline.model.heads["main"])):
        images = pipeline.generate(list(prompts), n=2, seed=0, batch_size=2 * len(prompts))
    return grid(images[0::2] + images[1::2], columns=len(prompts))

"""`varkit train`: tokenizer first, then the generator over its tokens, then a folder that `varkit.load` takes as it is.

RUN/request.json   what was asked for          RUN/tokenizer/, RUN/decoder/, RUN/generator/   the trainer's folders
RUN/tokens/        pictures encoded once       RUN/model/                       the finished pipeline
"""

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from varkit.data.base import Dataset
from varkit.errors import UserError
from varkit.files import StrPath, write_json
from varkit.generators.conditioning import ClassConfig
from varkit.hub.config import to_json
from varkit.hub.pipeline import Pipeline
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
from varkit.train.progress import Encoding
from varkit.train.progressive import Progressive
from varkit.train.recipes import Recipe
from varkit.train.request import Request, check_run
from varkit.train.runs import remove_leftovers
from varkit.train.starting import begin_with, check_training, configurations, given_tokenizer
from varkit.train.task import Task, TrainConfig
from varkit.train.tokenizer_task import DecoderTask, ReconstructionTask
from varkit.train.tokens import Tokens, encode, no_more_than_seen

Say = Callable[[str], None]
HELD_OUT = 512


def train_recipe(
    request: Request, recipe: Recipe, dataset: Dataset, out: StrPath, resume: bool = False, say: Say = print
) -> Path:
    """Train both stages in the folder `out`; with `resume`, go on where it stopped. Returns the finished model's
    folder. Under `varkit.ranks.together` all processes call this, and the first writes.
    """
    root = Path(out)
    if current().first:
        check_run(root, request, resume)
    place = request.place
    given = given_tokenizer(request, type(recipe.tokenizer.config))
    check_training(request, recipe, given)
    if given is not None:
        given.to(place)
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
    """Write down what is asked for in a checked folder, less what was left half-written there, and seed torch. Returns
    what this process says.
    """
    ranks = current()
    if ranks.first:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root, *(path for path in root.iterdir() if path.is_dir()))
        if not resume:
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
    wanted = example(pipeline.condition, recipe.prompts)
    say(f"the model is in {root}; try: varkit generate {wanted} --model {shlex.quote(str(root))}")
    return root / "model"


def example(condition: Any, prompts: Sequence[str | int]) -> str:
    """What `varkit generate` may be asked for, as a shell takes it: the first of the prompts that a model with such a
    condition knows, else its first class or word.
    """
    if isinstance(condition, ClassConfig):
        known = [p for p in prompts if isinstance(p, int) and 0 <= p < condition.classes]
        return f"--label {known[0] if known else 0}"
    words = ["a picture"] if isinstance(condition.vocabulary, str) else list(condition.vocabulary)
    for prompt in [" ".join(p.split()) for p in prompts if isinstance(p, str) and p.strip()]:
        with suppress(UserError):
            condition.encode([prompt])
            return shlex.quote(prompt)
    return shlex.quote(words[0])


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
        with Encoding(count, quiet=folder.exists()) as progress:
            encode(tokenizer, dataset, count, folder, progress=lambda done, total: progress.reach(done))
    ranks.wait()
    return Tokens.load(folder)


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
    configs = configurations(part, tokenizer.config)  # type: ignore[arg-type]

    def assembled() -> Pipeline:
        torch.manual_seed(request.seed + 1)
        parts = {"tokenizer": tokenizer} | {name: config.build() for name, config in configs.items()}
        return Pipeline(parts, {"tokenizer": tokenizer.config} | configs, part.settings).to(request.place)

    pipeline = assembled()
    if request.start is not None:
        begin_with(pipeline, request.start)
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

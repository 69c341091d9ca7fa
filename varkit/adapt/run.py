"""`varkit adapt`: a trained model goes on learning by a method of post-training, and becomes a model of its own.

RUN/request.json   what was asked for          RUN/tokens/      pictures encoded once, by the model's tokenizer
RUN/generator/     the trainer's folder        RUN/model/       the finished pipeline
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from varkit.adapt.lessons import lessons_for
from varkit.adapt.method import Material, Method
from varkit.adapt.registry import name_of
from varkit.data.base import Dataset
from varkit.errors import UserError
from varkit.files import StrPath
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.hub.config import to_json
from varkit.hub.pipeline import Pipeline
from varkit.plans.refined import RefinedPlan
from varkit.ranks import current
from varkit.train.generator_task import Forced
from varkit.train.loop import load_run
from varkit.train.recipes import Recipe, find_recipe
from varkit.train.run import Request, Say, begin, check_run, encoded, finish, sheet, stage
from varkit.train.tokens import Tokens, no_more_than_seen

WARMUP = 0.02
"""The part of a post-training in which the rate rises."""


@dataclass(frozen=True)
class Adaptation(Request):
    """What a user asked for: as of a training, of which `recipe` gives the pictures and their lessons.

    start: the model that goes on, by name or folder. method, settings: how. lr: in place of the method's share of the
    recipe's. batch, pictures: in place of the recipe's pictures of a step, and of all.
    """

    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    batch: int | None = None
    pictures: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "pictures"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise UserError(f"--{name} is {count}; give at least 1, or leave it out")
        if self.lr is not None and not 0 < self.lr < 1:
            raise UserError(f"--lr is {self.lr}; give a rate above 0 and below 1, such as 1e-4")


def source_of(start: Pipeline, data: str | None) -> tuple[str, str | None]:
    """The recipe or data that a model goes on with, and its system: what is asked for, else what it was trained on.

    Raises `UserError` for a model that does not say.
    """
    if data is not None:
        return data, None
    trained = start.about.get("request", {})
    if not trained.get("recipe"):
        raise UserError(
            "this model does not say what it was trained on; name a recipe or a folder of pictures with --data"
        )
    return trained["recipe"], trained.get("system")


def follow_up(recipe: Recipe, method: Method, steps: int | None) -> Recipe:
    """The recipe as a post-training takes it: the method's share of the rate, and of the `steps` trained before.

    Without `steps`, how long is still to be said.
    """
    train = recipe.generator.train
    share = None if steps is None else max(1, round(method.share * steps))
    # A warm-up counted in steps is that of a whole training.
    short = replace(train, steps=share, minutes=None, lr=train.lr * method.lr_share, warmup=WARMUP)
    return replace(
        recipe,
        name=f"{recipe.name}-{name_of(method)}",
        generator=replace(recipe.generator, train=short, progressive=0.0),
    )


def adapt_model(
    request: Adaptation, start: Pipeline, method: Method, out: StrPath, resume: bool, say: Say = print
) -> Path:
    """Post-train `start`, in place, on what `request.recipe` names. Returns the finished model's folder.

    Raises `UserError` where neither the model nor the request says how long.
    """
    recipe, dataset = find_recipe(request.recipe, request.system)
    recipe = follow_up(recipe, method, steps_behind(start.about))
    if recipe.generator.train.steps is None and request.steps is None and request.minutes is None:
        raise UserError("this model does not say how long it was trained; say how long to go on with --steps")
    return adapt(request, start, method, recipe, dataset, out, resume, say)


def adapt(
    request: Adaptation,
    start: Pipeline,
    method: Method,
    recipe: Recipe,
    dataset: Dataset,
    out: StrPath,
    resume: bool = False,
    say: Say = print,
) -> Path:
    """Post-train `start`, in place, in the folder `out`; with `resume`, go on where it stopped.

    Of the recipe its generator's part is used: rate and steps, batches, and lessons where they fit the model
    (`varkit.adapt.lessons`). Returns the finished model's folder.
    """
    root = Path(out)
    if current().first:
        check_run(root, request, resume)
    before = start.about
    train = request.apply(recipe.generator.train, 1.0)
    if request.lr is not None:
        train = replace(train, lr=request.lr)
    batch_size = request.batch or recipe.generator.batch_size
    micro_batch = request.micro_batch(batch_size)
    start.to(request.place)
    parts = _parts(start, recipe)
    say = begin(root, request, resume, say)
    pictures = request.pictures or no_more_than_seen(
        dataset, recipe.generator.pictures, train.steps, batch_size
    )
    tokens, held_out = encoded(start.tokenizer, dataset, pictures, root, say)
    check_condition(start.condition, tokens, request.recipe)
    settings = {
        "method": request.method,
        "settings": asdict(method),  # type: ignore[call-overload]
        "generator": to_json(start.configs["generator"]),
        "batch_size": batch_size,
        "pictures": len(tokens),
        "lessons": parts.lessons.settings if parts.lessons else {},
    }
    task = method.task(
        Material(
            parts, tokens, held_out, micro_batch, settings, request.seed,
            recipe.generator.condition_drop, draw=lambda: sheet(start, prompts_for(start, recipe)), start=start,
        )
    )  # fmt: skip
    say(f"training by {request.method}")
    result = stage(task, train, root / "generator")
    averaged = load_run(root / "generator")
    for name in ("generator", "head"):
        task.modules[name].load_state_dict(averaged[name])
    return finish(start, request, recipe, result, root, say, start=before)


def steps_behind(about: Mapping[str, Any]) -> int | None:
    """Steps of the training that a model began with, however often it was adapted since; None if it does not say."""
    while "start" in about:
        about = about["start"]
    return about.get("steps")


def prompts_for(start: Pipeline, recipe: Recipe) -> tuple[str | int, ...]:
    """What sample sheets ask for: the recipe's prompts, or the first classes of a model that does not know them."""
    try:
        start.conditions(recipe.prompts)
    except UserError:
        assert isinstance(start.condition, ClassConfig), "words are read by any model of words"
        return tuple(range(min(8, start.condition.classes)))
    return recipe.prompts


def check_condition(condition: Any, tokens: Tokens, source: str) -> None:
    """Raise `UserError` unless the pictures come with what the model is told: captions, or labels that it has."""
    if isinstance(condition, TextConfig):
        if tokens.captions is None:
            raise UserError(
                f"this model is told captions, and the pictures of {source!r} have none; name others"
            )
        return
    if not isinstance(condition, ClassConfig):
        raise UserError(
            f"a model told by {type(condition).__name__} cannot be adapted yet; use one told by classes or captions"
        )
    most = 0 if tokens.labels is None else int(tokens.labels.max(initial=0))
    if most >= condition.classes:
        raise UserError(
            f"the pictures of {source!r} have the label {most}, and this model knows {condition.classes} classes; "
            "name pictures of its own classes"
        )


def _parts(start: Pipeline, recipe: Recipe) -> Forced:
    """What goes on: of a model that refines its scales (HMAR) their first guesses, the refining branch staying."""
    heads, plan = start.model.heads, start.model.plan
    plan = plan.scales if isinstance(plan, RefinedPlan) else plan
    for part in (start.generator, *heads.values()):
        part.to(torch.float32).requires_grad_(True)
    lessons = lessons_for(start, recipe)
    return Forced(start.tokenizer, start.generator, heads["main"], plan, lessons)

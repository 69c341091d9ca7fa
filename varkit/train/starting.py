"""What a training begins with: another model's tokenizer and weights, and whether all that was asked for goes together.

Whatever can be wrong is told here, before anything is written: a refused training leaves no folder behind.
"""

from pathlib import Path
from typing import Any

from torch import nn

from varkit.errors import UserError
from varkit.hub.fit import check_fit
from varkit.hub.folder import load_parts
from varkit.hub.pipeline import Pipeline
from varkit.hub.states import build_empty, check_state
from varkit.plans.schedule import Schedule
from varkit.ranks import current
from varkit.tokenizers.base import Tokenizer, TokenizerConfig
from varkit.train.recipes import GeneratorRecipe, Recipe
from varkit.train.request import Request


def given_tokenizer(request: Request, kind: type) -> Tokenizer | None:
    """The tokenizer of the trained model that the request names, if it does; its configuration must be a `kind`."""
    folder = request.tokenizer or request.start
    if folder is None:
        return None
    tokenizer = _trained_parts(folder).get("tokenizer")
    if not isinstance(getattr(tokenizer, "config", None), kind):
        wanted = kind.__name__.removesuffix("Config")
        raise UserError(
            f"the folder {folder!r} has no {wanted} tokenizer, which the recipe needs; give that of a model with one"
        )
    return tokenizer  # type: ignore[return-value]


def configurations(part: GeneratorRecipe, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Those of generator, heads and plan over a tokenizer's, by name: fitted to it, but for parts that the recipe has
    of its own.
    """
    return part.config.fitted(tokenizer) | dict(part.parts)


def begin_with(pipeline: Pipeline, folder: str) -> None:
    """Give the generator and heads the weights of a trained model; `check_training` says whether they fit."""
    trained = _trained_parts(folder)
    for name, part in pipeline.parts.items():
        if isinstance(part, nn.Module) and name != "tokenizer":
            part.load_state_dict(trained[name].state_dict())


def check_training(request: Request, recipe: Recipe, given: Tokenizer | None) -> None:
    """Raise `UserError` for batches that cannot be split as asked for, and for a given tokenizer or start that does not
    go with the recipe.
    """
    current().share(request.accumulation)
    first, part = recipe.tokenizer, recipe.generator
    sizes = [part.batch_size] + ([part.further.batch_size] if part.further else [])
    if given is None and first.train is not None:
        sizes.insert(0, first.batch_size)
    for size in sizes:
        request.micro_batch(size)
    if given is None:
        return
    tokenizer: Any = given.config  # type: ignore[attr-defined]
    configs = configurations(part, tokenizer)
    _check_scales(request, recipe, tokenizer)
    where = f"the recipe {recipe.name!r} over the tokenizer of {request.tokenizer or request.start!r}"
    check_fit({"tokenizer": tokenizer, **configs}, where)
    if request.start is not None:
        trained = _trained_parts(request.start)
        for name, config in configs.items():
            built = build_empty(config.build)
            if isinstance(built, nn.Module):
                _check_weights(name, built, trained, request.start)


def _check_scales(request: Request, recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` for a plan of the recipe's own, which is fitted to nothing, over scales that the tokenizer has
    not.
    """
    plan: Any = recipe.generator.parts.get("plan")
    if not hasattr(plan, "schedule") or not hasattr(tokenizer, "schedule"):
        return
    wanted, has = Schedule.parse(plan.schedule), Schedule.parse(tokenizer.schedule)
    if wanted != has:
        option = "--tokenizer" if request.start is None else "--from"
        raise UserError(
            f"the recipe {recipe.name!r} is made for scales of {_written(wanted)}, and the tokenizer of "
            f"{request.tokenizer or request.start!r} has {_written(has)}; give {option} a model with the recipe's, or "
            "take another recipe"
        )


def _written(schedule: Schedule) -> str:
    return ", ".join(str(h) if h == w else f"{h}x{w}" for h, w in schedule.sides)


def _check_weights(name: str, part: nn.Module, trained: dict[str, Any], folder: str) -> None:
    state = trained[name].state_dict() if name in trained else {}
    check_state(part.state_dict(), state, f"the {name} of {folder!r}")


def _trained_parts(folder: str) -> dict[str, Any]:
    """The parts in a trained model's folder, by name."""
    root = Path(folder)
    return load_parts(root / "model" if (root / "model").is_dir() else root).built

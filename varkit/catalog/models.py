"""Models that experiments train once and share, each in a folder named after all that made it.

The address is a hash of the recipe, the seed and the tokenizer's own address, so ten experiments that need the same
base train it once, and a changed recipe never meets an old model. Trainings resume where they stopped.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varkit.errors import UserError

if TYPE_CHECKING:
    from varkit.adapt.method import Method
    from varkit.hub.pipeline import Pipeline
    from varkit.train.recipes import Recipe

Say = Callable[[str], None]
ENVIRONMENT = "VARKIT_CACHE"
GENERATION = 1
"""Raised when training itself changes so much that older models should not be compared with newer ones."""


@dataclass(frozen=True)
class Trained:
    """A model that a recipe makes from a seed; with `tokenizer`, over that model's tokenizer (or a bundled one's).

    start: a model whose tokenizer it uses and whose weights it goes on from: as the recipe says, or by a `method` of
    post-training (`varkit.adapt`), for which the recipe's generator says at which rate, how long, over which lessons.
    expected: minutes that it takes where the recipe says steps; an estimate, which changes nothing.
    """

    recipe: "Recipe"
    seed: int = 0
    tokenizer: "Trained | str | None" = None
    expected: float | None = field(default=None, compare=False)
    start: "Trained | None" = None
    method: "Method | None" = None

    def __post_init__(self) -> None:
        assert self.start is not None or self.method is None, "a method goes on from a start"
        assert self.start is None or self.tokenizer is None, "the tokenizer is that of the start"

    @cached_property
    def address(self) -> str:
        """16 hexadecimal digits of everything that makes the model."""
        made_of = {
            "generation": GENERATION,
            "recipe": _described(self.recipe),
            "seed": self.seed,
            "tokenizer": _tokenizer_address(self.tokenizer),
        }
        if self.start is not None:
            made_of["start"] = self.start.address
        if self.method is not None:
            made_of["method"] = [type(self.method).__name__, asdict(self.method)]  # type: ignore[call-overload]
        text = json.dumps(made_of, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def needs(self) -> "list[Trained]":
        """Models that have to be trained before it, first ones first."""
        before = [m for m in (self.tokenizer, self.start) if isinstance(m, Trained)]
        return [needed for model in before for needed in (*model.needs, model)]

    @property
    def minutes(self) -> float:
        """How long its training takes, without that of other models that it needs."""
        if self.expected is not None:
            return self.expected
        stages = [self.recipe.generator.train]
        if self.tokenizer is None and self.start is None:
            stages += [
                s for s in (self.recipe.tokenizer.train, self.recipe.tokenizer.decoder) if s is not None
            ]
        assert all(stage.minutes for stage in stages), f"recipe {self.recipe.name!r} must say its minutes"
        return sum(stage.minutes or 0.0 for stage in stages)


class Store:
    """The folder of trained models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> "Store":
        """$VARKIT_CACHE, or varkit in the user's cache folder."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(os.environ.get(ENVIRONMENT) or Path(base) / "varkit"))

    def run(self, model: Trained) -> Path:
        """The training's folder, there or not."""
        return self.folder / "models" / f"{model.recipe.name}-{model.address}"

    def has(self, model: Trained) -> bool:
        """Whether the model is finished."""
        return (self.run(model) / "model" / "config.json").is_file()

    def missing(self, models: Iterable[Trained]) -> list[Trained]:
        """What has to be trained for them, what others need first, each once."""
        wanted: dict[str, Trained] = {}
        for model in models:
            for needed in (*model.needs, model):
                if not self.has(needed):
                    wanted.setdefault(needed.address, needed)
        return list(wanted.values())

    def train(self, model: Trained, say: Say) -> None:
        """Train the model, going on where an interrupted training stopped."""
        if model.method is not None:
            self._adapt(model, model.method, say)
            return
        from varkit.data.registry import open_dataset
        from varkit.hub.pipeline import WEIGHTS
        from varkit.train.run import Request, train_recipe

        source = model.tokenizer
        tokenizer = str(self.run(source)) if isinstance(source, Trained) else source and str(WEIGHTS / source)
        start = None if model.start is None else str(self.run(model.start))
        request = Request(model.recipe.name, tokenizer=tokenizer, seed=model.seed, start=start)
        folder = self.run(model)
        begun = (folder / "request.json").is_file()
        train_recipe(request, model.recipe, open_dataset(model.recipe.dataset), folder, begun, say)

    def _adapt(self, model: Trained, method: "Method", say: Say) -> None:
        from varkit.adapt.registry import name_of
        from varkit.adapt.run import Adaptation, adapt
        from varkit.data.registry import open_dataset

        recipe, start, folder = model.recipe, model.start, self.run(model)
        assert start is not None
        request = Adaptation(
            recipe.name,
            seed=model.seed,
            start=start.address,
            method=name_of(method),
            settings=asdict(method),  # type: ignore[call-overload]
        )
        begun = (folder / "request.json").is_file()
        adapt(request, self.load(start), method, recipe, open_dataset(recipe.dataset), folder, begun, say)

    def load(self, model: Trained) -> "Pipeline":
        """The finished model, sampling as its recipe says. Raises `UserError` when there is none."""
        from varkit.hub.pipeline import load

        if not self.has(model):
            raise UserError(
                f"the model {model.recipe.name!r} ({model.address}) is not trained yet; add --train"
            )
        pipeline = load(str(self.run(model)))
        pipeline.settings = model.recipe.generator.settings
        return pipeline


def _tokenizer_address(tokenizer: "Trained | str | None") -> str | None:
    """That of a trained model; a bundled one's name and the hash of its file."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, Trained):
        return tokenizer.address
    from varkit.hub.pipeline import WEIGHTS

    weights = WEIGHTS / tokenizer / "tokenizer.safetensors"
    if not weights.is_file():
        raise UserError(f"there is no bundled model {tokenizer!r} whose tokenizer could be used")
    return f"{tokenizer}-{hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"


def _described(recipe: "Recipe") -> dict[str, Any]:
    """What makes a model of a recipe, as JSON, with the names of its parts' kinds: two kinds may have the same fields.

    How the model samples, and what sample sheets ask for, make no other model.
    """
    kinds = {
        "tokenizer": type(recipe.tokenizer.config).__name__,
        "generator": type(recipe.generator.config).__name__,
        "condition": type(recipe.generator.config.condition).__name__,
        "parts": {name: type(config).__name__ for name, config in recipe.generator.parts.items()},
    }
    described = {"kinds": kinds, **asdict(recipe)}
    del described["prompts"], described["generator"]["settings"]
    described["generator"]["teach"] = _taught(recipe.generator.teach)
    further = described["generator"].pop("further")
    if further is not None:  # recipes without keep the addresses that they had before there was one
        described["generator"]["further"] = further | {n: _taught(further[n]) for n in ("teach", "begin")}
    return described


def _taught(teach: Callable[..., Any]) -> dict[str, Any]:
    """A class of lessons, or one with settings of its own, as JSON."""
    if isinstance(teach, partial):
        return {**_taught(teach.func), **teach.keywords}
    return {"kind": teach.__qualname__}

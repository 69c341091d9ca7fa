"""What a trained model is taught when it goes on: the lessons of the recipe that names the pictures, where that recipe
makes models of this kind, and otherwise those that models of this kind are trained by.
"""

from collections.abc import Callable
from typing import Any

from varkit.errors import UserError
from varkit.hub.pipeline import Pipeline
from varkit.plans.base import StaticPlan
from varkit.plans.masked import MaskedPlan
from varkit.plans.refined import RefinedPlan
from varkit.plans.scales import ScalePlan
from varkit.tokenizers.bitwise import Bitwise
from varkit.tokenizers.map_vq import MapVQ
from varkit.train.lessons import Lessons, WholePlan
from varkit.train.masked_lessons import MaskedLessons
from varkit.train.masked_scales import FirstGuesses
from varkit.train.recipes import Recipe
from varkit.train.schedule_lessons import ScheduleLessons
from varkit.train.self_correction import SelfCorrection

Teach = Callable[[Any, Any], Lessons]


def lessons_for(start: Pipeline, recipe: Recipe) -> Lessons:
    """Lessons for a model over a recipe's pictures: a kind of model is its kind of tokenizer and of order.

    Raises `UserError` for a model that none fit.
    """
    part = recipe.generator
    configs = part.config.fitted(recipe.tokenizer.config) | dict(part.parts)  # type: ignore[arg-type]
    made = type(recipe.tokenizer.config), type(configs["plan"])
    own = type(start.configs["tokenizer"]), type(start.configs["plan"])
    teach = part.teach if made == own else teaching(start)
    return teach(start.tokenizer, start.model.plan)


def teaching(start: Pipeline) -> Teach:
    """What models of this one's kind are taught. Raises `UserError` where nothing is known."""
    tokenizer, plan = start.tokenizer, start.model.plan
    if isinstance(plan, ScalePlan) and isinstance(tokenizer, MapVQ):
        return ScheduleLessons
    if isinstance(plan, ScalePlan) and isinstance(tokenizer, Bitwise):
        return SelfCorrection
    if isinstance(plan, RefinedPlan):
        return FirstGuesses
    if isinstance(plan, MaskedPlan):
        return MaskedLessons
    if isinstance(plan, StaticPlan):
        return WholePlan
    raise UserError(
        f"models of a {type(plan).__name__} cannot be taught pictures of other recipes; leave --data out"
    )

"""Recipes: everything that makes a model from pictures, by name. `folder_recipe` fits one to a folder of any size.

Sizes were chosen by measurement on two cores; `docs/log.md` tells what else was tried.
"""

from varkit.data.base import Dataset
from varkit.data.registry import BUILT_IN, open_dataset
from varkit.errors import UserError, unknown_name
from varkit.train.recipes.digit_scales import digit_scales
from varkit.train.recipes.digits import digits
from varkit.train.recipes.flexvar import flexvar_digits
from varkit.train.recipes.folder import folder_recipe
from varkit.train.recipes.hmar import hmar_digits
from varkit.train.recipes.infinity import infinity_scenes
from varkit.train.recipes.llamagen import digit_grid, digits_raster, llamagen_scenes
from varkit.train.recipes.m_var import m_var_digits
from varkit.train.recipes.mar import mar_scenes
from varkit.train.recipes.markov import markov_digits, markov_digits_mixed
from varkit.train.recipes.nfig import nfig_digits
from varkit.train.recipes.recipe import FurtherRecipe, GeneratorRecipe, Recipe, TokenizerRecipe
from varkit.train.recipes.scenes import scenes, scenes_small, scenes_tidy
from varkit.train.recipes.systems import of_system

__all__ = [
    "RECIPES", "FurtherRecipe", "GeneratorRecipe", "Recipe", "TokenizerRecipe", "digit_grid",
    "digit_scales", "digits", "digits_raster", "find_recipe", "flexvar_digits", "folder_recipe",
    "hmar_digits", "infinity_scenes", "llamagen_scenes", "m_var_digits", "mar_scenes", "markov_digits",
    "markov_digits_mixed", "nfig_digits", "scenes", "scenes_small",
    "scenes_tidy",
]  # fmt: skip

RECIPES = {
    "scenes": scenes,
    "scenes-tidy": scenes_tidy,
    "scenes-small": scenes_small,
    "infinity-scenes": infinity_scenes,
    "llamagen-scenes": llamagen_scenes,
    "mar-scenes": mar_scenes,
    "digits": digits,
    "digits-raster": digits_raster,
    "digit-scales": digit_scales,
    "digit-grid": digit_grid,
    "m-var-digits": m_var_digits,
    "hmar-digits": hmar_digits,
    "nfig-digits": nfig_digits,
    "flexvar-digits": flexvar_digits,
    "markov-digits": markov_digits,
    "markov-digits-mixed": markov_digits_mixed,
}


def find_recipe(spec: str, system: str | None = None) -> tuple[Recipe, Dataset]:
    """The recipe called `spec`, or one for the data set (by name), folder or array file it names, with its data.

    system: makes of it a recipe of that system (`varkit.train.recipes.systems`).
    """
    recipe, dataset = _found(spec)
    return (recipe if system is None else of_system(recipe, system)), dataset


def _found(spec: str) -> tuple[Recipe, Dataset]:
    if spec in RECIPES:
        recipe = RECIPES[spec]()
        return recipe, open_dataset(recipe.dataset)
    try:
        dataset = open_dataset(spec)
    except UserError as error:
        if str(error).startswith("unknown dataset"):
            raise unknown_name(
                "recipe", spec, {*RECIPES, *BUILT_IN}, "A folder of pictures works too."
            ) from error
        raise
    return folder_recipe(spec, dataset), dataset

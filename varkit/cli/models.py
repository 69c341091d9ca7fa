"""The models that commands draw with. No torch before one is opened: `--help` reads this too."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from varkit.errors import UserError

if TYPE_CHECKING:
    from varkit.hub.pipeline import Pipeline

DEFAULT_MODEL = "scenes-tidy"
"""The model drawn with unless another is named."""

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


def opened(name: str, dtype: str | None = None, offload: str | None = None) -> "Pipeline":
    """`varkit.load`, or `Pipeline.from_pretrained` of OWNER/NAME or OWNER/NAME:VARIANT.

    Raises `UserError` for a recipe's name that says how to make a model of it.
    """
    check_no_recipe(name)
    if is_repository(name):
        from varkit.hub.pipeline import Pipeline

        repository, _, variant = name.partition(":")
        return Pipeline.from_pretrained(repository, variant or None, dtype=dtype, offload=offload)
    from varkit.hub.pipeline import load

    return load(name, dtype, offload)


def is_repository(name: str) -> bool:
    """Whether a name is one on the Hugging Face hub: OWNER/NAME or OWNER/NAME:VARIANT where no folder OWNER is here."""
    return bool(REPOSITORY.fullmatch(name)) and not Path(name.partition("/")[0]).exists()


def check_no_recipe(name: str) -> None:
    """Raise `UserError` for the name of a recipe of which no model is there."""
    from varkit.hub.pipeline import bundled

    if name in bundled() or Path(name).exists():
        return
    from varkit.train.recipes import RECIPES

    if name in RECIPES:
        raise UserError(
            f"{name!r} is a recipe, and no model of it comes with varkit; run varkit train {name} --out DIR first, "
            "then give DIR"
        )

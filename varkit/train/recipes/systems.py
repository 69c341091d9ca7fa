"""Systems by which a model of any pictures can be made: each turns a recipe by VAR into one of its own.

The data, the tokenizer's convolutions, the sizes and the length of the training stay; so what two systems make of the
same pictures can be compared.
"""

from collections.abc import Callable
from dataclasses import replace

from varkit.errors import unknown_name
from varkit.train.recipes.flexvar import flexvar
from varkit.train.recipes.hmar import hmar
from varkit.train.recipes.infinity import infinity
from varkit.train.recipes.llamagen import llamagen
from varkit.train.recipes.m_var import m_var
from varkit.train.recipes.mar import mar
from varkit.train.recipes.markov import markov
from varkit.train.recipes.nfig import nfig
from varkit.train.recipes.recipe import Recipe, next_scale


def var(base: Recipe) -> Recipe:
    """The base itself."""
    next_scale(base)
    return base


SYSTEMS: dict[str, Callable[[Recipe], Recipe]] = {
    "var": var,
    "llamagen": llamagen,
    "infinity": infinity,
    "mar": mar,
    "flexvar": flexvar,
    "m-var": m_var,
    "mvar-markov": markov,
    "hmar": hmar,
    "nfig": nfig,
}
"""By the names of the catalogue."""


def of_system(base: Recipe, name: str) -> Recipe:
    """A recipe by VAR as one by another system. Raises `UserError` for an unknown one, and where it cannot be."""
    if name not in SYSTEMS:
        raise unknown_name("system", name, SYSTEMS)
    return replace(SYSTEMS[name](base), name=f"{base.name}-{name}")

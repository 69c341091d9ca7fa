"""How far a system has come in varkit: derived from its code, its experiment and the experiment's result.

Code is looked up by reading source files, so nothing heavy is imported.
"""

import ast
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from varkit.catalog.places import PACKAGE, experiments_folder
from varkit.catalog.system import System
from varkit.errors import UserError

STATES = ("works", "implemented", "planned")


@dataclass(frozen=True)
class Standing:
    """`works`: code, an experiment and its result; `implemented`: code; `planned`: not yet."""

    state: str
    measured: str | None = None
    """What the experiment measured of the headline claim, in one line, and which of its other parts do not hold."""
    holds: bool | None = None
    """Whether the paper's claim held in it."""


def standing(system: System) -> Standing:
    """What varkit has of a system. A result counts only beside the code and the experiment that made it."""
    if not system.code or not all(map(is_defined, system.code)):
        return Standing("planned")
    folder = experiments_folder()
    experiment = any((folder / f"{system.name}{suffix}").is_file() for suffix in (".py", ".toml"))
    result = folder / "results" / f"{system.name}.json"
    if not experiment or not result.is_file():
        return Standing("implemented")
    return Standing("works", *_read_result(result))


def is_defined(path: str) -> bool:
    """Whether "varkit.module:object" is a module of the package with that object at its top level."""
    module, _, name = path.partition(":")
    file = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return file.is_file() and name in _defined_in(file)


@cache
def _defined_in(file: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return frozenset(names)


def _read_result(path: Path) -> tuple[str, bool]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        measured, holds = result["measured"], result["holds"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no result of an experiment: it lacks 'measured' or 'holds'") from None
    if type(measured) is not str or type(holds) is not bool:
        raise UserError(f"{path}: 'measured' must be a text and 'holds' true or false")
    failed = [part["name"] for part in result.get("parts", [])[1:] if not part["holds"]]
    return measured + (f"; does not hold: {', '.join(failed)}" if failed else ""), holds

"""All records of the catalogue, read once and only when they are asked for.

A record is one TOML file in `varkit/catalog/systems/`, named after its system; what it says is checked when it is read.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from varkit.catalog.system import System
from varkit.errors import UserError, unknown_name
from varkit.hub.config import from_json

FOLDER = Path(__file__).parent / "systems"


@cache
def records() -> Mapping[str, System]:
    """Every record by its name, sorted: the systems, and the substrates that some of them build on."""
    return read_folder(FOLDER)


def systems() -> tuple[System, ...]:
    """The systems, sorted by name, without substrates."""
    return tuple(system for system in records().values() if not system.substrate)


def find(name: str) -> System:
    """The record called `name`. Raises `UserError` with the nearest names for an unknown one."""
    if name not in records():
        raise unknown_name("system", name, records(), hint="(see varkit systems)")
    return records()[name]


def read_folder(folder: Path) -> dict[str, System]:
    """The records of a folder, sorted by name. Raises `UserError` for the first that is wrong."""
    found = {path.stem: read_record(path) for path in sorted(folder.glob("*.toml"))}
    for system in found.values():
        for base in system.base:
            if base not in found or base == system.name:
                others = [name for name in found if name != system.name]
                raise unknown_name("base", base, others, hint=f"(in {system.name}.toml)")
    return found


def read_record(path: Path) -> System:
    """The record in one file. Raises `UserError` naming the file, the field, its value and what is allowed."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name} is not TOML: {error}") from None
    if "name" in fields:
        raise UserError(f"{path.name} has a field 'name'; the name is that of the file, so leave it out")
    system: System = from_json({"name": path.stem} | fields, System, path.name)
    return system

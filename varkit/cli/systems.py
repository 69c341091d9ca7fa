"""`varkit systems`: which papers the library covers, what they claim and what was measured here."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from varkit.cli.console import print_json, print_table
from varkit.errors import UserError, unknown_name

if TYPE_CHECKING:
    from varkit.catalog.system import System


@dataclass(frozen=True)
class Systems:
    """List the papers covered, with their claims, and what was measured here."""

    name: Positional[str | None] = None
    """Show the record of this system in full."""
    family: str | None = None
    """Only those that predict this: pixel, token, scale or other."""
    task: str | None = None
    """Only those for this task, such as text-to-image (docs/systems.md lists the tasks)."""
    state: str | None = None
    """Only those that have come this far: works, implemented or planned."""
    json: bool = False
    """Print one JSON object."""
    markdown: bool = False
    """Print the page docs/systems.md."""

    def __post_init__(self) -> None:
        if self.json and self.markdown:
            raise UserError("--json and --markdown are both given; choose one")
        for option in ("family", "task", "state", "markdown"):
            if self.name and getattr(self, option):
                raise UserError(
                    f"--{option} goes with the list of all systems; leave out {self.name!r} or it"
                )

    def run(self) -> None:
        from varkit.catalog.page import page
        from varkit.catalog.registry import find

        chosen = [find(self.name)] if self.name else self._chosen()
        if self.markdown:
            print(page(chosen), end="")
            return
        rows = [_row(system) for system in chosen]
        if self.json:
            print_json({"systems": rows})
        elif self.name:
            print(_in_full(chosen[0]))
        else:
            columns = ("name", "title", "family", "state", "claim", "measured", "holds")
            print_table(columns, [[_cell(row[column]) for column in columns] for row in rows])

    def _chosen(self) -> "list[System]":
        from varkit.catalog.registry import systems
        from varkit.catalog.standing import STATES, standing
        from varkit.catalog.vocabulary import FAMILIES, TASKS

        for option, value, known in (
            ("family", self.family, FAMILIES),
            ("task", self.task, TASKS),
            ("state", self.state, STATES),
        ):
            if value is not None and value not in known:
                raise unknown_name(option, value, known)
        return [
            system
            for system in systems()
            if self.family in (None, system.family)
            and (self.task is None or self.task in system.tasks)
            and (self.state is None or self.state == standing(system).state)
        ]


def _row(system: "System") -> dict[str, Any]:
    """A system as JSON: what is listed first, then the rest of its record."""
    from varkit.catalog.standing import standing

    fields, now = asdict(system), standing(system)
    first = {
        "name": system.name,
        "title": system.title,
        "arxiv": system.arxiv,
        "year": system.year,
        "family": system.family,
        "state": now.state,
        "code": system.code,
        "claim": str(system.claims[0]),
        "measured": now.measured,
        "holds": now.holds,
    }
    return first | {name: value for name, value in fields.items() if name not in first}


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _in_full(system: "System") -> str:
    facts = {name: value for name, value in _row(system).items() if name not in ("claim", "claims")}
    lines = [(name, _cell(value) or "-") for name, value in facts.items()]
    lines += [("claim", f"{claim}, from: {claim.source}") for claim in system.claims]
    return "\n".join(f"{name:<14}  {text}" for name, text in lines)

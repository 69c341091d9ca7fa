"""The catalogue as a Markdown page: the systems in a table, the words of the records, how to add a system.

`docs/systems.md` is this page; `varkit systems --markdown` prints it.
"""

from collections import Counter
from collections.abc import Sequence

from varkit.catalog.standing import STATES, standing
from varkit.catalog.system import System
from varkit.catalog.vocabulary import VOCABULARY

INTRODUCTION = """\
# Systems

The papers that varkit covers, one record each in `varkit/catalog/systems/`, and what varkit has of them. A system is
*implemented* when its code is here, and *works* when an experiment has measured its headline claim at small scale
against its base; *holds* says whether the claim held. A claim that does not hold is listed like any other.

```console
$ varkit systems                             # this table
$ varkit systems --family scale --state implemented
$ varkit systems flexvar                     # one record in full
$ varkit systems --json
```
"""

ENDING = """\
## Adding a system

Write one file in `varkit/catalog/systems/`, named after the system, with the fields of `System` in
`varkit/catalog/system.py`; what it says is checked when it is read. The state is derived: list the code that implements
the system under `code`. Then write this page anew, with `varkit systems --markdown > docs/systems.md`.

## Words

What a record's fields may say. The family follows from the unit: pixel, token (also cells), scale, or other.
"""


def page(systems: Sequence[System]) -> str:
    """The page about `systems`."""
    standings = [standing(system) for system in systems]
    counts = Counter(s.state for s in standings)
    totals = ", ".join(f"{state}: {counts[state]}" for state in STATES)
    rows = [
        _row(
            f"`{system.name}`",
            f"[{_escaped(system.title)}](https://arxiv.org/abs/{system.arxiv}), {system.year}",
            system.family,
            s.state,
            _escaped(str(system.claims[0])),
            _escaped(s.measured or ""),
            {True: "yes", False: "no", None: ""}[s.holds],
            ", ".join(map(_link, system.code)),
        )
        for system, s in zip(systems, standings, strict=True)
    ]
    columns = ("name", "paper", "family", "state", "headline claim", "measured here", "holds", "code")
    table = "\n".join([_row(*columns), _row(*["---"] * len(columns)), *rows])
    words = "\n\n".join(_words(field) for field in VOCABULARY)
    return f"{INTRODUCTION}\n{len(systems)} systems; {totals}.\n\n{table}\n\n{ENDING}\n{words}\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _link(path: str) -> str:
    module, _, name = path.partition(":")
    return f"[{name}](../{module.replace('.', '/')}.py)"


def _words(field: str) -> str:
    lines = [f"- {word}: {meaning}" for word, meaning in VOCABULARY[field].items()]
    return "\n".join([f"### {field}", "", *lines])

"""What is drawn in place of what was asked for: shapes, colours, numbers and relations, counted over judged pictures.

Shapes and colours come from captions that ask for one object, numbers from those of counting, relations from those of
position whose objects are all there. What the reader is unsure of has a name of its own.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from varkit.data.captions import MAX_OBJECTS, parse
from varkit.evaluate.geneval import Score, matching, relations

NOTHING, UNSURE, SEVERAL, MISSING = "nothing", "unsure", "several", "objects missing"

Table = dict[str, Counter[str]]
"""asked -> read -> how often."""


def confusions(scores: Iterable[Score]) -> dict[str, Table]:
    """The four tables; what was never asked for has no row."""
    tables: dict[str, Table] = {"shape": {}, "colour": {}, "number": {}, "relation": {}}
    for score in scores:
        for table, asked, read in _read(score):
            tables[table].setdefault(asked, Counter())[read] += 1
    return tables


@dataclass(frozen=True)
class Mistake:
    """`asked` was drawn as `read` in `count` of `total` pictures; table says whether they are shapes, colours, ..."""

    table: str
    asked: str
    read: str
    count: int
    total: int


def mistakes(tables: dict[str, Table], most: int = 10) -> list[Mistake]:
    """The commonest mistakes, the most frequent first."""
    found = [
        Mistake(name, asked, read, count, row.total())
        for name, table in tables.items()
        for asked, row in table.items()
        for read, count in row.items()
        if read != asked
    ]
    return sorted(found, key=lambda m: (-m.count, m.table, m.asked, m.read))[:most]


def _read(score: Score) -> Iterable[tuple[str, str, str]]:
    requirement, reading = parse(score.caption), score.reading
    sure = [thing for thing in reading.objects if thing.confident]
    first = requirement.phrases[0]
    if len(requirement.phrases) == 1 and first.count == 1:
        problem = NOTHING if not reading.objects else UNSURE if not sure else SEVERAL if len(sure) > 1 else ""
        yield "shape", first.shape, problem or sure[0].shape
        yield "colour", first.colour, problem or sure[0].colour
    if requirement.category == "counting":
        yield (
            "number",
            str(first.count),
            str(len(sure)) if len(sure) <= MAX_OBJECTS else f"over {MAX_OBJECTS}",
        )
    if requirement.relation:
        ones, others = (matching(phrase, sure) for phrase in requirement.phrases)
        held = {name for one in ones for other in others for name in relations(one, other)}
        if not ones or not others:
            read = MISSING
        elif requirement.relation in held:
            read = requirement.relation
        else:
            read = min(held, default="none")
        yield "relation", requirement.relation, read

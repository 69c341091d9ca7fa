"""GenEval (https://github.com/djghosh13/geneval) on scenes: does a picture show what its caption says?

The detector is replaced by the exact scene reader; the clauses are GenEval's. Every phrase must be found in
its count, then in its colour and size; more objects than asked for are fine, except in counting, where the
picture must hold exactly as many of the shape; a position holds where every object of the first phrase stands
so to every one of the second. A named background is a clause too. What the reader is unsure of counts as
missing. `Requirement.category` documents how the grammar maps to the six categories. The overall figure is
the plain mean of the six.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from varkit.data.captions import CATEGORIES, RELATIONS, Phrase, Requirement, parse
from varkit.data.scenes import Scenes
from varkit.errors import UserError
from varkit.evaluate.scene_reader import FoundObject, Reading, read

POSITION_THRESHOLD = 0.1  # of the two boxes' sizes: a smaller offset is no relation


@dataclass(frozen=True)
class Clause:
    """One demand of a caption, and whether the picture meets it."""

    demand: str
    holds: bool


@dataclass(frozen=True)
class Score:
    """The verdict on a picture; truthy where every clause holds."""

    caption: str
    category: str
    clauses: tuple[Clause, ...]
    reading: Reading

    @property
    def passed(self) -> bool:
        return all(clause.holds for clause in self.clauses)

    @property
    def fraction(self) -> float:
        """The share of clauses that hold: a softer reward than pass or fail."""
        return sum(clause.holds for clause in self.clauses) / len(self.clauses)

    def __bool__(self) -> bool:
        return self.passed


def category(caption: str) -> str:
    """Return the GenEval category of a caption."""
    return parse(caption).category


def score(image: NDArray[np.uint8], caption: str) -> Score:
    """Judge a picture (H, W, 3), uint8, by a caption of the scenes grammar."""
    requirement, reading = parse(caption), read(image)
    return Score(caption, requirement.category, tuple(_clauses(requirement, reading)), reading)


def prompts(n: int, split: str = "test", seed: int = 0) -> list[str]:
    """Return n captions of a split, the six categories in turn; their numbers differ by at most one."""
    queues: dict[str, list[str]] = {name: [] for name in CATEGORIES}
    quota = math.ceil(n / len(CATEGORIES))
    scenes = iter(Scenes(split, seed))
    while any(len(queue) < quota for queue in queues.values()):
        caption = next(scenes).caption
        queues[category(caption)].append(caption)
    return [queues[CATEGORIES[i % len(CATEGORIES)]][i // len(CATEGORIES)] for i in range(n)]


def report(scores: Iterable[Score]) -> dict[str, float]:
    """Return the share of passed pictures by category, and `overall`, the mean of the six."""
    passed: dict[str, list[bool]] = {name: [] for name in CATEGORIES}
    for result in scores:
        passed[result.category].append(result.passed)
    if missing := [name for name, results in passed.items() if not results]:
        raise UserError(
            f"no scores for {', '.join(missing)}; the overall figure needs all six, see geneval.prompts"
        )
    shares = {name: sum(results) / len(results) for name, results in passed.items()}
    return shares | {"overall": sum(shares.values()) / len(shares)}


def matching(phrase: Phrase, things: Iterable[FoundObject]) -> list[FoundObject]:
    """The objects that a phrase describes."""
    asked = (phrase.shape, phrase.colour)
    return [
        thing
        for thing in things
        if (thing.shape, thing.colour) == asked and phrase.size in (None, thing.size)
    ]


def relations(a: FoundObject, b: FoundObject) -> set[str]:
    """Return how a stands to b; two relations may hold; an offset within a tenth of the sizes is none."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    offset = np.array([ax1 + ax2 - bx1 - bx2, ay1 + ay2 - by1 - by2]) / 2
    sizes = np.array([ax2 - ax1 + bx2 - bx1, ay2 - ay1 + by2 - by1])
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if not beyond.any():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {
        name for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if holds
    }


def _clauses(requirement: Requirement, reading: Reading) -> Iterable[Clause]:
    sure = [thing for thing in reading.objects if thing.confident]
    matched = []
    for phrase in requirement.phrases:
        clauses, things = _phrase_clauses(phrase, sure)
        yield from clauses
        matched.append(things)
    if requirement.category == "counting":
        shapes = {phrase.shape for phrase in requirement.phrases}
        found = sorted(f"{thing.colour} {thing.shape}" for thing in sure if thing.shape in shapes)
        yield Clause("no more of the shape", tuple(found) == requirement.content)
    if requirement.relation:
        first, second = matched
        pairs = [(a, b) for a in first for b in second]
        holds = bool(pairs) and all(requirement.relation in relations(a, b) for a, b in pairs)
        yield Clause(requirement.relation, holds)
    if requirement.background:
        yield Clause(f"{requirement.background} background", reading.background == requirement.background)


def _phrase_clauses(phrase: Phrase, sure: list[FoundObject]) -> tuple[list[Clause], list[FoundObject]]:
    """Narrow the objects down by shape, colour and size, each of which must leave enough; return what is left too."""
    things = [thing for thing in sure if thing.shape == phrase.shape]
    clauses = [Clause(f"{phrase.count} {phrase.shape}", len(things) >= phrase.count)]
    things = [thing for thing in things if thing.colour == phrase.colour]
    clauses.append(Clause(f"{phrase.count} {phrase.colour} {phrase.shape}", len(things) >= phrase.count))
    if phrase.size:
        things = [thing for thing in things if thing.size == phrase.size]
        demand = f"{phrase.count} {phrase.size} {phrase.colour} {phrase.shape}"
        clauses.append(Clause(demand, len(things) >= phrase.count))
    return clauses, things

"""The captions of the scenes world: a small regular grammar, written, paraphrased and read back.

    caption    = phrase [ ("and" | relation) phrase ] [ background ]     or the background first, with a comma
    phrase     = [ count ] [ size ] colour shape                         "a small red circle", "2 blue stars"
    relation   = "left of" | "right of" | "above" | "below"              the first phrase to the second
    background = "on a navy background"

Every alternative wording is listed in a table whose first entry is the canonical one, so that writer, parser
and vocabulary cannot drift apart. A scene holds exactly what its caption says; what it leaves open (size,
background) is free.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from varkit.data.render import BACKGROUNDS, COLOURS, FORBIDDEN, SHAPES
from varkit.errors import UserError, unknown_name

T = TypeVar("T")

MAX_OBJECTS = 4
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "attribute_binding")

_COUNTS = {1: ("a", "one"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
_SIZES = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
_RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
_ON = ("on", "against")
_READ_ONLY = {"an": "a", "1": "one", "gray": "grey"}  # read, and written in the other form
RELATIONS = tuple(_RELATIONS)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def words(caption: str) -> list[str]:
    """Split a caption into its words, lower case and without punctuation."""
    return re.findall(r"\w+", caption.lower())


def _vocabulary() -> tuple[str, ...]:
    wordings = itertools.chain(*_COUNTS.values(), *_SIZES.values(), *_RELATIONS.values())
    nouns = (*SHAPES, *map(_plural, SHAPES), "background")
    single = (*COLOURS, *BACKGROUNDS, *nouns, *_ON, *_READ_ONLY, "and")
    return tuple(sorted({word for wording in wordings for word in wording.split()}.union(single)))


WORDS = _vocabulary()
"""Every word a caption may contain, sorted: the text vocabulary of models trained on scenes."""


@dataclass(frozen=True)
class Phrase:
    """`count` objects of one shape and colour, and of one size where it is said."""

    count: int
    size: str | None
    colour: str
    shape: str


@dataclass(frozen=True)
class Requirement:
    """What a caption demands of a picture; `relation` is that of the first phrase's objects to the second's."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        total = sum(phrase.count for phrase in self.phrases)
        if total > MAX_OBJECTS:
            raise UserError(f"{total} objects are too many for a scene; ask for at most {MAX_OBJECTS}")
        if self.background is None:
            return
        for phrase in self.phrases:
            if phrase.colour in FORBIDDEN[self.background]:
                raise UserError(
                    f"{phrase.colour} objects are not drawn on a {self.background} background, where they are "
                    f"hard to see; use {', '.join(backgrounds_for([phrase.colour]))}"
                )

    @property
    def content(self) -> tuple[str, ...]:
        """The coloured shapes, one entry an object, sorted: what the split into train and test is made by."""
        return tuple(sorted(f"{p.colour} {p.shape}" for p in self.phrases for _ in range(p.count)))

    @property
    def category(self) -> str:
        """The GenEval category, told by the form alone.

        position: a relation is said. counting: more than one object of a phrase. One object is `colors` where
        its background is said too, so that two colours must land in the right places, otherwise
        `single_object`. Two objects are `attribute_binding` where exchanging their colours would make another
        picture, and `two_object` where it would not (they share the colour or the shape).
        """
        if self.relation:
            return "position"
        if len(set(self.content)) < len(self.content):
            return "counting"
        if len(self.phrases) == 1:
            return "colors" if self.background else "single_object"
        a, b = self.phrases
        return "attribute_binding" if a.colour != b.colour and a.shape != b.shape else "two_object"


def backgrounds_for(colours: Sequence[str]) -> tuple[str, ...]:
    """Return the backgrounds on which objects of all these colours can be seen; grey is always among them."""
    return tuple(
        name for name, hidden in FORBIDDEN.items() if not any(colour in hidden for colour in colours)
    )


# --- writing -------------------------------------------------------------------


def pick(options: Sequence[T], rng: random.Random) -> T:
    """Choose one, by `random()`: the only method whose values Python promises to keep between versions."""
    return options[int(rng.random() * len(options))]


def _slots(phrase: Phrase) -> list[tuple[str, ...]]:
    noun = phrase.shape if phrase.count == 1 else _plural(phrase.shape)
    size = [_SIZES[phrase.size]] if phrase.size else []
    return [_COUNTS[phrase.count], *size, (phrase.colour,), (noun,)]


def _layouts(requirement: Requirement) -> list[list[tuple[str, ...]]]:
    """The sentence as slots of alternative wordings, once for each word order, the canonical order first."""
    body = _slots(requirement.phrases[0])
    for phrase in requirement.phrases[1:]:
        body += [_RELATIONS[requirement.relation] if requirement.relation else ("and",), *_slots(phrase)]
    if requirement.background is None:
        return [body]
    place = [_ON, (f"a {requirement.background} background",)]
    return [[*body, *place], [*place, (",",), *body]]


def _sentence(parts: Sequence[str]) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(parts).replace(" ,", ","))


def write(requirement: Requirement, rng: random.Random | None = None) -> str:
    """Write the canonical caption, or with an `rng` a paraphrase (half of the time the canonical one)."""
    layouts = _layouts(requirement)
    if rng is None or rng.random() < 0.5:
        return _sentence([options[0] for options in layouts[0]])
    return _sentence(
        [options[0] if len(options) == 1 else pick(options, rng) for options in pick(layouts, rng)]
    )


def paraphrases(requirement: Requirement) -> Iterator[str]:
    """Yield every wording of a requirement, the canonical one first."""
    for layout in _layouts(requirement):
        yield from map(_sentence, itertools.product(*layout))


# --- reading -------------------------------------------------------------------


def _meanings(table: Mapping[T, tuple[str, ...]]) -> dict[str, T]:
    return {wording: meaning for meaning, options in table.items() for wording in options}


_COUNT_OF = _meanings(_COUNTS)
_SIZE_OF = _meanings(_SIZES)
_RELATION_OF = _meanings(_RELATIONS)
_SHAPE_OF = _meanings({shape: (shape, _plural(shape)) for shape in SHAPES})


def _any(options: Sequence[str] | dict[str, T]) -> str:
    return f"({'|'.join(options)})"


_PHRASE = rf"(?:{_any(_COUNT_OF)} )?(?:{_any(_SIZE_OF)} )?{_any(COLOURS)} {_any(_SHAPE_OF)}"
_PLACE = rf"{_any(_ON)} a {_any(BACKGROUNDS)} background"
_CAPTION = re.compile(rf"(?:{_PLACE} )?{_PHRASE}(?: {_any(['and', *_RELATION_OF])} {_PHRASE})?(?: {_PLACE})?")


def _phrase(count: str | None, size: str | None, colour: str, shape: str) -> Phrase:
    return Phrase(
        _COUNT_OF[count] if count else 1, _SIZE_OF[size] if size else None, colour, _SHAPE_OF[shape]
    )


def parse(caption: str) -> Requirement:
    """Read a caption back to what it demands; a `UserError` names the word or the form that is not known."""
    said = words(caption)
    for word in said:
        if word not in WORDS:
            raise unknown_name("word", word, WORDS, hint=f"in the caption {caption!r}")
    match = _CAPTION.fullmatch(" ".join(_READ_ONLY.get(word, word) for word in said))
    if match is None:
        raise UserError(
            f"cannot read the caption {caption!r}: say COUNT SIZE COLOUR SHAPE, as in 'a red circle', 'three small "
            f"blue stars', 'a green ring left of an orange heart on a navy background'"
        )
    _, before, *first, link, count, size, colour, shape, _, after = match.groups()
    if before and after:
        raise UserError(f"the caption {caption!r} names two backgrounds; name one")
    phrases = (_phrase(*first),) + ((_phrase(count, size, colour, shape),) if link else ())
    return Requirement(phrases, _RELATION_OF.get(link), before or after)

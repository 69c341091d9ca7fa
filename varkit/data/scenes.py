"""The scenes world: pictures of one to four flat objects with exact ground truth, endless and seeded.

`Scenes(split, seed)[i]` is a pure function of (split, seed, i) on every machine.

The split. A scene's content is the multiset of its coloured shapes ("blue star", "red circle", "red circle"),
and a fixed hash of the content puts one in ten into `test`, whatever the seed. Sizes, relations, backgrounds
and wording are left out of the content on purpose: a caption names all objects of its scene, so equal
captions have equal content, and with a test caption *every* picture of those objects together is unseen, in
any arrangement. (Hashing the relation too would let "a red circle left of a blue star" be a test caption
while "a red circle and a blue star" is trained on.) What training does show is each object in other company:
that is what composing means.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from varkit.data.captions import CATEGORIES, RELATIONS, Phrase, Requirement, backgrounds_for, pick, write
from varkit.data.render import (
    COLOURS,
    SHAPES,
    SIZES,
    SceneObject,
    Side,
    components,
    image_size,
    paint,
    segment,
)
from varkit.errors import UserError, unknown_name

__all__ = ["Scene", "SceneObject", "Scenes", "split_of", "visible_fractions"]

SPLITS = ("train", "test")
MARGIN = 0.02  # between an object and the border
GAP = 0.05  # between two objects of one colour
# Where objects of a tidy scene stand: one, two by how the first stands to the second, three or four.
MIDDLE = ((0.5, 0.5),)
PAIRS = {
    "left of": ((0.25, 0.5), (0.75, 0.5)),
    "right of": ((0.75, 0.5), (0.25, 0.5)),
    "above": ((0.5, 0.25), (0.5, 0.75)),
    "below": ((0.5, 0.75), (0.5, 0.25)),
}
QUARTERS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))
JITTER = 0.03125  # along each axis
MIN_VISIBLE = 0.7  # at 64 x 64; leaves room for rounding at other sizes, so that 0.6 holds everywhere
ACROSS = 0.6  # a stated relation is off its axis by at most this share of the distance along it
SAY_SIZE, SAY_BACKGROUND = 0.3, 0.35  # how often a caption mentions them
# The first salt with which the single objects held out show every shape and every colour.
_SALT = (90718).to_bytes(16, "big")
_COLOURS, _SIZES = tuple(COLOURS), tuple(SIZES)


@dataclass(frozen=True)
class Scene:
    """Objects from back to front on a plain background, and a caption that says exactly what there is."""

    objects: tuple[SceneObject, ...]
    background: str
    caption: str

    @property
    def content(self) -> tuple[str, ...]:
        """The coloured shapes, one entry an object, sorted."""
        return tuple(sorted(f"{thing.colour} {thing.shape}" for thing in self.objects))

    def image(self, side: Side = 64) -> NDArray[np.uint8]:
        """Return the picture (H, W, 3)."""
        return paint(self.objects, self.background, side)

    def segmentation(self, side: Side = 64) -> NDArray[np.int64]:
        """Return (H, W): 0 for background, k where `objects[k - 1]` is seen."""
        return segment(self.objects, side)

    def boxes(self, side: Side = 64) -> NDArray[np.int64]:
        """Return (N, 4): x1, y1, x2, y2 in pixels around what is seen of each object, x2 and y2 exclusive."""
        labels = self.segmentation(side)
        spans = []
        for k in range(1, len(self.objects) + 1):
            y, x = np.nonzero(labels == k)
            spans.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
        return np.array(spans, np.int64)

    def depth(self, side: Side = 64) -> NDArray[np.float32]:
        """Return (H, W), the draw order: 1 the background, 0 the object in front, evenly spaced between."""
        return (1 - self.segmentation(side) / len(self.objects)).astype(np.float32)

    def edges(self, side: Side = 64) -> NDArray[np.bool_]:
        """Return (H, W): whether the pixel to the right or below belongs to something else."""
        labels = self.segmentation(side)
        edges = np.zeros(labels.shape, np.bool_)
        edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
        edges[:-1] |= labels[:-1] != labels[1:]
        return edges


@dataclass(frozen=True)
class Scenes:
    """The endless scenes of one split: `scenes[i]` is a `Scene`, `scenes.batch(indices)` training data.

    tidy: objects stand in a few places, where they are easy to draw (`_tidily`); captions say the same.
    """

    split: str
    seed: int = 0
    side: int = 64
    tidy: bool = False

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise unknown_name("split", self.split, SPLITS)
        image_size(self.side)

    def __getitem__(self, index: int) -> Scene:
        if index < 0:
            raise UserError(f"scene index {index} is negative; scenes are endless, so count from 0")
        stream = hashlib.blake2b(f"{self.split}/{self.seed}/{int(index)}".encode(), digest_size=16).digest()
        rng = random.Random(int.from_bytes(stream, "big"))
        category = pick(CATEGORIES, rng)
        while split_of((requirement := _requirement(category, rng)).content) != self.split:
            pass
        objects = (_tidily if self.tidy else _arrange)(requirement, rng)
        allowed = backgrounds_for([phrase.colour for phrase in requirement.phrases])
        return Scene(objects, requirement.background or pick(allowed, rng), write(requirement, rng))

    def __iter__(self) -> Iterator[Scene]:
        index = 0
        while True:
            yield self[index]
            index += 1

    def batch(self, indices: Sequence[int]) -> tuple[NDArray[np.uint8], list[str]]:
        """Return the pictures (B, side, side, 3) and their captions."""
        scenes = [self[index] for index in indices]
        images = np.empty((len(scenes), self.side, self.side, 3), np.uint8)
        for image, scene in zip(images, scenes, strict=True):
            image[:] = scene.image(self.side)
        return images, [scene.caption for scene in scenes]


def split_of(content: Sequence[str]) -> str:
    """Return the split of a content (sorted coloured shapes): one in ten is "test", the others "train"."""
    digest = hashlib.blake2b("|".join(content).encode(), digest_size=8, salt=_SALT).digest()
    return "test" if int.from_bytes(digest, "big") % 10 == 0 else "train"


# --- what is said -------------------------------------------------------------------


def _requirement(category: str, rng: random.Random) -> Requirement:
    """Draw what a caption of the category says, uniformly over colours and shapes."""
    count = 2 + int(3 * rng.random()) if category == "counting" else 1
    nouns = [(pick(_COLOURS, rng), pick(SHAPES, rng))]
    if category in ("two_object", "position", "attribute_binding"):
        nouns.append(_other(nouns[0], category, rng))
    phrases = tuple(
        Phrase(count, pick(_SIZES, rng) if rng.random() < SAY_SIZE else None, *noun) for noun in nouns
    )
    relation = pick(RELATIONS, rng) if category == "position" else None
    chance = {"single_object": 0.0, "colors": 1.0}.get(category, SAY_BACKGROUND)
    allowed = backgrounds_for([colour for colour, _ in nouns])
    return Requirement(phrases, relation, pick(allowed, rng) if rng.random() < chance else None)


def _other(noun: tuple[str, str], category: str, rng: random.Random) -> tuple[str, str]:
    """Draw the second of two objects, as the category defines it (`Requirement.category`)."""
    colour, shape = noun
    while True:
        other = (pick(_COLOURS, rng), pick(SHAPES, rng))
        if category == "two_object":
            other = (colour, other[1]) if rng.random() < 0.5 else (other[0], shape)
        same_colour, same_shape = other[0] == colour, other[1] == shape
        if not (
            same_colour and same_shape or category == "attribute_binding" and (same_colour or same_shape)
        ):
            return other


# --- where things stand -------------------------------------------------------------------


def _arrange(requirement: Requirement, rng: random.Random) -> tuple[SceneObject, ...]:
    """Place the objects by rejection and return them from back to front, in random order."""
    kinds = [
        (phrase.shape, phrase.colour, phrase.size or pick(_SIZES, rng))
        for phrase in requirement.phrases
        for _ in range(phrase.count)
    ]
    while True:
        objects = _scatter(kinds, rng)
        if objects is None or (requirement.relation and not _holds(requirement.relation, *objects)):
            continue
        order = sorted(objects, key=lambda _: rng.random())
        if not any(_near(a, b, 0.0) for i, a in enumerate(order) for b in order[:i]) or _well_visible(order):
            return tuple(order)


def _tidily(requirement: Requirement, rng: random.Random) -> tuple[SceneObject, ...]:
    """Place one object in the middle, two side by side in the order of mention or as the caption says, more in quarters
    in reading order, all with a little jitter; like objects are of one size.
    """
    kinds = []
    for phrase in requirement.phrases:
        size = phrase.size or pick(_SIZES, rng)
        kinds += [(phrase.shape, phrase.colour, size)] * phrase.count
    places = {1: MIDDLE, 2: PAIRS[requirement.relation or "left of"]}.get(len(kinds), QUARTERS)
    jittered = [[at + (2 * rng.random() - 1) * JITTER for at in place] for place in places[: len(kinds)]]
    return tuple(SceneObject(*kind, x, y) for kind, (x, y) in zip(kinds, jittered, strict=True))


def _scatter(kinds: Sequence[tuple[str, str, str]], rng: random.Random) -> list[SceneObject] | None:
    """Place objects one by one, those of one colour apart; None where the rest found no room."""
    objects: list[SceneObject] = []
    for shape, colour, size in kinds:
        low = MARGIN + SIZES[size] / 2
        for _ in range(10):
            x, y = (low + (1 - 2 * low) * rng.random() for _ in range(2))
            thing = SceneObject(shape, colour, size, x, y)
            if not any(other.colour == colour and _near(thing, other, GAP) for other in objects):
                objects.append(thing)
                break
        else:
            return None
    return objects


def _near(a: SceneObject, b: SceneObject, gap: float) -> bool:
    reach = (SIZES[a.size] + SIZES[b.size]) / 2 + gap
    return abs(a.x - b.x) < reach and abs(a.y - b.y) < reach


def _holds(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether a stands clearly in the relation to b: squares apart along its axis, and little off the axis."""
    x, y = a.x - b.x, a.y - b.y
    along, across = {"left of": (-x, y), "right of": (x, y), "above": (-y, x), "below": (y, x)}[relation]
    return along >= (SIZES[a.size] + SIZES[b.size]) / 2 + GAP and abs(across) <= ACROSS * along


def visible_fractions(objects: Sequence[SceneObject], side: Side = 64) -> list[float]:
    """Return for each object the share of its pixels that no later object covers."""
    labels = segment(objects, side)
    return [
        float((labels == k).sum() / segment([thing], side).sum()) for k, thing in enumerate(objects, start=1)
    ]


def _well_visible(objects: Sequence[SceneObject]) -> bool:
    """Whether enough of every object is seen, in one piece (not cut in two, nor through the hole of a ring)."""
    if min(visible_fractions(objects)) < MIN_VISIBLE:
        return False
    labels = segment(objects, 64)
    roots = components(labels)
    return all(len(np.unique(roots[labels == k])) == 1 for k in range(1, len(objects) + 1))

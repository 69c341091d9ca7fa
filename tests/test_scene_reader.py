"""The scene reader and GenEval on it: right on the world's own pictures, tolerant to blur, strict on wrong captions."""

import dataclasses
import random
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from varkit.data.captions import CATEGORIES, RELATIONS, Phrase, Requirement, backgrounds_for, parse, write
from varkit.data.render import BACKGROUNDS, COLOURS, SHAPES, SIZES, paint
from varkit.data.scenes import SceneObject, Scenes, split_of
from varkit.errors import UserError
from varkit.evaluate import geneval
from varkit.evaluate.scene_reader import FoundObject, Reading, read

Picture = NDArray[np.uint8]
T = TypeVar("T")
N = 600
TEST = [Scenes("test", seed=21)[i] for i in range(N)]


def blurred(image: Picture, sigma: float = 0.7, noise: float = 4.0, seed: int = 0) -> Picture:
    """Gaussian blur with replicated borders, then noise: what a small tokenizer does to a picture."""
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    pixels = np.pad(image.astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="edge")
    pixels = np.lib.stride_tricks.sliding_window_view(pixels, 9, 0) @ kernel
    pixels = np.lib.stride_tricks.sliding_window_view(pixels, 9, 1) @ kernel
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def shares(change: Callable[[Picture, int], Picture], n: int = N) -> dict[str, float]:
    return geneval.report(geneval.score(change(s.image(), i), s.caption) for i, s in enumerate(TEST[:n]))


def test_own_renderings_are_read_right() -> None:
    result = shares(lambda image, _: image)
    assert result["overall"] >= 0.99
    assert all(result[name] >= 0.97 for name in CATEGORIES), result


def test_blurred_and_noisy_pictures_are_read_right() -> None:
    result = shares(lambda image, i: blurred(image, seed=i), 300)
    assert result["overall"] >= 0.95, result


@pytest.mark.parametrize("side", [32, 96, (64, 128), (150, 100)])
def test_other_sizes_are_read_right(side: int | tuple[int, int]) -> None:
    passed = [bool(geneval.score(scene.image(side), scene.caption)) for scene in TEST[:40]]
    assert np.mean(passed) >= 0.95


def wrong(requirement: Requirement, rng: random.Random) -> Requirement:
    """Change one thing that the caption says: a colour, shape, size, count, relation or background."""
    k = rng.randrange(len(requirement.phrases))
    phrase = requirement.phrases[k]

    def other(options: Iterable[T], than: T) -> T:
        return rng.choice([option for option in options if option != than])

    def with_phrase(**changes: object) -> Requirement:
        phrases = list(requirement.phrases)
        phrases[k] = dataclasses.replace(phrase, **changes)  # type: ignore[arg-type]
        return dataclasses.replace(requirement, phrases=tuple(phrases))

    changes: list[Callable[[], Requirement]] = [
        lambda: with_phrase(colour=other(COLOURS, phrase.colour)),
        lambda: with_phrase(shape=other(SHAPES, phrase.shape)),
    ]
    if phrase.size:
        changes.append(lambda: with_phrase(size=other(SIZES, phrase.size)))
    if phrase.count > 1:
        changes.append(lambda: with_phrase(count=other((2, 3, 4), phrase.count)))
    if requirement.relation:
        changes.append(
            lambda: dataclasses.replace(requirement, relation=other(RELATIONS, requirement.relation))
        )
    if requirement.background:
        allowed = backgrounds_for([phrase.colour for phrase in requirement.phrases])
        if len(allowed) > 1:
            changes.append(
                lambda: dataclasses.replace(requirement, background=other(allowed, requirement.background))
            )
    return rng.choice(changes)()


def test_wrong_captions_are_rejected() -> None:
    rng, verdicts = random.Random(0), []
    for scene in TEST[:300]:
        try:
            caption = write(wrong(parse(scene.caption), rng))
            requirement = parse(caption)
        except UserError:  # the changed colour cannot stand on the background named
            continue
        verdicts.append(bool(geneval.score(scene.image(), caption)))
        assert requirement != parse(scene.caption)
    assert len(verdicts) >= 250 and np.mean(verdicts) <= 0.01


def test_swapped_colours_fail_attribute_binding() -> None:
    image = paint(
        [SceneObject("ring", "green", "large", 0.25, 0.3), SceneObject("heart", "orange", "small", 0.7, 0.7)],
        "grey",
        64,
    )
    assert geneval.score(image, "a green ring and an orange heart")
    swapped = geneval.score(image, "an orange ring and a green heart")
    assert not swapped and swapped.fraction == 0.5  # both shapes are there, neither in its colour
    assert geneval.score(image, "an orange heart right of a green ring")
    assert not geneval.score(image, "an orange heart left of a green ring")


def test_extra_objects_matter_in_counting_only() -> None:
    things = [SceneObject("star", "blue", "small", x, 0.3) for x in (0.2, 0.5, 0.8)]
    image = paint(things, "beige", 64)
    assert geneval.score(image, "a blue star") and geneval.score(image, "three blue stars")
    assert not geneval.score(image, "two blue stars") and not geneval.score(image, "four blue stars")


def test_found_objects_agree_with_the_truth() -> None:
    for scene in TEST[:100]:
        reading = read(scene.image())
        assert reading.background == scene.background and len(reading.objects) == len(scene.objects)
        for thing, box in zip(scene.objects, scene.boxes(), strict=True):
            x, y = thing.x * 64, thing.y * 64
            found = min(reading.objects, key=lambda o: (o.centre[0] - x) ** 2 + (o.centre[1] - y) ** 2)
            assert (found.shape, found.colour, found.size) == (thing.shape, thing.colour, thing.size)
            assert np.abs(np.array(found.centre) - (x, y)).max() <= 1.5
            assert np.abs(np.array(found.box) - box).max() <= 2
            assert found.confident


def test_boxes_are_in_the_pixels_of_the_picture() -> None:
    image = paint([SceneObject("square", "red", "large", 0.25, 0.5)], "navy", (100, 200))
    (found,) = read(image).objects
    assert np.abs(np.array(found.centre) - (50, 50)).max() <= 2
    assert np.abs(np.array(found.box) - (34, 34, 66, 66)).max() <= 3


@pytest.mark.parametrize("occluder", SHAPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_covered_objects_are_recognised(shape: str, occluder: str) -> None:
    back, front = (
        SceneObject(shape, "red", "large", 0.4, 0.45),
        SceneObject(occluder, "blue", "small", 0.62, 0.6),
    )
    found = {thing.colour: thing for thing in read(paint([back, front], "grey", 64)).objects}
    assert (found["red"].shape, found["blue"].shape) == (shape, occluder)


def test_fringes_are_no_objects() -> None:
    # The edge between red and yellow is orange.
    image = paint(
        [
            SceneObject("circle", "red", "large", 0.5, 0.5),
            SceneObject("circle", "yellow", "large", 0.66, 0.66),
        ],
        "grey",
        64,
    )
    assert sorted(thing.colour for thing in read(blurred(image, 1.2, 8)).objects) == ["red", "yellow"]


def test_what_is_not_of_the_world_is_not_found() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert not [thing for thing in read(noise).objects if thing.confident]
    assert read(np.full((64, 64, 3), (255, 105, 180), np.uint8)).background is None
    blob = np.full((64, 64, 3), BACKGROUNDS["grey"], np.uint8)
    blob[10:50, 28:36] = COLOURS["red"]  # a long bar is no shape of the world
    (bar,) = read(blob).objects
    assert not bar.confident and not geneval.score(blob, f"a red {bar.shape}")
    blob[10:50, 28:36] = (0, 255, 255)
    assert not [thing for thing in read(blob).objects if thing.confident]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (40, 0, 50, 10), {"left of"}),
        ((40, 0, 50, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (40, 40, 50, 50), {"left of", "above"}),
        ((0, 40, 10, 50), (0, 0, 10, 10), {"below"}),
        ((1, 1, 11, 11), (0, 0, 10, 10), set()),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_relations_are_genevals(a: tuple[float, ...], b: tuple[float, ...], expected: set[str]) -> None:
    def boxed(box: tuple[float, ...]) -> FoundObject:
        return FoundObject("circle", "red", "small", box, (0.0, 0.0), True)  # type: ignore[arg-type]

    assert geneval.relations(boxed(a), boxed(b)) == expected


def test_prompts_are_balanced_and_of_the_split() -> None:
    captions = geneval.prompts(20, "test", seed=4)
    assert [geneval.category(caption) for caption in captions] == [CATEGORIES[i % 6] for i in range(20)]
    assert all(split_of(parse(caption).content) == "test" for caption in captions)
    assert captions == geneval.prompts(20, "test", seed=4) != geneval.prompts(20, "test", seed=5)
    assert geneval.prompts(0) == []


def test_report_is_the_mean_of_six_categories() -> None:
    def verdict(category: str, holds: bool) -> geneval.Score:
        return geneval.Score("", category, (geneval.Clause("", holds),), Reading((), None))

    scores = [verdict(name, True) for name in CATEGORIES] + [verdict("counting", False)] * 3
    result = geneval.report(scores)
    assert result["counting"] == 0.25 and result["overall"] == pytest.approx(5.25 / 6)
    with pytest.raises(UserError, match="no scores for single_object"):
        geneval.report(scores[1:])


def test_the_reader_refuses_other_arrays() -> None:
    with pytest.raises(UserError, match="uint8"):
        read(np.zeros((64, 64, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="too small"):
        read(np.zeros((8, 64, 3), np.uint8))


def test_phrases_of_two_nouns_count_each_shape() -> None:
    things = [
        SceneObject("circle", "red", "small", 0.2, 0.2),
        SceneObject("circle", "red", "small", 0.8, 0.2),
    ]
    image = paint([*things, SceneObject("star", "white", "large", 0.5, 0.7)], "teal", 64)
    assert geneval.score(image, "two red circles and a white star")
    assert geneval.score(image, "a red circle and a red circle")
    assert not geneval.score(image, "a white star and a white star")
    assert not geneval.score(image, "two red circles and two white stars")
    assert parse("two red circles").phrases == (Phrase(2, None, "red", "circle"),)

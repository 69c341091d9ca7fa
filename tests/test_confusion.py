"""Confusion tables over scenes drawn as asked, and drawn wrongly on purpose."""

from varkit.data.captions import parse
from varkit.data.render import SceneObject, paint
from varkit.evaluate.confusion import MISSING, NOTHING, SEVERAL, confusions, mistakes
from varkit.evaluate.geneval import score


def judged(caption: str, *things: tuple[str, str, float, float], background: str = "grey"):
    """A picture of (shape, colour, x, y), judged by the caption."""
    objects = [SceneObject(shape, colour, "large", x, y) for shape, colour, x, y in things]
    return score(paint(objects, background, 64), caption)


def test_one_object_is_read_in_place_of_what_was_asked() -> None:
    tables = confusions(
        [
            judged("a red star", ("star", "red", 0.5, 0.5)),
            judged("a red star", ("circle", "blue", 0.5, 0.5)),
            judged("a red star"),
            judged("a red star", ("star", "red", 0.25, 0.5), ("star", "red", 0.75, 0.5)),
        ]
    )
    assert tables["shape"] == {"star": {"star": 1, "circle": 1, NOTHING: 1, SEVERAL: 1}}
    assert tables["colour"] == {"red": {"red": 1, "blue": 1, NOTHING: 1, SEVERAL: 1}}
    assert not tables["number"] and not tables["relation"]


def test_numbers_and_relations() -> None:
    left, right = ("circle", "red", 0.25, 0.5), ("square", "blue", 0.75, 0.5)
    caption = "a red circle right of a blue square"
    assert parse(caption).relation == "right of"
    tables = confusions(
        [
            judged("two red circles", left, ("circle", "red", 0.75, 0.5)),
            judged("two red circles", left),
            judged(caption, left, right),
            judged(caption, left),
        ]
    )
    assert tables["number"] == {"2": {"2": 1, "1": 1}}
    assert tables["relation"] == {"right of": {"left of": 1, MISSING: 1}}


def test_mistakes_come_commonest_first() -> None:
    tables = confusions(
        [
            *[judged("a red star", ("circle", "red", 0.5, 0.5))] * 2,
            judged("a red star", ("star", "red", 0.5, 0.5)),
            judged("a blue ring", ("ring", "red", 0.5, 0.5)),
        ]
    )
    first, second = mistakes(tables)
    assert (first.table, first.asked, first.read, first.count, first.total) == (
        "shape",
        "star",
        "circle",
        2,
        3,
    )
    assert (second.table, second.asked, second.read) == ("colour", "blue", "red")
    assert mistakes(tables, most=1) == [first]

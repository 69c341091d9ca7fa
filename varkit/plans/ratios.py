"""Infinity's schedules for pictures of any shape (arXiv 2412.04431): a pyramid for each ratio of height to width.

The first 7, 10, 12 and 13 levels make pictures of 0.06, 0.25, 0.60 and 1 million pixels. Wide pictures take the
transposed pyramid. Whatever the size, positions are those of the 1M pyramid's finest grid, so one model serves all.
"""

from varkit.errors import UserError, unknown_name
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Side

BUDGETS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Levels for each number of pixels."""

STRIDE = 16
"""Pixels that a token covers in each direction, with every released tokenizer."""

_TALL = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}

Sides = tuple[tuple[int, int], ...]


def _parsed(text: str) -> Sides:
    pairs = (side.split("x") for side in text.split())
    return tuple((int(h), int(w)) for h, w in pairs)


def _table() -> dict[float, Sides]:
    tall = {ratio: _parsed(text) for ratio, text in _TALL.items()}
    # Published keys are reciprocals cut, not rounded, to three digits (0.666).
    wide = {int(1000 / ratio) / 1000: tuple((w, h) for h, w in sides) for ratio, sides in tall.items()}
    return dict(sorted((wide | tall).items()))


SCHEDULES: dict[float, Sides] = _table()
"""Height over width -> the sides of all 13 levels."""


def nearest_ratio(ratio: float) -> float:
    """The ratio of the table that is nearest to height / width."""
    return min(SCHEDULES, key=lambda known: abs(known - ratio))


def scales(ratio: float = 1.0, budget: str = "1M") -> ScalesConfig:
    """The plan for a picture of about this height / width and number of pixels."""
    if budget not in BUDGETS:
        raise unknown_name("pixel budget", budget, BUDGETS)
    sides = SCHEDULES[nearest_ratio(ratio)]
    schedule: tuple[Side, ...] = sides[: BUDGETS[budget]]
    return ScalesConfig(schedule, frame=sides[-1], ratios=True)


def sized(height: int, width: int) -> ScalesConfig:
    """The plan that makes pictures of exactly height x width pixels. Raises `UserError` naming the nearest size."""
    if min(height, width) < 1:
        raise UserError(f"size {height}x{width} has no pixels; ask for at least 1x1, such as 256x256")
    found = scales(height / width, min(BUDGETS, key=lambda name: _distance(name, height, width)))
    h, w = found.schedule[-1]  # type: ignore[misc]
    if (h * STRIDE, w * STRIDE) != (height, width):
        raise UserError(
            f"size {height}x{width} is none of this model's; the nearest is {h * STRIDE}x{w * STRIDE}"
        )
    return found


def _distance(budget: str, height: int, width: int) -> float:
    h, w = SCHEDULES[nearest_ratio(height / width)][BUDGETS[budget] - 1]
    return abs(h * w * STRIDE**2 - height * width)

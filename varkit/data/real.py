"""Real pictures that come inside two common packages, so that they need no network: digits and photographs.

The trick: the split of the digits goes by writer, that of the patches by photograph, so what is held out is
new handwriting and new scenes, not neighbours of what was seen.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from varkit.data.base import Batch, FiniteDataset, Report, Side, positions, unit_hash
from varkit.data.images import ZOOM, BadImage, fit, open_image
from varkit.errors import UserError

# The 1797 digits come writer by writer, about 128 each, always in the same order (0 to 9 three times, ...).
# From here on they are by the last two writers: 252 of 1797.
LAST_WRITERS = 1545
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
SMALLEST_PATCH = 64
SHIFT = 0.75


class Digits(FiniteDataset):
    """The 1797 handwritten digits of scikit-learn, 8 x 8 greys, stretched smoothly to any side.

    There is nothing to crop, so `crops` shift a digit instead, by up to SHIFT of its own pixels in each direction: few
    pictures are soon known by heart.
    """

    def __init__(self) -> None:
        _require("sklearn", "scikit-learn", "digits")
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.labels = digits.target.astype(np.int64)
        self.rows = np.arange(len(self.images))
        self.keys = [str(row) for row in self.rows]
        self.class_names = [str(digit) for digit in range(10)]
        self.report = Report()

    def held_out(self) -> list[bool]:
        return [bool(row >= LAST_WRITERS) for row in self.rows]

    def take(self, rows: Sequence[int]) -> Self:
        view = super().take(rows)
        view.rows = self.rows[np.asarray(rows, np.int64)]
        return view

    def batch(self, indices: Sequence[int], side: Side, crops: np.ndarray | None = None) -> Batch:
        rows = self.rows[np.asarray(indices, np.int64)]
        h, w = side
        greys = np.empty((len(rows), h, w), np.uint8)
        for grey, row, (y, x) in zip(greys, rows, positions(len(rows), crops), strict=True):
            dy, dx = SHIFT * (2 * y - 1), SHIFT * (2 * x - 1)
            padded = Image.fromarray(np.pad(self.images[row], 1))
            box = (1 + dx, 1 + dy, 9 + dx, 9 + dy)
            grey[:] = np.asarray(padded.resize((w, h), Image.Resampling.BICUBIC, box=box))
        return Batch(np.repeat(greys[..., None], 3, axis=-1), self.labels[rows])


class Photographs(FiniteDataset):
    """Random square patches, the same ones every time, of the photographs in scikit-image's package."""

    def __init__(self, patches_each: int = 256) -> None:
        self.report = Report()
        self.photographs: dict[str, np.ndarray] = {}
        folder = _require("skimage", "scikit-image", "photographs") / "data"
        for name in PHOTOGRAPHS:
            try:
                self.photographs[name] = open_image(folder / name)
            except BadImage as error:
                self.report.add(error.reason, name)
        if not self.photographs:
            raise UserError(
                f"{folder} has no photographs: {self.report}; install scikit-image from its wheel"
            )
        self.patches = [(name, number) for name in self.photographs for number in range(patches_each)]
        self.keys = [name for name, _ in self.patches]

    def take(self, rows: Sequence[int]) -> Self:
        view = super().take(rows)
        view.patches = [self.patches[row] for row in rows]
        return view

    def batch(self, indices: Sequence[int], side: Side, crops: np.ndarray | None = None) -> Batch:
        images = np.empty((len(indices), *side, 3), np.uint8)
        for image, index, crop in zip(images, indices, positions(len(indices), crops), strict=True):
            image[:] = fit(self._patch(*self.patches[index], side), side, (crop[0], crop[1]))
        return Batch(images)

    def _patch(self, name: str, number: int, side: Side) -> np.ndarray:
        """Return patch `number`: size log-uniform from what `side` needs to the whole, place uniform."""
        photograph = self.photographs[name]
        height, width = photograph.shape[:2]
        largest = min(height, width)
        smallest = min(max(SMALLEST_PATCH, round(ZOOM * max(side))), largest)
        size_draw, top_draw, left_draw = (
            unit_hash(f"{name} {number} {what}") for what in ("size", "top", "left")
        )
        size = round(smallest * (largest / smallest) ** size_draw)
        top, left = round((height - size) * top_draw), round((width - size) * left_draw)
        return photograph[top : top + size, left : left + size]


def _require(module: str, package: str, data: str) -> Path:
    """Return the folder of an optional package without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"the {data} need {package}, which is not installed; run: pip install varkit[data]")
    return Path(spec.origin).parent

"""The rasteriser of the scenes world: flat shapes on a plain background, anti-aliased, at any size.

A shape is an inside test on the square [-1, 1]^2 (y points down). The trick: coverage is supersampled once
per (shape, diameter, sub-pixel phase) and cached, so drawing an object is one blend of a small stamp.
Positions are rounded to a quarter of a pixel. Legend: H W image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from varkit.errors import UserError, unknown_name

Array = NDArray[np.floating]
Side = int | tuple[int, int]  # of a picture: a square's side, or (height, width)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (150, 150, 150),
    "beige": (225, 210, 180),
    "navy": (20, 30, 80),
    "teal": (20, 120, 120),
}
# Too close to be told apart once a model blurs them a little.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "grey": (),
    "beige": ("white", "yellow"),
    "navy": ("blue", "black"),
    "teal": ("green",),
}
# The diameter as a share of the image's shorter side: at 64 x 64, 15 and 23 pixels.
SIZES: dict[str, float] = {"small": 0.24, "large": 0.36}

MIN_SIDE = 32
_PHASES = 4  # sub-pixel positions per axis
_SUPERSAMPLE = 8  # samples per pixel and axis


def _star(x: Array, y: Array) -> NDArray[np.bool_]:
    """Five points: the edge from an outer to an inner vertex in polar form, folded onto a tenth of the turn."""
    outer, inner, tenth = 1.05, 0.5, math.pi / 5
    y = y - 0.1  # centres the bounding box
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    edge = outer * inner * math.sin(tenth) / (outer * np.sin(angle) + inner * np.sin(tenth - angle))
    return np.hypot(x, y) <= edge


def _cross(x: Array, y: Array) -> NDArray[np.bool_]:
    across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return (across <= 0.3) & (along <= 1)


def _heart(x: Array, y: Array) -> NDArray[np.bool_]:
    up = 0.23 - 1.03 * y
    return x**2 + (1.25 * up - np.sqrt(np.abs(x))) ** 2 <= 1


_INSIDE: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.88,
    "triangle": lambda x, y: (y <= 0.9) & (2 * np.abs(x) <= 1.06 * (y + 0.96)),
    "star": _star,
    "cross": _cross,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.5**2),
    "heart": _heart,
    "diamond": lambda x, y: np.abs(x) + np.abs(y) <= 1,
}
SHAPES: tuple[str, ...] = tuple(_INSIDE)


@dataclass(frozen=True)
class SceneObject:
    """One object; its centre (x, y) lies in the unit square, y pointing down."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    def __post_init__(self) -> None:
        if self.shape not in _INSIDE:
            raise unknown_name("shape", self.shape, SHAPES)
        if self.colour not in COLOURS:
            raise unknown_name("colour", self.colour, COLOURS)
        if self.size not in SIZES:
            raise unknown_name("size", self.size, SIZES)


@lru_cache(maxsize=4096)
def stamp(shape: str, diameter: float, phase_y: float, phase_x: float) -> NDArray[np.float32]:
    """Return the coverage (n, n) in [0, 1] of a shape whose bounding square starts at these sub-pixel phases."""
    n = math.ceil(diameter + 1)
    grid = (np.arange(n * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    y, x = (((grid - phase) * 2 / diameter - 1) for phase in (phase_y, phase_x))
    inside = _INSIDE[shape](x[None, :], y[:, None]) & (np.abs(x[None, :]) <= 1) & (np.abs(y[:, None]) <= 1)
    coverage = inside.reshape(n, _SUPERSAMPLE, n, _SUPERSAMPLE).mean((1, 3), dtype=np.float32)
    coverage.flags.writeable = False  # shared by every caller of the cache
    return coverage


def image_size(side: Side) -> tuple[int, int]:
    """Return (H, W) for a side or a (height, width); both at least 32."""
    height, width = (side, side) if isinstance(side, int) else side
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"image size {height}x{width} is too small for scenes; use at least {MIN_SIDE}x{MIN_SIDE}"
        )
    return height, width


def _place(thing: SceneObject, height: int, width: int) -> tuple[tuple[slice, slice], NDArray[np.float32]]:
    """Return where an object's stamp lands in the image, and the part of the stamp inside the image."""
    diameter = SIZES[thing.size] * min(height, width)
    top = round((thing.y * height - diameter / 2) * _PHASES)
    left = round((thing.x * width - diameter / 2) * _PHASES)
    coverage = stamp(thing.shape, diameter, top % _PHASES / _PHASES, left % _PHASES / _PHASES)
    y, x, n = top // _PHASES, left // _PHASES, len(coverage)
    y1, x1, y2, x2 = max(y, 0), max(x, 0), max(min(y + n, height), 0), max(min(x + n, width), 0)
    return (slice(y1, y2), slice(x1, x2)), coverage[y1 - y : y2 - y, x1 - x : x2 - x]


def paint(objects: Sequence[SceneObject], background: str, side: Side) -> NDArray[np.uint8]:
    """Draw the objects, first to last (the last is in front), and return the picture (H, W, 3)."""
    height, width = image_size(side)
    image = np.empty((height, width, 3), np.float32)
    image[:] = BACKGROUNDS[background]
    for thing in objects:
        window, coverage = _place(thing, height, width)
        image[window] += coverage[..., None] * (np.array(COLOURS[thing.colour], np.float32) - image[window])
    return (image + 0.5).astype(np.uint8)


def segment(objects: Sequence[SceneObject], side: Side) -> NDArray[np.int64]:
    """Return (H, W): 0 for background, k where the k-th object drawn covers half of the pixel or more."""
    height, width = image_size(side)
    labels = np.zeros((height, width), np.int64)
    for k, thing in enumerate(objects, start=1):
        window, coverage = _place(thing, height, width)
        labels[window][coverage >= 0.5] = k
    return labels


def components(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (H, W): the same id, a pixel's flat index, for all pixels of one 4-connected region of equal
    label.

    Union-find without a loop over pixels: hook every pair of equal neighbours to the smaller root, then jump
    pointers.
    """
    index = np.arange(labels.size).reshape(labels.shape)
    right, down = labels[:, 1:] == labels[:, :-1], labels[1:] == labels[:-1]
    a = np.concatenate([index[:, :-1][right], index[:-1][down]])
    b = np.concatenate([index[:, 1:][right], index[1:][down]])
    root = index.ravel().copy()
    while len(a):
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        np.minimum.at(root, high, low)
        while not np.array_equal(root, jumped := root[root]):
            root = jumped
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]
    return root.reshape(labels.shape)

"""The scene reader: an exact, non-learned parser from a picture of the scenes world back to its objects.

Colour first: every pixel takes the nearest palette colour; specks and fringes too thin to be objects (orange
between red and yellow, say) dissolve into their neighbours; each connected region left is an object. Then
geometry: a region is compared with rendered shapes at many sizes and offsets, by IoU *outside the other
objects*, so that what an object in front covers counts neither for nor against. Doubtful objects are marked
`confident=False`.

Pictures are read at 64 pixels on the shorter side whatever their size. Legend: K colours, T templates, P
placements, n template side.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from varkit.data.render import BACKGROUNDS, COLOURS, FORBIDDEN, SHAPES, SIZES, components, image_size, stamp
from varkit.errors import UserError

SIDE = 64
MIN_SQUARES = 14  # 2 x 2 squares of a region that are true to its colour: a fringe, however long, has fewer
MIN_AREA = 30  # pixels of an object: two thirds of the least that a covered star shows
MIN_BACKGROUND = 0.2  # share of the picture; four large squares leave 0.6
MAX_COLOUR_DISTANCE = 60.0  # in RGB, of a pixel true to its colour; the closest two colours are 71 apart
MIN_IOU, MIN_LEAD = 0.8, 0.02  # of the best shape, and over the next best one
MIN_SEEN, COVER_PENALTY = 0.5, 0.1  # a shape may be half hidden to explain a region; the less the better
_ZOOMS = (0.9, 1.0, 1.1)
_SHIFTS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
_BLURS = (0.0, 1.2)
_REACH, _REACH_COVERED = 2, 6  # offsets tried, in pixels either way: a covered object's box is off centre
_TEMPLATE_SIDE = 29  # holds the largest template at any phase


@dataclass(frozen=True)
class FoundObject:
    """One object; its box (x1, y1, x2, y2) is around what is seen of it, its centre that of the whole shape."""

    shape: str
    colour: str
    size: str
    box: tuple[float, float, float, float]
    centre: tuple[float, float]
    confident: bool


@dataclass(frozen=True)
class Reading:
    """What a picture shows; `background` is None, and nothing found, where no known one fills enough of it."""

    objects: tuple[FoundObject, ...]
    background: str | None


def read(image: NDArray[np.uint8]) -> Reading:
    """Read a picture (H, W, 3), uint8, of any size from 32 x 32; boxes and centres are in its pixels."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"the scene reader takes uint8 pictures (H, W, 3), not {image.dtype} {image.shape}")
    height, width = image_size(image.shape[:2])
    scale = min(height, width) / SIDE
    pixels = _resized(image, round(height / scale), round(width / scale)).astype(np.float32)
    distances = _distances(pixels)
    background = _background(distances)
    if background is None:
        return Reading((), None)
    palette = [*BACKGROUNDS, *COLOURS]
    colours = [colour for colour in COLOURS if colour not in FORBIDDEN[background]]
    distances = distances[[palette.index(name) for name in (background, *colours)]]
    labels = _dissolve_specks(distances)
    regions = components(labels)
    found = []
    for root, area in zip(*np.unique(regions[labels > 0], return_counts=True), strict=True):
        if area >= MIN_AREA:
            region = regions == root
            others = (labels > 0) & ~region
            found.append(_identify(region, others, colours[labels[region][0] - 1], scale))
    return Reading(tuple(found), background)


def _resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if image.shape[:2] == (height, width):
        return image
    kind = Image.Resampling.BOX if image.shape[0] > height else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((width, height), kind))


# --- colour -------------------------------------------------------------------


def _distances(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the squared RGB distance (K, H, W) of every pixel to every palette colour: |p|^2 - 2 p.c + |c|^2."""
    colours = np.array([*BACKGROUNDS.values(), *COLOURS.values()], np.float32)
    squares = np.einsum("hwc,hwc->hw", pixels, pixels) - 2 * np.moveaxis(pixels @ colours.T, -1, 0)
    return squares + (colours**2).sum(1)[:, None, None]


def _background(distances: NDArray[np.float32]) -> str | None:
    """Return the background that most pixels are close to, object colours competing for them too."""
    nearest = distances.argmin(0)[distances.min(0) <= MAX_COLOUR_DISTANCE**2]
    counts = np.bincount(nearest, minlength=len(BACKGROUNDS))[: len(BACKGROUNDS)]
    best = int(counts.argmax())
    return list(BACKGROUNDS)[best] if counts[best] >= MIN_BACKGROUND * distances[0].size else None


def _dissolve_specks(distances: NDArray[np.float32]) -> NDArray[np.int64]:
    """Label pixels (H, W) by nearest colour, 0 the background; specks take the nearest colour around them.

    A region is a speck unless it holds many 2 x 2 squares of pixels close to its colour; "around" is within
    two pixels, and the background always is.
    """
    labels = distances.argmin(0)
    regions = components(labels)
    true = np.where(distances.min(0) <= MAX_COLOUR_DISTANCE**2, regions, -1)
    square = (sliding_window_view(true, (2, 2)) == regions[:-1, :-1, None, None]).all((-2, -1))
    squares = np.bincount(regions[:-1, :-1][square], minlength=labels.size)
    kept = (squares >= MIN_SQUARES)[regions] | (labels == 0)
    around = np.pad(np.where(kept, labels, -1), 2, constant_values=-1)
    windows = sliding_window_view(around, (5, 5))[~kept]
    near = (windows[None] == np.arange(len(distances))[:, None, None, None]).any((-2, -1))
    near[0] = True
    labels[~kept] = np.where(near, distances[:, ~kept], np.inf).argmin(0)
    return labels


# --- shape -------------------------------------------------------------------


@dataclass(frozen=True)
class _Templates:
    """Rendered shapes (T, n * n), equally many of each shape in turn; sizes, sub-pixel shifts (T, 2) as x, y."""

    coverage: NDArray[np.float32]
    size: list[str]
    shift: NDArray[np.float32]


@lru_cache(maxsize=1)
def _templates() -> _Templates:
    coverage, sizes, shifts = [], [], []
    for shape, (size, share), zoom, shift in itertools.product(SHAPES, SIZES.items(), _ZOOMS, _SHIFTS):
        canvas = _rendered(shape, share * SIDE * zoom, shift)
        for sigma in _BLURS:
            coverage.append(_blurred(canvas, sigma).ravel())
            sizes.append(size)
            shifts.append(shift)
    return _Templates(np.stack(coverage), sizes, np.array(shifts, np.float32))


def _rendered(shape: str, diameter: float, shift: tuple[float, float]) -> NDArray[np.float32]:
    """Return a shape's coverage (n, n), its centre shifted by (x, y) from the canvas's centre."""
    canvas = np.zeros((_TEMPLATE_SIDE, _TEMPLATE_SIDE), np.float32)
    (left, phase_x), (top, phase_y) = (divmod((_TEMPLATE_SIDE - diameter) / 2 + d, 1) for d in shift)
    mask = stamp(shape, diameter, phase_y, phase_x)
    canvas[int(top) : int(top) + len(mask), int(left) : int(left) + len(mask)] = mask
    return canvas


def _blurred(canvas: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Return what nearest-colour labels make of a blurred shape: corners round off and thin parts shrink."""
    if sigma == 0:
        return canvas
    offsets = np.arange(_TEMPLATE_SIDE)
    kernel = np.exp(-((offsets[:, None] - offsets) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return (kernel @ canvas @ kernel >= 0.5).astype(np.float32)


def _placements(mask: NDArray[np.bool_], y: int, x: int, reach: int) -> NDArray[np.float32]:
    """Return the mask's n x n windows (n * n, P) at all offsets within reach of the centre pixel (y, x)."""
    half = _TEMPLATE_SIDE // 2 + reach
    around = np.pad(mask, half)[y : y + 2 * half + 1, x : x + 2 * half + 1]
    windows = sliding_window_view(around, (_TEMPLATE_SIDE, _TEMPLATE_SIDE))
    return windows.reshape(-1, _TEMPLATE_SIDE**2).T.astype(np.float32)


def _identify(region: NDArray[np.bool_], others: NDArray[np.bool_], colour: str, scale: float) -> FoundObject:
    """Find the shape, size and centre that explain a region best, given where other objects may cover it."""
    templates = _templates()
    ys, xs = np.nonzero(region)
    left, top, right, bottom = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    y, x = (top + bottom - 1) // 2, (left + right - 1) // 2
    touched = others[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1].any()
    reach = _REACH_COVERED if touched else _REACH
    overlap = templates.coverage @ _placements(region, y, x, reach)
    hidden = templates.coverage @ _placements(others, y, x, reach) if touched else np.zeros_like(overlap)
    whole = templates.coverage.sum(1, keepdims=True)
    iou = overlap / (len(ys) + whole - hidden - overlap)
    hidden = hidden / whole
    merit = np.where(1 - hidden >= MIN_SEEN, iou - COVER_PENALTY * hidden, 0.0)
    by_shape = merit.reshape(len(SHAPES), -1).max(1)
    t, p = np.unravel_index(merit.argmax(), merit.shape)
    second, first = np.sort(by_shape)[-2:]
    dy, dx = divmod(int(p), 2 * reach + 1)
    centre = templates.shift[t] + (x + dx - reach + 0.5, y + dy - reach + 0.5)
    return FoundObject(
        shape=SHAPES[by_shape.argmax()],
        colour=colour,
        size=templates.size[t],
        box=(left * scale, top * scale, right * scale, bottom * scale),
        centre=(float(centre[0] * scale), float(centre[1] * scale)),
        confident=bool(iou[t, p] >= MIN_IOU and first - second >= MIN_LEAD),
    )

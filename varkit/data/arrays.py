"""Pictures in a NumPy file: `.npy` (memory-mapped, may be larger than memory) or `.npz` (images and labels).

The trick: floats are read as [-1, 1] when any is negative, else as [0, 1], and the report says which.

N pictures, H W their size.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from varkit.data.base import Batch, FiniteDataset, Report, Side, positions, printable
from varkit.data.images import fit
from varkit.errors import UserError

IMAGE_KEYS = ("images", "x", "arr_0")
LABEL_KEYS = ("labels", "y", "arr_1")
MAX_NPZ_BYTES = 8 << 30
MAX_CLASSES = 100_000  # each is a row of a model's table; a greater label is some other kind of number
TOLERANCE = 1e-3  # rounding of half precision
SCANNED_BYTES = 64 << 20
LAYOUTS = "(N, H, W), (N, H, W, 1 | 3 | 4) or (N, 3, H, W)"


class ArrayImages(FiniteDataset):
    """Pictures (N, H, W), (N, H, W, 1 | 3 | 4) or (N, 3, H, W), uint8 or float, with labels (N,) or None.

    Labels are the classes' numbers, and `class_names` those from "0" to the greatest. Classes between them that no
    picture has are counted in the report: labels that do not begin at 0, or that are not classes at all.
    Raises `UserError` for another shape, type or range.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, name: str = "array") -> None:
        self.channels_first = _channels_first(images.shape, name)
        self.images = images
        self.labels = None if labels is None else _checked_labels(labels, len(images), name)
        self.keys = [str(row) for row in range(len(images))]
        self.rows = np.arange(len(images))
        self.report = Report()
        self.low, self.high = _value_range(images, name)
        if images.dtype != np.uint8:
            self.report.add(f"float array read as [{self.low:g}, {self.high:g}]", name)
        if self.labels is not None:
            self.class_names = [str(number) for number in range(int(self.labels.max()) + 1)]
            for number in np.setdiff1d(np.arange(len(self.class_names)), self.labels):
                self.report.add("class without a picture", str(number))

    def take(self, rows: Sequence[int]) -> Self:
        view = super().take(rows)
        view.rows = self.rows[np.asarray(rows, np.int64)]
        return view

    def batch(self, indices: Sequence[int], side: Side, crops: np.ndarray | None = None) -> Batch:
        rows = self.rows[np.asarray(indices, np.int64)]
        images = np.empty((len(rows), *side, 3), np.uint8)
        for image, row, crop in zip(images, rows, positions(len(rows), crops), strict=True):
            image[:] = fit(self._rgb(row), side, (crop[0], crop[1]))
        return Batch(images, None if self.labels is None else self.labels[rows])

    def _rgb(self, row: int) -> np.ndarray:
        """Return picture `row` as uint8 (H, W, 3), transparency composited on white."""
        pixels = np.asarray(self.images[row])
        if self.channels_first:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype != np.uint8:
            pixels = _to_bytes(pixels, self.low, self.high)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.shape[-1] == 4:
            alpha = pixels[..., 3:].astype(np.float32) / 255
            pixels = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def open_array(path: str | Path) -> ArrayImages:
    """Open a `.npy` or `.npz` file; pickles are refused.

    An `.npz` is unpacked into memory, and one that unpacks to more than 8 GiB (`MAX_NPZ_BYTES`) is refused: a fixed
    limit, whatever memory there is. A `.npy` is read from disk as it is needed and has none.
    Raises `UserError`.
    """
    path, name = Path(path), printable(str(path))
    if not path.exists():
        raise UserError(f"array file {name} does not exist; give an .npy or .npz file of pictures")
    if not path.is_file():
        raise UserError(f"{name} is not a file; give an .npy or .npz file of pictures")
    try:
        if zipfile.is_zipfile(path):
            return _open_npz(path, name)
        return ArrayImages(np.load(path, mmap_mode="r", allow_pickle=False), name=name)
    except UserError:
        raise
    except Exception as error:  # damaged files meet the readers of zip, zlib and headers with any exception
        raise UserError(
            f"{name} is not a readable array ({printable(str(error))[:120]}): damaged or pickled objects; "
            "write numbers with numpy.save or numpy.savez"
        ) from error


def _open_npz(path: Path, name: str) -> ArrayImages:
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
    if total > MAX_NPZ_BYTES:
        raise UserError(
            f"{name} unpacks to {total} bytes, more than {MAX_NPZ_BYTES}; "
            "write its pictures with numpy.save as .npy, which is read from disk"
        )
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = _first(arrays, IMAGE_KEYS), _first(arrays, LABEL_KEYS)
        if images is None:
            found = ", ".join(map(printable, arrays.files[:8])) or "nothing"
            raise UserError(f"{name} has no array {' / '.join(IMAGE_KEYS)} of pictures; it has {found}")
    return ArrayImages(images, labels, name)


def _first(arrays: Mapping[str, np.ndarray], keys: Sequence[str]) -> np.ndarray | None:
    return next((arrays[key] for key in keys if key in arrays), None)


def _channels_first(shape: tuple[int, ...], name: str) -> bool:
    if 0 in shape:
        raise UserError(f"{name} is empty: shape {shape}; give at least one picture")
    if len(shape) == 3 or (len(shape) == 4 and shape[-1] in (1, 3, 4)):
        return False
    if len(shape) == 4 and shape[1] == 3:
        return True
    raise UserError(f"{name} has shape {shape}; pictures are {LAYOUTS}")


def _checked_labels(labels: np.ndarray, count: int, name: str) -> np.ndarray:
    """Return the labels as int64, the number of classes kept within bounds."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{name} has labels of shape {labels.shape} and type {labels.dtype}; "
            f"give {count} whole numbers from 0, one for each picture"
        )
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < MAX_CLASSES:
            raise UserError(
                f"{name} has the label {label}; labels are classes from 0 to {MAX_CLASSES - 1}; "
                "number yours from 0, or leave the labels out"
            )
    return labels.astype(np.int64)


def _value_range(images: np.ndarray, name: str) -> tuple[float, float]:
    """Return the range that the values are in: (0, 255), (0, 1) or (-1, 1)."""
    if images.dtype == np.uint8:
        return 0, 255
    if images.dtype.kind != "f":
        raise UserError(
            f"{name} has values of type {images.dtype}; pictures are uint8 or float; "
            "scale them to 0 to 255 and save them as numpy.uint8"
        )
    rows = max(1, SCANNED_BYTES // images[0].nbytes)
    parts = [images[start : start + rows] for start in range(0, len(images), rows)]
    low = float(np.min([part.min() for part in parts]))
    high = float(np.max([part.max() for part in parts]))
    if np.isnan(low):
        raise UserError(f"{name} has values that are not numbers (NaN); remove those pictures")
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise UserError(
            f"{name} has floats from {low:g} to {high:g}; pictures are floats in [0, 1] or [-1, 1], or uint8"
        )
    return (-1, 1) if low < -TOLERANCE else (0, 1)


def _to_bytes(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (pixels.astype(np.float32) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)

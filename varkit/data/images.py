"""Turn one file of unknown quality into RGB pixels, or into a named reason why not; never hang, never crash.

The trick: everything that can be refused is refused from the header (kind of file, bytes, pixels), before a
decoder allocates anything; whatever a decoder then throws becomes a `BadImage` with a `Reason`.

H W picture, h w target side.
"""

import errno
import functools
import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from varkit.data.base import Report, Side, printable
from varkit.errors import UserError

# Pillow's own warning threshold, so that no accepted picture triggers its warning.
MAX_PIXELS = 89_478_485
# Some decoders read the whole file first; a raw 16-bit RGBA picture needs 8 bytes a pixel.
MAX_BYTES_PER_PIXEL = 8
ZOOM = 1.125
# EPS runs an external interpreter on the file; the others are containers that Pillow names but cannot decode.
NOT_DECODED = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
STRIP_PIXELS = 1 << 18  # converted at a time
DEEP_GREY = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class Reason(StrEnum):
    """Why a picture was skipped, or used with a reservation."""

    MISSING = "missing"
    NOT_A_FILE = "not a regular file"
    NO_PERMISSION = "no permission"
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    NOT_A_PICTURE = "not a picture"
    TOO_LARGE = "too large"
    TRUNCATED = "truncated"
    UNDECODABLE = "undecodable"
    ANIMATED = "animated: first frame used"


class BadImage(UserError):
    """A picture that cannot be used; `reason` says why."""

    def __init__(self, name: str, reason: Reason, detail: str = "") -> None:
        super().__init__(
            f"picture {printable(name)}: {reason}" + (f" ({printable(detail)})" if detail else "")
        )
        self.reason = reason


def open_image(
    source: str | Path | bytes,
    max_pixels: int = MAX_PIXELS,
    cover: Side | None = None,
    report: Report | None = None,
) -> np.ndarray:
    """Return the picture in `source` (a path, or the bytes of a file) as RGB uint8 (H, W, 3), upright.

    Transparency is composited on white, deep greys are scaled to 8 bits, animations give their first frame
    (counted in `report`). A picture larger than `max_pixels` by its header is refused before decoding. With
    `cover` a large JPEG may come at 1/2, 1/4 or 1/8 of its size, as long as it covers that side twice.
    Raises `BadImage`.
    """
    with _opened(source, max_pixels) as image:
        if cover is not None:
            longest = 2 * max(cover)  # either way round: the picture may yet be turned upright
            image.draft(image.mode, (longest, longest))
        image.load()
        if report is not None and _has_more_frames(image):
            report.add(Reason.ANIMATED, _name(source))
        return _to_rgb(_upright(image))


def open_alpha(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """Return how opaque the picture in `source` is, uint8 (H, W), upright; None where it cannot be transparent.

    Raises `BadImage`.
    """
    with _opened(source, max_pixels) as image:
        image.load()
        upright = _upright(image)
        if not upright.has_transparency_data:
            return None
        opaque = np.empty((upright.height, upright.width), np.uint8)
        for rows, strip in _strips(upright):
            opaque[rows] = np.asarray(strip.convert("RGBA").getchannel("A"))
        return opaque


def check_header(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Raise `BadImage` if the kind of file, its size or its header rule it out; decodes nothing."""
    with _opened(source, max_pixels):
        pass


def fit(
    image: np.ndarray, side: Side, crop: tuple[float, float] = (0.5, 0.5), zoom: float = ZOOM
) -> np.ndarray:
    """Resize `image` uint8 (H, W, 3) to cover `zoom` times `side` (h, w), then crop at `crop` in [0, 1].

    VAR's preprocessing, done in one Lanczos pass over the cropped box, so that a 1 x 100000 picture costs no
    more than any other. A picture that already has exactly `side` is returned as it is.
    """
    height, width = image.shape[:2]
    h, w = side
    if (height, width) == (h, w):
        return image
    scale = max(zoom * h / height, zoom * w / width)
    box_h, box_w = min(h / scale, height), min(w / scale, width)
    top, left = (height - box_h) * crop[0], (width - box_w) * crop[1]
    box = (left, top, min(left + box_w, width), min(top + box_h, height))
    return np.array(
        Image.fromarray(image).resize((w, h), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    )


@functools.cache
def picture_formats() -> tuple[str, ...]:
    """Return the names of the formats that are tried, the common ones first."""
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of the files that hold pictures, with their dots."""
    formats = picture_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


@contextmanager
def _opened(source: str | Path | bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open a picture by its header and turn whatever happens to it inside the block into `BadImage`."""
    name = _name(source)
    too_large = f"more than {max_pixels} pixels"
    try:
        with _stream(source, name, max_pixels) as file, Image.open(file, formats=picture_formats()) as image:
            if image.width < 1 or image.height < 1:
                raise BadImage(name, Reason.EMPTY, f"{image.height}x{image.width} pixels")
            if image.width * image.height > max_pixels:
                raise BadImage(name, Reason.TOO_LARGE, f"{image.height}x{image.width} is {too_large}")
            yield image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(name, Reason.NOT_A_PICTURE) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(name, Reason.TOO_LARGE, too_large) from None
    except (
        Exception
    ) as error:  # decoders meet hostile bytes with any exception there is, MemoryError included
        truncated = isinstance(error, EOFError) or "truncat" in str(error).lower()
        reason = Reason.TRUNCATED if truncated else Reason.UNDECODABLE
        raise BadImage(name, reason, str(error) or type(error).__name__) from error


def _stream(source: str | Path | bytes, name: str, max_pixels: int) -> BinaryIO:
    """Open a regular, non-empty file of bearable length; pipes and sockets would block for ever."""
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
        length = len(source)
    else:
        try:
            status = Path(source).stat()
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(name, Reason.NOT_A_FILE)
            file = open(source, "rb")
        except OSError as error:
            raise BadImage(name, _file_reason(error), error.strerror or "") from None
        length = status.st_size
    if length == 0 or length > MAX_BYTES_PER_PIXEL * max(max_pixels, 1 << 20):
        file.close()
        raise BadImage(name, Reason.EMPTY if length == 0 else Reason.TOO_LARGE, f"{length} bytes")
    return file


def _file_reason(error: OSError) -> Reason:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return Reason.MISSING
    return Reason.NO_PERMISSION if isinstance(error, PermissionError) else Reason.UNREADABLE


def _name(source: str | Path | bytes) -> str:
    return f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _has_more_frames(image: Image.Image) -> bool:
    """Whether frames are left out, not counting MPO: a phone's photograph with its thumbnail or depth map."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # a broken second frame is no reason to lose the first
        return False


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        pass
    return image


def _strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yield the picture in strips of whole rows, about `STRIP_PIXELS` each, and which rows they are.

    A conversion goes through several copies of what it converts; of the largest pictures, whole ones are gigabytes.
    """
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels (H, W, 3) as uint8."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    if image.mode in DEEP_GREY:
        low, limit = _grey_range(image)
        for rows, strip in _strips(image):
            values = np.asarray(strip).astype(np.float64)  # every 32-bit integer is exact in it
            pixels[rows] = np.rint((values - low) * 255 / limit).astype(np.uint8)[..., None]
    else:
        convert = _on_white if image.has_transparency_data else _without_alpha
        for rows, strip in _strips(image):
            pixels[rows] = np.asarray(convert(strip))
    return pixels


def _without_alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """Return the deep grey that becomes 0, and how far above it 255 is.

    Integers are 16-bit (what Pillow makes of deep PNG, PGM and TIFF); floats run to 1, 255 or 65535,
    whichever holds them first; anything outside is stretched from its lowest to its highest value.
    """
    ranges = []
    for _, strip in _strips(image):
        values = np.asarray(strip)
        ranges.append((values.min(), values.max()))
    low, high = float(np.min(ranges)), float(np.max(ranges))  # NumPy's, which let NaN through
    if not np.isfinite([low, high]).all():
        raise ValueError("has values that are not finite")
    for limit in (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,):
        if low >= 0 and high <= limit:
            return 0.0, limit
    return low, max(high - low, 1.0)

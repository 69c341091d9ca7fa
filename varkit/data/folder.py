"""A folder of pictures as a dataset: labels from its sub-folders, captions from text files within.

The trick: headers are checked once, up front, so the length is true; a picture that breaks while decoding is
counted, and the next good one by name (with its own label and caption) stands in, the same one every time.
Caption files are not trusted: names in them are only looked up among the pictures found, never opened.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path, PurePath
from typing import NamedTuple, Self

import numpy as np

from varkit.data.base import Batch, FiniteDataset, Report, Side, positions, printable
from varkit.data.images import MAX_PIXELS, BadImage, check_header, fit, open_image, picture_suffixes
from varkit.errors import UserError

CACHE_BYTES = 256 << 20
LARGEST_CACHED = 1 << 20
CAPTION_LISTS = ("metadata.jsonl", "captions.jsonl")  # the later one wins
LONGEST_CAPTION = 1 << 16
HEADER_THREADS = 8  # hides the latency of a network disk


class FolderReason(StrEnum):
    """Why a sub-folder was not entered, its name is no class, or a caption was not used."""

    LINKED = "linked folder not entered"
    CLOSED = "unreadable folder"
    BESIDE = "picture beside the class folders: no classes"
    OUTSIDE = "caption path leaves the folder"
    UNREADABLE = "unreadable caption"
    NO_PICTURE = "caption without a picture"
    NO_CAPTION = "picture without a caption"


class Entry(NamedTuple):
    """A picture: its path relative to the folder, its class, its caption ("" when it has none)."""

    name: str
    label: int
    caption: str


class PixelCache:
    """Decoded small pictures, up to a number of bytes.

    Nothing is evicted: in passes over a set larger than the cache, a full cache hits on its share every time,
    where keeping the most recent never does.
    """

    def __init__(self, limit: int) -> None:
        self.free = limit
        self._pixels: dict[tuple[str, Side], np.ndarray] = {}

    def get(self, key: tuple[str, Side]) -> np.ndarray | None:
        return self._pixels.get(key)

    def put(self, key: tuple[str, Side], pixels: np.ndarray) -> None:
        if pixels.nbytes <= min(self.free, LARGEST_CACHED):
            self._pixels[key] = pixels
            self.free -= pixels.nbytes


class ImageFolder(FiniteDataset):
    """All pictures under `path` in the order of their names, hidden files and linked folders left out.

    A first-level sub-folder is a class (when every picture lies in one). A caption is the first line of the
    `.txt` beside the picture, in UTF-8, or the `caption` (or `text`) beside its `file_name` in `captions.jsonl` or
    `metadata.jsonl`.
    """

    def __init__(
        self, path: str | Path, max_pixels: int = MAX_PIXELS, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.root = _existing_folder(Path(path))
        self.max_pixels = max_pixels
        self.report = Report()
        self._cache = PixelCache(cache_bytes)
        self._broken: set[str] = set()

        names, texts = _walk(self.root, self.report)
        good = self._check_headers(names)
        captions = _read_captions(self.root, names, texts, self.report)
        self.class_names, labels = _classes(good)
        self.keys = good
        self.entries = [Entry(n, label, captions.get(n, "")) for n, label in zip(good, labels, strict=True)]
        without = [entry.name for entry in self.entries if not entry.caption]
        self.has_captions = len(without) < len(good)
        if self.has_captions:
            for name in without:
                self.report.add(FolderReason.NO_CAPTION, name)
        elif self.class_names is None:  # captions are used in place of classes
            for name in _beside_folders(good):
                self.report.add(FolderReason.BESIDE, name)

    def _check_headers(self, names: list[str]) -> list[str]:
        """Return the names of the pictures whose header is sound; count the others."""

        def problem(name: str) -> BadImage | None:
            try:
                check_header(self.root / name, self.max_pixels)
            except BadImage as error:
                return error
            return None

        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            problems = dict(zip(names, pool.map(problem, names), strict=True))
        for name, error in problems.items():
            if error is not None:
                self.report.add(error.reason, name)
        good = [name for name in names if problems[name] is None]
        if not good:
            why = (
                f"all were skipped: {self.report}" if names else "it has no .jpg, .png or other picture files"
            )
            raise UserError(f"folder {printable(str(self.root))} gives no pictures: {why}")
        return good

    def take(self, rows: Sequence[int]) -> Self:
        view = super().take(rows)
        view.entries = [self.entries[row] for row in rows]
        return view

    def batch(self, indices: Sequence[int], side: Side, crops: np.ndarray | None = None) -> Batch:
        images = np.empty((len(indices), *side, 3), np.uint8)
        entries = []
        for image, index, crop in zip(images, indices, positions(len(indices), crops), strict=True):
            entry, pixels = self._picture_or_stand_in(index, side)
            image[:] = fit(pixels, side, (crop[0], crop[1]))
            entries.append(entry)
        labels = np.array([e.label for e in entries], np.int64) if self.class_names else None
        return Batch(images, labels, [e.caption for e in entries] if self.has_captions else None)

    def _picture_or_stand_in(self, index: int, side: Side) -> tuple[Entry, np.ndarray]:
        """Return the picture at `index`, or the next by name in the same split that can be decoded."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of a folder of {len(self)}")
        for step in range(len(self)):
            entry = self.entries[(index + step) % len(self)]
            if entry.name in self._broken:
                continue
            try:
                return entry, self._pixels(entry.name, side)
            except BadImage as error:
                self._broken.add(entry.name)
                self.report.add(error.reason, entry.name)
        raise UserError(f"no picture of folder {printable(str(self.root))} can be decoded: {self.report}")

    def _pixels(self, name: str, side: Side) -> np.ndarray:
        pixels = self._cache.get((name, side))
        if pixels is None:
            pixels = open_image(self.root / name, self.max_pixels, cover=side, report=self.report)
            self._cache.put((name, side), pixels)
        return pixels


def _existing_folder(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"folder {printable(str(path))} does not exist; give a folder of pictures")
    if not path.is_dir():
        raise UserError(f"{printable(str(path))} is not a folder; give the folder that holds the pictures")
    return path


def _walk(root: Path, report: Report) -> tuple[list[str], dict[str, str]]:
    """Return the sorted relative names of all picture files, and those of the `.txt` files by name without suffix.

    Suffixes are of any case.
    """
    pictures, texts = [], []

    def unreadable(error: OSError) -> None:
        report.add(FolderReason.CLOSED, str(error.filename))

    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            if (here / name).is_symlink():
                report.add(FolderReason.LINKED, (here / name).relative_to(root).as_posix())
        for name in files:
            suffix = PurePath(name).suffix.lower()
            relative = (here / name).relative_to(root).as_posix()
            if name.startswith("."):
                continue
            if suffix in picture_suffixes():
                pictures.append(relative)
            elif suffix == ".txt":
                texts.append(relative)
    # Of `a.TXT` and `a.txt` the later is used: the one in small letters.
    return sorted(pictures), {_stem(text): text for text in sorted(texts)}


def _stem(name: str) -> str:
    return PurePath(name).with_suffix("").as_posix()


def _classes(names: list[str]) -> tuple[list[str] | None, list[int]]:
    """Return the first-level sub-folders and each picture's number among them, or None and -1 throughout."""
    folders = [name.split("/")[0] for name in names if "/" in name]
    if len(folders) < len(names):
        return None, [-1] * len(names)  # reported, see `_beside_folders`
    classes = sorted(set(folders))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[name] for name in folders]


def _beside_folders(names: list[str]) -> list[str]:
    """Return the pictures in no sub-folder, where others are in one: those that keep sub-folders from being classes."""
    loose = [name for name in names if "/" not in name]
    return loose if len(loose) < len(names) else []


def _read_captions(root: Path, names: list[str], texts: dict[str, str], report: Report) -> dict[str, str]:
    """Return caption by picture name; lists of captions override the text files."""
    captions = {}
    for name in names:
        text = texts.get(_stem(name))
        if text is not None:
            lines = map(_one_line, _read_lines(root, text, report))
            caption = next(filter(None, lines), "")
            if _is_text(caption):
                captions[name] = caption
            else:
                report.add(FolderReason.UNREADABLE, text)
    known = set(names)
    for caption_list in CAPTION_LISTS:
        if not os.path.lexists(root / caption_list):
            continue
        for number, line in enumerate(_read_lines(root, caption_list, report), start=1):
            if line.strip():
                place = f"{caption_list}:{number}"
                captions.update(_parse_caption(root, known, line, place, report))
    return captions


def _read_lines(root: Path, name: str, report: Report) -> Iterator[str]:
    """Yield the lines of a caption file; refuse links out of the folder, pipes, and endless lines.

    Bytes that are not UTF-8 become surrogates (`_is_text`), so that they cost their own line alone.
    """
    path = root / name
    if not _is_inside(root, path):
        report.add(FolderReason.OUTSIDE, name)
        return
    if not path.is_file():
        report.add(FolderReason.UNREADABLE, name)
        return
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(LONGEST_CAPTION):
                yield line
    except OSError:
        report.add(FolderReason.UNREADABLE, name)


def _parse_caption(root: Path, known: set[str], line: str, place: str, report: Report) -> dict[str, str]:
    """Return {picture name: caption} of one line of a caption list, or nothing when it is refused."""
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row["caption"] if "caption" in row else row["text"]
        if not (isinstance(name, str) and isinstance(caption, str)):
            raise TypeError
        if not (_is_text(line) and _is_text(caption)):  # JSON can write half a surrogate pair
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        report.add(FolderReason.UNREADABLE, place)
        return {}
    path = PurePath(name)
    if path.anchor or ".." in path.parts or not _is_inside(root, root / path):
        report.add(FolderReason.OUTSIDE, f"{place} {name}")
        return {}
    if path.as_posix() not in known:
        report.add(FolderReason.NO_PICTURE, f"{place} {name}")
        return {}
    return {path.as_posix(): _one_line(caption)}


def _is_inside(root: Path, path: Path) -> bool:
    """Whether `path`, links followed, lies under `root`."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, a zero byte
        return False


def _is_text(text: str) -> bool:
    """Whether `text` can be written in UTF-8: no surrogates, which stand for bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(text: str) -> str:
    return " ".join(text.split())

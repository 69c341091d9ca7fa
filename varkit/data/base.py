"""What every source of pictures offers: `batch(indices, side)`, a size, names of classes, a split, a report.

The trick: a split is a *filter by a stable hash of each item's key*, so a held-out picture stays held out
when others are added, and pictures cut from the same photograph (same key) are never on both sides.

B batch, h w side of the pictures.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np

from varkit.errors import UserError

Side = tuple[int, int]
Part = Literal["train", "validation"]
HELD_OUT = 0.1
FEWEST_TO_SPLIT = 10


class Batch(NamedTuple):
    """`images` uint8 (B, h, w, 3); `labels` int64 (B,) or None; `captions` B strings or None."""

    images: np.ndarray
    labels: np.ndarray | None = None
    captions: list[str] | None = None


@dataclass
class Report:
    """Counts of what was skipped or treated specially, by reason, each with up to three names."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < 3:
            shown.append(printable(name))

    def __str__(self) -> str:
        if not self.counts:
            return "nothing skipped"
        most_first = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return "; ".join(f"{count} {reason} ({self._names(reason)})" for reason, count in most_first)

    def _names(self, reason: str) -> str:
        names = self.examples[reason]
        return ", ".join(names) + (", ..." if self.counts[reason] > len(names) else "")


class Dataset(Protocol):
    """A source of labelled or captioned pictures. `size` is None when it is endless."""

    class_names: list[str] | None
    report: Report

    @property
    def size(self) -> int | None: ...

    def batch(self, indices: Sequence[int], side: Side, crops: np.ndarray | None = None) -> Batch:
        """Return the items at `indices` as pictures of `side` (h, w).

        `crops` (B, 2) in [0, 1] are the (vertical, horizontal) positions of the crops, drawn by the caller
        for training; None crops at the centre. Sources that have nothing to crop ignore them.
        """
        ...

    def split(self, part: Part) -> "Dataset": ...


class FiniteDataset:
    """Base of the readers: `keys[i]` is the name of item i that the split hashes."""

    keys: list[str]
    class_names: list[str] | None = None
    report: Report

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def size(self) -> int | None:
        return len(self)

    def take(self, rows: Sequence[int]) -> Self:
        """Return a view with only the items `rows`; report and caches are shared."""
        view = copy.copy(self)
        view.keys = [self.keys[row] for row in rows]
        return view

    def split(self, part: Part) -> Self:
        """Return the training or the validation items."""
        if part not in ("train", "validation"):
            raise UserError(f"unknown part {part!r} of a dataset; take 'train' or 'validation'")
        held_out = self.held_out()
        return self.take([row for row, held in enumerate(held_out) if held == (part == "validation")])

    def held_out(self) -> list[bool]:
        """Whether each item is for validation; sources with a natural split override this."""
        return hash_split(self.keys)


def hash_split(keys: Sequence[str]) -> list[bool]:
    """Hold out about a tenth by hash of the key: none of fewer than 10 items, otherwise at least one key.

    A single key cannot be split, and something is always left to train on.
    """
    values = {key: unit_hash(key) for key in dict.fromkeys(keys)}
    if len(keys) < FEWEST_TO_SPLIT or len(values) == 1:
        return [False] * len(keys)
    lowest, highest = min(values.values()), max(values.values())
    threshold = HELD_OUT if lowest <= HELD_OUT < highest else lowest
    return [values[key] <= threshold for key in keys]


def unit_hash(key: str) -> float:
    """Return a number in [0, 1) that depends on nothing but `key`."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def positions(count: int, crops: np.ndarray | None) -> np.ndarray:
    """Return the crop positions (B, 2): the centre unless the caller drew them."""
    if crops is None:
        return np.full((count, 2), 0.5)
    assert crops.shape == (count, 2), crops.shape
    return crops


def printable(name: str) -> str:
    """Return `name` fit for one line of a terminal: control characters and undecodable bytes escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)

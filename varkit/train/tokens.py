"""Pictures encoded once: the tokens, labels and captions that generator training reads again and again.

Encoding costs a good part of a training step, so a run encodes its data set (or the first `count` of an endless one)
into its folder; a resumed run finds it there. Legend: N items, L positions.
"""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from varkit.data.ahead import made_ahead
from varkit.data.base import Batch, Dataset
from varkit.devices import device_of, workers_for
from varkit.files import atomic_folder
from varkit.pictures import to_tensor
from varkit.tokenizers.base import Latents, Tokenizer

Progress = Callable[[int, int], None]
LABELS = "labels"
CHUNK = 64
"""Pictures encoded at a time."""

CANNOT_RESERVE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that do not know how to reserve space."""


@dataclass(frozen=True)
class Tokens:
    """latents by name (N, L, ...), int64 as int32; labels (N,) int64 or None; captions N strings or None."""

    latents: dict[str, np.ndarray]
    labels: np.ndarray | None = None
    captions: list[str] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.latents.values())))

    @classmethod
    def load(cls, folder: Path) -> "Tokens":
        """Read what `encode` wrote; latents stay on disk, mapped."""
        labels, captions = folder / f"{LABELS}.npy", folder / "captions.json"
        return cls(
            {
                path.stem: np.load(path, mmap_mode="r", allow_pickle=False)
                for path in sorted(folder.glob("*.npy"))
                if path.stem != LABELS
            },
            np.load(labels, allow_pickle=False) if labels.exists() else None,
            json.loads(captions.read_text()) if captions.exists() else None,
        )

    def take(self, rows: np.ndarray) -> Latents:
        """The latents of some items, (B, L, ...), integers as int64."""
        taken = {name: torch.from_numpy(np.array(values[rows])) for name, values in self.latents.items()}
        return {name: t if t.is_floating_point() else t.long() for name, t in taken.items()}


@torch.no_grad()
def no_more_than_seen(dataset: Dataset, pictures: int, steps: int | None, batch_size: int) -> int:
    """How many of so many pictures of an endless data set to encode where a training has only so many steps."""
    if steps is None or dataset.split("train").size is not None:
        return pictures
    return min(pictures, steps * batch_size)


def encode(
    tokenizer: Tokenizer,
    dataset: Dataset,
    count: int,
    folder: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tokens:
    """Encode `count` items (going round a finite set, with new crops each time) into `folder`, unless it is there."""
    if folder.exists():
        return Tokens.load(folder)
    side, size, device = tokenizer.image_size(), dataset.size, device_of(tokenizer)
    labels, captions = [], []

    def drawn(start: int) -> Batch:
        numbers = np.arange(start, min(count, start + CHUNK))
        rows = numbers if size is None else numbers % size
        return dataset.batch(rows.tolist(), side, np.random.default_rng([seed, start]).random((len(rows), 2)))

    # Finite sets count what they skip, which is told at the end, so they are read here.
    batches = made_ahead(drawn, range(0, count, CHUNK), workers_for(device) if size is None else 0)
    with atomic_folder(folder) as temporary:
        # Straight to disk: small arrays kept between the large temporaries of each batch would tear the heap to
        # pieces (gigabytes for 100,000 pictures).
        files: dict[str, np.memmap] = {}
        for start, batch in zip(range(0, count, CHUNK), batches, strict=True):
            numbers = np.arange(start, start + len(batch.images))
            for name, t in tokenizer.training_latents(to_tensor(batch.images).to(device)).items():
                values = (t.int() if t.dtype == torch.int64 else t).cpu().numpy()
                if name not in files:
                    shape = (count, *values.shape[1:])
                    files[name] = _on_disk(temporary / f"{name}.npy", values.dtype, shape)
                files[name][numbers] = values
            if batch.labels is not None:
                labels.append(batch.labels)
            if batch.captions is not None:
                captions.extend(batch.captions)
            if progress is not None:
                progress(start + len(batch.images), count)
        for values in files.values():
            values.flush()
        if labels:
            np.save(temporary / f"{LABELS}.npy", np.concatenate(labels))
        if captions:
            (temporary / "captions.json").write_text(json.dumps(captions))
    return Tokens.load(folder)


def _on_disk(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A new array of zeros, mapped, whose place on disk is its own: where a map has none, writing to it on a full disk
    ends the process by SIGBUS. Raises `OSError` for a disk without so much space.
    """
    values = np.lib.format.open_memmap(file, "w+", dtype, shape)
    with open(file, "rb+") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, values.offset + values.nbytes)
        except (AttributeError, OSError) as error:  # the platform, or the file system, does not know how
            if isinstance(error, OSError) and error.errno not in CANNOT_RESERVE:
                raise
            handle.seek(values.offset)
            for row in values:
                handle.write(row.tobytes())
    return values

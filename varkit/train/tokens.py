"""Pictures encoded once: the tokens, labels and captions that generator training reads again and again.

Encoding costs a good part of a training step, so a run encodes its data set (or the first `count` of an endless one)
into its folder; a resumed run finds it there. Legend: N items, L positions.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from varkit.data.base import Dataset
from varkit.files import atomic_folder
from varkit.pictures import to_tensor
from varkit.tokenizers.base import Tokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tokens:
    """ids (N, L) int32; labels (N,) int64 or None; captions N strings or None."""

    ids: np.ndarray
    labels: np.ndarray | None
    captions: list[str] | None

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def load(cls, folder: Path) -> "Tokens":
        """Read what `encode` wrote; ids stay on disk, mapped."""
        labels, captions = folder / "labels.npy", folder / "captions.json"
        return cls(
            np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False),
            np.load(labels, allow_pickle=False) if labels.exists() else None,
            json.loads(captions.read_text()) if captions.exists() else None,
        )


@torch.no_grad()
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
    side = tokenizer.image_size()
    size = dataset.size
    ids, labels, captions = [], [], []
    for start in range(0, count, 64):
        numbers = np.arange(start, min(count, start + 64))
        rows = numbers if size is None else numbers % size
        crops = np.random.default_rng([seed, start]).random((len(rows), 2))
        batch = dataset.batch(rows.tolist(), side, crops)
        ids.append(tokenizer.encode(to_tensor(batch.images))["ids"].int().numpy())
        if batch.labels is not None:
            labels.append(batch.labels)
        if batch.captions is not None:
            captions.extend(batch.captions)
        if progress is not None:
            progress(min(count, start + 64), count)
    with atomic_folder(folder) as temporary:
        np.save(temporary / "ids.npy", np.concatenate(ids))
        if labels:
            np.save(temporary / "labels.npy", np.concatenate(labels))
        if captions:
            (temporary / "captions.json").write_text(json.dumps(captions))
    return Tokens.load(folder)

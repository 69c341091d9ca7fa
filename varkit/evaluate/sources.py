"""Pictures to compare: a folder, an array file, a data set, or what a model draws, all at one side.

The side is that of the pictures judged: a model's own size, or that of the first picture of a folder or array. Pictures
of exactly that side are compared as they are; any other is brought to it as for training (`varkit.data.images.fit`: it
covers 1.125 times the side, and the centre is kept).
Legend: B batch, H W picture, n pictures.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varkit.data.arrays import ArrayImages
from varkit.data.base import Dataset, Report, Side
from varkit.data.folder import ImageFolder
from varkit.data.images import open_image
from varkit.data.registry import open_dataset
from varkit.errors import UserError
from varkit.evaluate.drawing import draw, padded
from varkit.evaluate.frechet import Statistics
from varkit.generators.text import TextConfig
from varkit.hub.folder import CONFIG
from varkit.hub.pipeline import Pipeline, Prompt, Settings, bundled, load
from varkit.pictures import to_tensor

BATCH = 32
DRAWN = 2000
"""Pictures that a model draws unless n is given."""

ENDLESS = 10_000
"""Pictures taken of a data set that has no end."""


@dataclass(frozen=True)
class Source:
    """`count` pictures of `side` (h, w); `batches` gives them as (B, 3, H, W) in [-1, 1], the same ones every time.

    report: what was skipped on the way.
    """

    count: int
    side: Side
    batches: Callable[[], Iterator[Tensor]]
    report: Report


def open_judged(spec: str, device: torch.device) -> Pipeline | Dataset:
    """The model called `spec` or in that folder, on the device; otherwise the data set, folder or array file."""
    folder = Path(spec)
    if spec in bundled() or any((folder / file).is_file() for file in (CONFIG, "request.json")):
        return load(spec).to(device)
    return open_dataset(spec)


def own_side(judged: Pipeline | Dataset) -> Side | None:
    """The side (h, w) of a model's pictures or of the first picture; None where pictures are made at any."""
    if isinstance(judged, Pipeline):
        return judged.size
    if isinstance(judged, ArrayImages):
        shape = judged.images.shape[1:]
        return (shape[1], shape[2]) if judged.channels_first else (shape[0], shape[1])
    if isinstance(judged, ImageFolder):
        height, width = open_image(judged.root / judged.keys[0], judged.max_pixels).shape[:2]
        return height, width
    return None


def open_pair(
    judged: Pipeline | Dataset,
    real: Dataset | Statistics,
    side: Side,
    n: int | None,
    seed: int,
    settings: Settings | None,
) -> tuple[Source, Source | Statistics]:
    """The pictures judged, and those of the reference, or its statistics.

    `side` counts where neither has one of its own.
    """
    pictures = None if isinstance(real, Statistics) else real
    if isinstance(judged, Pipeline):
        samples = model_source(judged, n or DRAWN, pictures, seed, settings)
    else:
        samples = dataset_source(judged, own_side(judged) or (pictures and own_side(pictures)) or side, n)
    return samples, real if isinstance(real, Statistics) else dataset_source(real, samples.side)


def dataset_source(dataset: Dataset, side: Side, n: int | None = None) -> Source:
    """All pictures of a data set (`ENDLESS` of an endless one), or n of them, the same ones every time."""
    rows = chosen_rows(dataset, n)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(rows), BATCH):
            yield to_tensor(dataset.batch(rows[start : start + BATCH].tolist(), side).images)

    return Source(len(rows), side, batches, dataset.report)


def model_source(
    pipeline: Pipeline, n: int, reference: Dataset | None, seed: int = 0, settings: Settings | None = None
) -> Source:
    """n pictures that a model draws, asked for what the reference shows; see `prompts_like`."""
    prompts = prompts_like(pipeline, n, reference)

    def batches() -> Iterator[Tensor]:
        images = draw(pipeline, [prompts[i % n] for i in range(padded(n))], seed, settings)
        for start in range(0, n, BATCH):
            batch = [next(images) for _ in range(min(BATCH, n - start))]
            yield to_tensor(np.stack(batch))

    return Source(n, pipeline.size, batches, Report())


def prompts_like(pipeline: Pipeline, n: int, reference: Dataset | None) -> list[Prompt]:
    """n prompts as the reference has them: its captions, or its labels where its classes are as many as the model's.

    Otherwise a class model is asked for its classes in turn, and a text model cannot be judged.
    """
    condition = pipeline.condition
    takes_text = isinstance(condition, TextConfig)
    prompts: list[Prompt] = []
    if reference is not None and (takes_text or len(reference.class_names or ()) == condition.classes):
        rows = np.resize(chosen_rows(reference, n), n)
        for start in range(0, n, BATCH):
            batch = reference.batch(rows[start : start + BATCH].tolist(), pipeline.size)
            found = batch.captions if takes_text else batch.labels
            prompts += [] if found is None else [p if isinstance(p, str) else int(p) for p in found]
    if takes_text and not prompts:
        raise UserError(
            "this model takes captions, and the reference has none; give --data with pictures and captions"
        )
    return prompts or [i % condition.classes for i in range(n)]


def chosen_rows(dataset: Dataset, n: int | None) -> np.ndarray:
    """The rows of n items, drawn without order so that no class is preferred; all if n is None or too many."""
    if dataset.size is None:
        return np.arange(n or ENDLESS)
    if n is None or n >= dataset.size:
        return np.arange(dataset.size)
    return np.sort(np.random.default_rng(0).permutation(dataset.size)[:n])

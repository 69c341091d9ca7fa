"""Metrics that experiments share: what a model costs, and how good its pictures are.

Each draws the pictures it judges; the first few of one go into the result. Legend: N pictures, H W pixels.
"""

import time
from functools import cache
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from varkit.catalog.experiment import Metric, Subject
from varkit.catalog.harness import PICTURES
from varkit.decode.loop import run
from varkit.evaluate.drawing import BATCH, draw, padded

if TYPE_CHECKING:
    from varkit.data.base import Dataset
    from varkit.evaluate.features import FeatureSet
    from varkit.evaluate.geneval import Score

ROUNDS = 5
GREY = 128


def parameters(subject: Subject) -> float:
    """Millions of parameters of generator and head."""
    modules = [subject.pipeline.generator, *subject.pipeline.model.heads.values()]
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def block_parameters(subject: Subject) -> float:
    """Millions of parameters of the generator's blocks, without tables, text encoder and head (scaling laws)."""
    return sum(p.numel() for p in subject.pipeline.generator.blocks.parameters()) / 1e6  # type: ignore[union-attr]


def evaluations(subject: Subject) -> float:
    """Evaluations of the network for a picture, counted in a run."""
    state = subject.pipeline.start(_prompts(subject, 1), subject.seed)
    return float(run(subject.pipeline.model, state).evaluations.double().mean())


def seconds_per_picture(subject: Subject) -> float:
    """Wall-clock for one picture by itself, from prompt to pixels: the median of a few, after a first one."""
    times = []
    for seed in range(ROUNDS + 1):
        start = time.perf_counter()
        subject.pipeline.generate(_prompts(subject, 1), seed=seed)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def held_out_loss(subject: Subject) -> float:
    """The loss of the last validation, nats a token."""
    return float(subject.pipeline.about["metrics"]["loss"])


def digits_read(n: int) -> Metric:
    """Share of 10 n drawn digits that a classifier of real ones reads as asked."""

    def measure(subject: Subject) -> float:
        from varkit.evaluate.digits import evaluate_digits

        return float(evaluate_digits(subject.pipeline, n, subject.seed).summary()["accuracy"])

    return Metric("digits read", measure, key=str(n))


def fid_to(dataset: str, n: int) -> Metric:
    """Frechet distance of n drawn pictures to the held-out part of a data set, by the default features."""

    def measure(subject: Subject) -> float:
        from varkit.evaluate.distribution import compare
        from varkit.evaluate.features import collect, load_features
        from varkit.evaluate.sources import model_source
        from varkit.pictures import to_array

        reference, real = _held_out(dataset, subject.pipeline.size)
        batches = list(model_source(subject.pipeline, n, reference, subject.seed).batches())
        subject.kept[PICTURES] = np.concatenate([to_array(batch) for batch in batches[:1]])
        return compare(collect(load_features("small"), batches), real, resamples=0).figures["fid"].value

    return Metric("FID", measure, "small features", f"{dataset} {n}")


@cache
def _held_out(dataset: str, size: tuple[int, int]) -> "tuple[Dataset, FeatureSet]":
    """The held-out part of a data set, and its features."""
    from varkit.data.registry import open_dataset
    from varkit.evaluate.features import collect, load_features
    from varkit.evaluate.sources import dataset_source

    reference = open_dataset(dataset).split("validation")
    return reference, collect(load_features("small"), dataset_source(reference, size).batches())


def scenes_right(n: int) -> Metric:
    """Mean over GenEval's six categories of the share of unseen captions (n in all) that pictures show rightly."""

    def measure(subject: Subject) -> float:
        from varkit.evaluate.geneval import prompts, report, score

        captions = prompts(padded(n))
        images = list(draw(subject.pipeline, captions, subject.seed))
        subject.kept[PICTURES] = np.stack(images[:BATCH])
        pairs = zip(images[:n], captions[:n], strict=True)
        return report(score(image, caption) for image, caption in pairs)["overall"]

    return Metric("scene score", measure, key=str(n))


def scenes_rebuilt(dataset: str, n: int) -> Metric:
    """The same score of n held-out pictures that the tokenizer has rebuilt: about what a generator could reach.

    Their captions come as often as in the data set, whichever the category.
    """

    def measure(subject: Subject) -> float:
        from varkit.data.registry import open_dataset
        from varkit.evaluate.geneval import report, score
        from varkit.pictures import to_array, to_tensor

        tokenizer, size = subject.pipeline.tokenizer, subject.pipeline.size
        held_out = open_dataset(dataset).split("validation")
        scores: list[Score] = []
        for start in range(0, n, BATCH):
            batch = held_out.batch(range(start, min(n, start + BATCH)), size)
            rebuilt = to_array(tokenizer.decode(tokenizer.encode(to_tensor(batch.images))))
            scores += map(score, rebuilt, batch.captions or ())
        return report(scores)["overall"]

    return Metric("scene score rebuilt", measure, key=f"{dataset} {n}")


def halves_completed(n: int) -> tuple[Metric, Metric]:
    """Of n held-out digits without their lower half: the share read rightly once it is drawn anew, and the error above.

    The option `fill` says whether the model draws ("model") or the half stays grey ("grey"). The error is the mean
    absolute difference, in [0, 1], to the tokenizer's reconstruction of the whole picture, one row of latents away
    from the mask (the decoder blends its neighbours).
    """

    def complete(subject: Subject) -> tuple[float, float]:
        if "completed" not in subject.kept:
            subject.kept["completed"] = _complete_halves(subject, n)
        return subject.kept["completed"]

    return (
        Metric("halves read", lambda subject: complete(subject)[0], key=str(n)),
        Metric("error outside", lambda subject: complete(subject)[1], key=str(n)),
    )


def _complete_halves(subject: Subject, n: int) -> tuple[float, float]:
    from PIL import Image

    from varkit.data.real import Digits
    from varkit.edit.inpaint import inpaint
    from varkit.evaluate.digits import classifier
    from varkit.pictures import to_array, to_tensor

    pipeline, size = subject.pipeline, subject.pipeline.size
    batch = Digits().split("validation").batch(range(n), size)
    assert batch.labels is not None
    images, redraw = batch.images, np.zeros(size, bool)
    redraw[size[0] // 2 :] = True
    completed = images.copy()
    completed[:, redraw] = GREY
    if subject.options["fill"] == "model":
        pairs = zip(images, batch.labels.tolist(), strict=True)
        completed = np.stack(
            [
                np.asarray(inpaint(pipeline, Image.fromarray(image), redraw, label, seed=subject.seed)[0])
                for image, label in pairs
            ]
        )
    subject.kept[PICTURES] = completed[:BATCH]
    rebuilt = to_array(pipeline.tokenizer.decode(pipeline.tokenizer.encode(to_tensor(images))))
    above = slice(0, size[0] // 2 - pipeline.tokenizer.stride)
    error = np.abs(completed[:, above].astype(float) - rebuilt[:, above]).mean() / 255
    read = classifier(size)[0](completed)
    return float((read == batch.labels).mean()), float(error)


PARAMETERS = Metric("parameters", parameters, "M")
BLOCKS = Metric("block parameters", block_parameters, "M")
EVALUATIONS = Metric("evaluations", evaluations)
SECONDS = Metric("seconds a picture", seconds_per_picture, "s")
LOSS = Metric("held-out loss", held_out_loss, "nats a token")


def _prompts(subject: Subject, n: int) -> list[str | int]:
    from varkit.generators.conditioning import ClassConfig

    if isinstance(subject.pipeline.condition, ClassConfig):
        return [i % subject.pipeline.condition.classes for i in range(n)]
    return ["a red circle"] * n

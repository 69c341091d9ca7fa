"""Metrics of exposure bias, of what an own input costs a next-scale model, and of a post-training's part of the time.

An arm says by the option `teach` what its lessons are (a recipe's), so that models of any canvas are measured alike.
Legend: N pictures, K scales, H W pixels.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from varkit.catalog.experiment import Metric, Subject
from varkit.catalog.harness import PICTURES

if TYPE_CHECKING:
    from varkit.adapt.exposure import Exposure
    from varkit.adapt.method import Material, Method
    from varkit.train.task import Task

WIDTH, HEIGHT, TOP = 320, 120, 2.0
"""Of a chart, in pixels, and in nats."""

ROUNDS = 5


def exposed(dataset: str, n: int) -> Callable[[Subject], "Exposure"]:
    """Exposure of a subject by n held-out pictures of a labelled data set, measured once for all metrics."""

    def measure(subject: Subject) -> "Exposure":
        if "exposure" not in subject.kept:
            import torch

            from varkit.adapt.exposure import exposure

            made = _material(subject, dataset, n)
            assert made.parts.lessons is not None and made.tokens.labels is not None
            lesson = made.parts.lessons.lesson(made.tokens.take(np.arange(len(made.tokens))))
            condition = {"label": torch.from_numpy(made.tokens.labels)}
            parts = (made.parts.generator.eval(), made.parts.head.eval())
            subject.kept["exposure"] = exposure(*parts, lesson, condition, seed=subject.seed)
        return subject.kept["exposure"]

    return measure


def exposure_bias(dataset: str, n: int) -> tuple[Metric, Metric]:
    """The mean gap over scales behind the first, and the loss on true inputs; a chart of gaps becomes the picture."""
    measure = exposed(dataset, n)

    def gap(subject: Subject) -> float:
        found = measure(subject)
        subject.kept[PICTURES] = chart(found.gaps)[None]
        return found.gap

    def teacher(subject: Subject) -> float:
        found = measure(subject)
        return sum(loss * size for loss, size in zip(found.teacher, found.sizes, strict=True)) / sum(
            found.sizes
        )

    return Metric("exposure bias", gap, "nats a token"), Metric(
        "loss on true inputs", teacher, "nats a token"
    )


def gaps_by_scale(dataset: str, n: int, scales: int) -> tuple[Metric, ...]:
    """The gap of each of the scales behind the first, numbered from 1: what the chart shows."""
    measure = exposed(dataset, n)

    def at(k: int) -> Callable[[Subject], float]:
        return lambda subject: measure(subject).gaps[k]

    return tuple(Metric(f"gap at scale {k + 1}", at(k), "nats a token") for k in range(1, scales))


def share_of_training(method: "Method", dataset: str, n: int) -> Metric:
    """Time of the steps that a model was last trained for over that of the training it began with; 1 for that itself.

    A step of the method (or, by the option `teacher_forced`, of teacher forcing) and one of teacher forcing are timed
    in turn over n pictures, medians of a few.
    """

    def measure(subject: Subject) -> float:
        about = subject.pipeline.about
        if "start" not in about:
            return 1.0
        steps = about["steps"] / about["start"]["steps"]
        return steps * (
            1.0 if subject.options.get("teacher_forced") else _ratio_of_steps(subject, method, dataset, n)
        )

    return Metric("share of training", measure)


def chart(gaps: tuple[float, ...]) -> np.ndarray:
    """Bars of K gaps, (H, W, 3) uint8; the same axis in every chart, so that arms compare."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, room, base = ImageDraw.Draw(picture), WIDTH // len(gaps), HEIGHT - 16
    for k, gap in enumerate(gaps):
        top = base - round(min(max(gap, 0.0), TOP) / TOP * (base - 16))
        draw.rectangle((k * room + 4, top, (k + 1) * room - 4, base), fill=(70, 110, 180))
        draw.text((k * room + 6, top - 13), f"{gap:.2f}", fill="black")
        draw.text((k * room + 6, base + 2), f"scale {k + 1}", fill="black")
    return np.asarray(picture)


def _material(subject: Subject, dataset: str, n: int) -> "Material":
    """What n held-out pictures of the subject's classes are to its model."""
    from varkit.adapt.method import Material
    from varkit.data.registry import open_dataset
    from varkit.pictures import to_tensor
    from varkit.train.generator_task import Forced
    from varkit.train.tokens import Tokens

    pipeline = subject.pipeline
    data = open_dataset(dataset).split("validation")
    batch = data.batch(range(n if data.size is None else min(n, data.size)), pipeline.size)
    assert batch.labels is not None, "classes are what these models are told"
    latents = pipeline.tokenizer.training_latents(to_tensor(batch.images))
    tokens = Tokens({name: values.numpy() for name, values in latents.items()}, batch.labels)
    parts = (pipeline.generator, pipeline.model.heads["main"], pipeline.model.plan)
    lessons = subject.options["teach"](pipeline.tokenizer, pipeline.model.plan)
    return Material(Forced(pipeline.tokenizer, *parts, lessons), tokens, tokens, len(tokens), {})


def _ratio_of_steps(subject: Subject, method: "Method", dataset: str, n: int) -> float:
    """Time of a step of the method over that of one of teacher forcing."""
    import torch

    from varkit.adapt.finetune import Finetune
    from varkit.catalog.costs import seconds

    material = _material(subject, dataset, n)

    def work(task: "Task") -> None:
        torch.manual_seed(0)
        task.loss("generator", task.batch(0, 0), 0)[0].backward()

    of_method, of_teacher = seconds([partial(work, m.task(material)) for m in (method, Finetune())], ROUNDS)
    for part in (material.parts.generator, material.parts.head):
        part.zero_grad(set_to_none=True)
    return of_method / of_teacher

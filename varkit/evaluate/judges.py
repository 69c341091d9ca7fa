"""Verdicts on drawn pictures, from 0 to 1, by exact readers: what post-training rewards and search looks for."""

from collections.abc import Callable, Sequence

import numpy as np

from varkit.errors import unknown_name
from varkit.evaluate import digits, geneval, scenes
from varkit.hub.pipeline import Pipeline
from varkit.hub.prompts import Prompt

Judge = Callable[[np.ndarray, Sequence[Prompt]], np.ndarray]
"""Pictures (B, H, W, 3) uint8 and what was asked for -> (B,) float64 in [0, 1]."""


def scene_judge(pipeline: Pipeline) -> Judge:
    """1 for a scene that shows all that its caption says, by the exact reader, else 0."""
    scenes.check_model(pipeline)

    def judge(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        pairs = zip(images, prompts, strict=True)
        return np.array([geneval.score(image, str(prompt)).passed for image, prompt in pairs], np.float64)

    return judge


def digit_judge(pipeline: Pipeline) -> Judge:
    """1 for a digit that the classifier of real ones reads as the label asked for, else 0."""
    digits.check_model(pipeline)
    predict, _ = digits.classifier(pipeline.size)
    return lambda images, prompts: (predict(images) == np.array(prompts)).astype(np.float64)


JUDGES: dict[str, Callable[[Pipeline], Judge]] = {"scenes": scene_judge, "digits": digit_judge}


def find_judge(name: str, pipeline: Pipeline) -> Judge:
    """A judge by name, for one model's pictures. Raises `UserError` for an unknown one, and for a model that does not
    draw what it reads.
    """
    if name not in JUDGES:
        raise unknown_name("judge", name, JUDGES)
    return JUDGES[name](pipeline)

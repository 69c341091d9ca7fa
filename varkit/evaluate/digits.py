"""Does a class model draw the digit it is asked for? A classifier trained on real handwriting says.

The classifier is a support vector machine with an RBF kernel on 8 x 8 greys, scikit-learn's own example for these data.
Generated and real pictures take the same way to it (the model's size, then 8 x 8 by box averages), and its accuracy on
the held-out writers stands beside the model's: what it gets wrong there is its own fault.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from varkit.errors import UserError
from varkit.evaluate.drawing import draw, padded
from varkit.generators.conditioning import ClassConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.pictures import grid

CLASSES = 10
SIDE = 8
PER_ROW = 16


@dataclass(frozen=True)
class DigitReport:
    """Labels asked for and read (N,), pictures (N, H, W, 3), and the accuracy on real digits of held-out writers."""

    asked: np.ndarray
    read: np.ndarray
    images: np.ndarray = field(repr=False)
    real: float

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        right = self.asked == self.read
        return {
            "pictures": len(right),
            "accuracy": float(right.mean()),
            "classes": {str(digit): float(right[self.asked == digit].mean()) for digit in range(CLASSES)},
            "classifier_on_real": self.real,
        }

    def sheet(self) -> Image.Image:
        """A row of pictures for each digit."""
        rows = [self.images[self.asked == digit][:PER_ROW] for digit in range(CLASSES)]
        return grid([Image.fromarray(image) for row in rows for image in row], columns=len(rows[0]))


def evaluate_digits(
    pipeline: Pipeline,
    n: int,
    seed: int = 0,
    settings: Settings | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> DigitReport:
    """Draw n pictures of each digit and read them. Raises `UserError` for a model that does not draw digits."""
    check_model(pipeline)
    if n < 1:
        raise UserError(f"n is {n}; ask for at least 1 picture of each digit")
    count = CLASSES * n
    prompts = [i % CLASSES for i in range(padded(count))]
    images = []
    for _, image in zip(range(count), draw(pipeline, prompts, seed, settings), strict=False):
        images.append(image)
        advance()
    predict, real = classifier(pipeline.size)
    drawn = np.stack(images)
    return DigitReport(np.array(prompts[:count]), predict(drawn), drawn, real)


def check_model(pipeline: Pipeline) -> None:
    """Raise `UserError` unless the model takes the ten labels and draws pictures of 8 x 8 or more."""
    condition = pipeline.condition
    if not isinstance(condition, ClassConfig):
        raise UserError(
            "the suite digits asks for labels, and this model takes captions; evaluate a class model"
        )
    if condition.classes != CLASSES:
        raise UserError(
            f"the suite digits asks for 10 classes, and this model has {condition.classes}; evaluate a model of digits"
        )
    if min(pipeline.size) < SIDE:
        height, width = pipeline.size
        raise UserError(
            f"pictures of {height}x{width} are too small for the suite digits, which reads them at 8x8"
        )


def features(images: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 -> (N, 64) greys in [0, 1]."""
    small = [
        Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images
    ]
    return np.stack([np.asarray(image, np.float64).ravel() / 255 for image in small])


def classifier(side: tuple[int, int]) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """What reads pictures (N, H, W, 3), and its accuracy on held-out writers at pictures of `side`."""
    from varkit.data.real import Digits

    digits = Digits()
    from sklearn.svm import SVC

    train, held_out = (digits.split(part) for part in ("train", "validation"))  # type: ignore[arg-type]
    seen, unseen = (part.batch(range(len(part)), side) for part in (train, held_out))
    machine = SVC(C=10.0, gamma="scale").fit(features(seen.images), seen.labels)
    real = float(machine.score(features(unseen.images), unseen.labels))
    return (lambda images: machine.predict(features(images))), real

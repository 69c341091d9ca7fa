"""Does a text model draw what unseen captions say? GenEval's six categories on scenes, read by the exact scene reader.

The captions are of the test split: no picture of these objects together, in any arrangement, was trained on.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varkit.data.captions import CATEGORIES
from varkit.errors import UserError
from varkit.evaluate import geneval
from varkit.evaluate.confusion import confusions, mistakes
from varkit.evaluate.drawing import draw, padded
from varkit.evaluate.geneval import Score
from varkit.generators.conditioning import ClassConfig
from varkit.generators.text import TextConfig
from varkit.hub.pipeline import Pipeline, Settings

FAILURES = 48
SMALLEST = 32
"""Pixels on a side that the scene reader needs."""


@dataclass
class SceneReport:
    """Verdicts by seed, in the order of the captions, and the first failures with their pictures (H, W, 3)."""

    by_seed: dict[int, list[Score]] = field(default_factory=dict)
    failures: list[tuple[Score, np.ndarray]] = field(default_factory=list, repr=False)

    def _scores(self) -> list[Score]:
        return [score for scores in self.by_seed.values() for score in scores]

    def shares(self) -> dict[str, float]:
        """The share of passed pictures by category, and `overall`, the mean of the six."""
        return geneval.report(self._scores())

    def counts(self) -> Counter[str]:
        """Pictures by category."""
        return Counter(score.category for score in self._scores())

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON takes them; `spread` is the standard deviation of `overall` over the seeds."""
        overall = {seed: geneval.report(scores)["overall"] for seed, scores in self.by_seed.items()}
        spread = statistics.stdev(overall.values()) if len(overall) > 1 else None
        counts, tables = self.counts(), confusions(self._scores())
        return {
            "pictures": counts.total(),
            "captions": len(next(iter(self.by_seed.values()))),
            "categories": {
                name: {"share": self.shares()[name], "pictures": counts[name]} for name in CATEGORIES
            },
            "overall": self.shares()["overall"],
            "overall_by_seed": overall,
            "spread": spread,
            "confusions": tables,
            "mistakes": [asdict(mistake) for mistake in mistakes(tables)],
        }

    def sheet(self) -> Image.Image:
        """The failures, each above its caption and the demand it fails first."""
        return captioned([(image, _complaint(score)) for score, image in self.failures])


def evaluate_scenes(
    pipeline: Pipeline,
    n: int,
    seeds: range = range(1),
    settings: Settings | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> SceneReport:
    """Draw and judge n captions with each seed. Raises `UserError` for a model that does not draw scenes."""
    check_model(pipeline)
    if n < len(CATEGORIES):
        raise UserError(f"n is {n}; the six categories need at least {len(CATEGORIES)} captions, e.g. 300")
    prompts = geneval.prompts(padded(n))
    report = SceneReport()
    for seed in seeds:
        scores = report.by_seed[seed] = []
        for caption, image in zip(prompts[:n], draw(pipeline, prompts, seed, settings), strict=False):
            scores.append(geneval.score(image, caption))
            if not scores[-1] and len(report.failures) < FAILURES:
                report.failures.append((scores[-1], image))
            advance()
    return report


def check_model(pipeline: Pipeline) -> None:
    """Raise `UserError` unless the model takes captions and draws pictures large enough to be read."""
    if not isinstance(pipeline.condition, TextConfig):
        takes = (
            "class labels" if isinstance(pipeline.condition, ClassConfig) else "features of a text encoder"
        )
        raise UserError(
            f"the suite scenes asks for captions, and this model takes {takes}; evaluate one that reads words"
        )
    if min(pipeline.size) < SMALLEST:
        height, width = pipeline.size
        raise UserError(
            f"pictures of {height}x{width} are too small for the suite scenes, which reads objects from "
            f"{SMALLEST}x{SMALLEST} on; evaluate a model of scenes"
        )


def captioned(pictures: list[tuple[np.ndarray, str]], columns: int = 8, side: int = 128) -> Image.Image:
    """A sheet of pictures with words under each; without pictures, a sheet that says so."""
    font = ImageFont.load_default(size=10)
    if not pictures:
        sheet = Image.new("RGB", (side * 2, 24), "white")
        ImageDraw.Draw(sheet).text((4, 4), "no failures", "black", font)
        return sheet
    words = [_wrapped(text, font, side - 4) for _, text in pictures]
    height = side + 6 + 12 * max(text.count("\n") + 1 for text in words)
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, ((image, _), text) in enumerate(zip(pictures, words, strict=True)):
        x, y = i % columns * side, i // columns * height
        sheet.paste(
            Image.fromarray(image).resize((side - 4, side - 4), Image.Resampling.NEAREST), (x + 2, y + 2)
        )
        pen.multiline_text((x + 2, y + side), text, "black", font, spacing=2)
    return sheet


def _complaint(score: Score) -> str:
    missing = next(clause.demand for clause in score.clauses if not clause.holds)
    return f"{score.caption} [{missing}]"


def _wrapped(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(line for line in lines if line)

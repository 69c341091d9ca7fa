"""`varkit evaluate`: how good a model is, in figures."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tyro.conf import Positional

from varkit.cli.console import log, print_json, print_table, progress
from varkit.cli.generate import Sampling
from varkit.errors import UserError, unknown_name
from varkit.files import atomic_write, ensure_writable

if TYPE_CHECKING:
    from PIL import Image

    from varkit.data.base import Dataset
    from varkit.hub.pipeline import Pipeline, Settings

NUMBERS = {"digits": 100, "reconstruction": 2000, "scenes": 300}
"""The suites, and their default --n."""


class Report(Protocol):
    """What a suite hands back."""

    def summary(self) -> dict[str, Any]: ...

    def sheet(self) -> "Image.Image": ...


@dataclass(frozen=True)
class Evaluate(Sampling):
    """Measure a model: what its tokenizer loses, or whether its pictures show what was asked for."""

    model: Positional[str]
    """A bundled model, a saved folder, or a training's output folder."""
    suite: str
    """reconstruction (PSNR, SSIM, codebook), scenes (captions of unseen scenes) or digits (read by a classifier)."""
    n: int | None = None
    """Pictures (reconstruction, 2000), captions (scenes, 300), or pictures of each digit (digits, 100)."""
    seed: int = 0
    """Seed of the pictures drawn."""
    seeds: int = 1
    """For scenes: draw each caption with this many seeds, from --seed on."""
    data: str | None = None
    """For reconstruction: a data set, folder or array file, whose held-out part is used; by default the model's own."""
    json: bool = False
    """Print one JSON object."""
    sheet: Path | None = None
    """Write a picture to look at: reconstructions and the worst ones, failures, or digits."""

    def __post_init__(self) -> None:
        if self.suite not in NUMBERS:
            raise unknown_name("suite", self.suite, NUMBERS)
        for name, value, least in (("n", self.n, 1), ("seeds", self.seeds, 1), ("seed", self.seed, 0)):
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; it must be at least {least}")
        if self.data is not None and self.suite != "reconstruction":
            raise UserError(f"--data is for the suite reconstruction; the suite {self.suite} brings its own")
        if self.seeds > 1 and self.suite != "scenes":
            raise UserError(f"--seeds is for the suite scenes; raise --n for the suite {self.suite}")
        if self.chosen() and self.suite == "reconstruction":
            raise UserError(
                f"--{next(iter(self.chosen()))} is for drawing; the suite reconstruction draws nothing"
            )

    def run(self) -> None:
        """Print the figures, and write the sheet."""
        if self.sheet is not None:
            ensure_writable(self.sheet)
        from varkit.hub.pipeline import load

        pipeline = load(self.model)
        number = self.n or NUMBERS[self.suite]
        facts: dict[str, Any] = {"model": self.model, "suite": self.suite}
        if self.suite == "reconstruction":
            facts["data"], facts["part"], report = self._reconstruction(pipeline, number)
        else:
            settings = replace(pipeline.settings, **self.chosen())
            facts |= {"seed": self.seed, "settings": asdict(settings)}
            report = (self._scenes if self.suite == "scenes" else self._digits)(pipeline, number, settings)
        if self.sheet is not None:
            with atomic_write(self.sheet) as part:
                report.sheet().save(part)
            log(f"wrote {self.sheet}")
        summary = report.summary()
        if self.json:
            print_json(facts | summary)
        else:
            print_table(*TABLES[self.suite](summary))

    def _reconstruction(self, pipeline: "Pipeline", number: int) -> tuple[str, str, Report]:
        from varkit.data.registry import open_dataset
        from varkit.evaluate.reconstruction import has_ssim, pictures, reconstruct

        spec = self.data or _own_data(pipeline)
        dataset, part = _held_out(open_dataset(spec))
        if not has_ssim():
            log("SSIM is left out, since it needs scikit-image; run: pip install 'varkit[data]'")
        total = number if dataset.size is None else min(number, dataset.size)
        with progress("reconstructing", total) as advance:
            batches = pictures(dataset, pipeline.size, total)
            report = reconstruct(pipeline.tokenizer, (_passing(batch, advance) for batch in batches))
        return spec, part, report

    def _scenes(self, pipeline: "Pipeline", number: int, settings: "Settings") -> Report:
        from varkit.evaluate.scenes import evaluate_scenes

        seeds = range(self.seed, self.seed + self.seeds)
        with progress("drawing", number * self.seeds) as advance:
            return evaluate_scenes(pipeline, number, seeds, settings, advance)

    def _digits(self, pipeline: "Pipeline", number: int, settings: "Settings") -> Report:
        from varkit.evaluate.digits import CLASSES, evaluate_digits

        with progress("drawing", number * CLASSES) as advance:
            return evaluate_digits(pipeline, number, self.seed, settings, advance)


def _passing(batch: Any, advance: Any) -> Any:
    advance(len(batch))
    return batch


def _own_data(pipeline: "Pipeline") -> str:
    """The data set that the model was trained on."""
    about = pipeline.about
    spec = about.get("request", {}).get("recipe") or about.get("recipe")
    if not spec:
        raise UserError(
            "this model does not say what it was trained on; add --data, e.g. --data scenes or a folder"
        )
    return str(spec)


def _held_out(dataset: "Dataset") -> tuple["Dataset", str]:
    """The held-out part of a data set, or the rest of one too small to have any, and its name."""
    held_out = dataset.split("validation")
    if held_out.size != 0:
        return held_out, "validation"
    log("the data set is too small to hold pictures out; those of the training are reconstructed")
    return dataset.split("train"), "train"


Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


def _reconstruction_table(summary: dict[str, Any]) -> Table:
    rows: list[tuple[object, ...]] = [
        ("pictures", summary["pictures"]),
        ("PSNR, of the mean error", f"{summary['psnr']:.2f} dB"),
        ("PSNR, mean of pictures", f"{summary['psnr_of_pictures']:.2f} dB"),
    ]
    if summary["ssim"] is not None:
        rows.append(("SSIM", f"{summary['ssim']:.4f}"))
    named = [("codebook", summary["codebook"])] if summary["codebook"] else []
    named += [(f"level {k}", level) for k, level in enumerate(summary["levels"])]
    rows += [(name, f"usage {c['usage']:.1%}, perplexity {c['perplexity']:.1f}") for name, c in named]
    return ("figure", "value"), rows


def _scenes_table(summary: dict[str, Any]) -> Table:
    rows: list[tuple[object, ...]] = [
        (name, f"{found['share']:.3f}", found["pictures"]) for name, found in summary["categories"].items()
    ]
    spread = "" if summary["spread"] is None else f" +- {summary['spread']:.3f}"
    return ("category", "correct", "pictures"), [
        *rows,
        ("overall (mean of six)", f"{summary['overall']:.3f}{spread}", summary["pictures"]),
    ]


def _digits_table(summary: dict[str, Any]) -> Table:
    each = summary["pictures"] // len(summary["classes"])
    rows: list[tuple[object, ...]] = [
        (name, f"{share:.3f}", each) for name, share in summary["classes"].items()
    ]
    return ("digit", "read right", "pictures"), [
        *rows,
        ("all", f"{summary['accuracy']:.3f}", summary["pictures"]),
        ("real, held-out writers", f"{summary['classifier_on_real']:.3f}", ""),
    ]


TABLES = {"digits": _digits_table, "reconstruction": _reconstruction_table, "scenes": _scenes_table}

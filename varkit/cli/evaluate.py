"""`varkit evaluate`: how good a model is, in figures."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tyro.conf import Positional

from varkit.cli.console import heard, log, print_json, print_table, progress
from varkit.cli.sampling import Sampling
from varkit.errors import UserError, unknown_name
from varkit.files import atomic_write, ensure_writable

if TYPE_CHECKING:
    from PIL import Image

    from varkit.data.base import Dataset
    from varkit.evaluate.features import Features
    from varkit.evaluate.frechet import Statistics
    from varkit.hub.pipeline import Pipeline, Settings

NUMBERS = {"digits": 100, "fid": 2000, "reconstruction": 2000, "scenes": 300}
"""The suites, and their default --n."""

MISTAKES = 5
"""The commonest ones, shown below the categories; --json has whole tables."""

OPTIONS = {
    "data": ("fid", "reconstruction"),
    "features": ("fid", "reconstruction"),
    "resamples": ("fid", "reconstruction"),
    "statistics": ("fid",),
}
"""The suites that options are for."""


class Report(Protocol):
    """What a suite hands back."""

    def summary(self) -> dict[str, Any]: ...

    def sheet(self) -> "Image.Image": ...


@dataclass(frozen=True)
class Evaluate(Sampling):
    """Measure a model, or a folder of pictures: what is lost, is asked for in vain, or tells it from real pictures."""

    model: Positional[str]
    """A bundled model, a saved folder, or a training's output folder; for fid also a folder of pictures or an array."""
    suite: str
    """reconstruction (PSNR, SSIM, spectrum, rFID, codebook), fid (FID, KID, precision, recall against --data), scenes
    (captions of unseen scenes) or digits (read by a classifier)."""
    n: int | None = None
    """Pictures (reconstruction, 2000; fid, 2000 of a model, all of a folder), captions (scenes, 300), or pictures of
    each digit (digits, 100)."""
    seed: int = 0
    """Seed of the pictures drawn, and of resampling."""
    seeds: int = 1
    """For scenes: draw each caption with this many seeds, from --seed on."""
    data: str | None = None
    """For reconstruction and fid: a data set, folder or array file, by default the held-out part of what the model was
    trained on. reconstruction takes the held-out part, fid all of it; fid also takes an .npz of statistics."""
    features: str = "small"
    """The network by which fid and rFID compare: small, inception:PATH, or the path of a file of weights."""
    resamples: int = 200
    """Bootstrap resamples behind the intervals of fid and rFID; 0 gives none."""
    statistics: Path | None = None
    """For fid: also write the reference's statistics to this .npz, to be given as --data later."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1, ...; by default CUDA's first device if there is one."""
    json: bool = False
    """Print one JSON object."""
    sheet: Path | None = None
    """Write a picture to look at: reconstructions and the worst ones, failures, or digits."""

    def __post_init__(self) -> None:
        if self.suite not in NUMBERS:
            raise unknown_name("suite", self.suite, NUMBERS)
        for name, least in (("n", 1), ("seeds", 1), ("seed", 0), ("resamples", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; it must be at least {least}")
        for name, suites in OPTIONS.items():
            if getattr(self, name) != getattr(type(self), name) and self.suite not in suites:
                brings = f"; the suite {self.suite} brings its own" if name == "data" else ""
                raise UserError(f"--{name} is for the suite {' and '.join(suites)}{brings}")
        if self.seeds > 1 and self.suite != "scenes":
            raise UserError(f"--seeds is for the suite scenes; raise --n for the suite {self.suite}")
        if self.chosen() and self.suite == "reconstruction":
            raise UserError(
                f"--{next(iter(self.chosen()))} is for drawing; the suite reconstruction draws nothing"
            )

    def run(self) -> None:
        """Print the figures, and write the sheet; under torchrun, the processes share the drawing."""
        from varkit.ranks import together

        with together() as ranks, heard(ranks.first):
            # The first process alone writes files.
            (self if ranks.first else replace(self, sheet=None, statistics=None))._evaluate()

    def _evaluate(self) -> None:
        if self.sheet is not None:
            ensure_writable(self.sheet)
        facts: dict[str, Any] = {"model": self.model, "suite": self.suite}
        if self.suite == "fid":
            facts, report = self._fid(facts)
        else:
            facts, report = self._of_model(facts)
        if self.sheet is not None:
            with atomic_write(self.sheet) as part:
                report.sheet().save(part)
            log(f"wrote {self.sheet}")
        facts |= report.summary()
        if self.json:
            print_json(facts)
        else:
            print_table(*TABLES[self.suite](facts))

    def _of_model(self, facts: dict[str, Any]) -> tuple[dict[str, Any], Report]:
        from varkit.cli.models import opened
        from varkit.devices import find_device

        pipeline = opened(self.model).to(find_device(self.device))
        number = self.n or NUMBERS[self.suite]
        if self.suite == "reconstruction":
            return self._reconstruction(pipeline, number, facts)
        settings = pipeline.chosen(self.chosen())
        facts |= {"seed": self.seed, "settings": asdict(settings)}
        return facts, (self._scenes if self.suite == "scenes" else self._digits)(pipeline, number, settings)

    def _reconstruction(
        self, pipeline: "Pipeline", number: int, facts: dict[str, Any]
    ) -> tuple[dict[str, Any], Report]:
        from varkit.data.registry import open_dataset
        from varkit.evaluate.distribution import Pairs
        from varkit.evaluate.reconstruction import has_ssim, pictures, reconstruct

        spec = self.data or _own_data(pipeline)
        dataset, part = _held_out(open_dataset(spec))
        if not has_ssim():
            log("SSIM is left out, since it needs scikit-image; run: pip install 'varkit[data]'")
        total = number if dataset.size is None else min(number, dataset.size)
        with progress("reconstructing", total) as advance:
            batches = pictures(dataset, pipeline.size, total)
            watched = (_passing(batch, advance) for batch in batches)
            if (features := self._rfid_features(total)) is None:
                report, rfid = reconstruct(pipeline.tokenizer, watched), None
            else:
                pairs = Pairs(features)
                report = reconstruct(pipeline.tokenizer, watched, pairs.add)
                rfid = pairs.compare(self.resamples, self.seed).summary()
        return facts | {"data": spec, "part": part, "rfid": rfid}, report

    def _rfid_features(self, pictures: int) -> "Features | None":
        """The features of rFID; None where there are none by default, or too few pictures for them."""
        from varkit.evaluate.features import SMALL, load_features

        if self.features == "small" and not SMALL.is_file():
            log(
                "rFID is left out: the default features are not part of this installation; give others by --features"
            )
            return None
        features = load_features(self.features)
        if pictures <= features.size:
            log(
                f"rFID is left out: {pictures} pictures are no more than the {features.size} numbers of a feature"
            )
            return None
        return features

    def _fid(self, facts: dict[str, Any]) -> tuple[dict[str, Any], Report]:
        from varkit.devices import find_device
        from varkit.evaluate.distribution import evaluate_distribution
        from varkit.evaluate.features import load_features
        from varkit.evaluate.frechet import save_statistics
        from varkit.evaluate.sources import Source, open_judged, open_pair

        if self.statistics is not None:
            ensure_writable(self.statistics)
        features, judged = load_features(self.features), open_judged(self.model, find_device(self.device))
        spec, part, real = self._reference(judged)
        side, settings = (features.side, features.side), self._settings(judged)
        samples, reference = open_pair(judged, real, side, self.n, self.seed, settings)
        facts |= {"data": spec, "part": part, "size": list(samples.side), "seed": self.seed}
        facts["settings"] = None if settings is None else asdict(settings)
        sources = [source for source in (samples, reference) if isinstance(source, Source)]
        if self.statistics is not None and len(sources) < 2:
            raise UserError(
                f"--statistics are of the pictures in --data, and {spec!r} holds statistics already"
            )
        with progress("reading pictures", sum(source.count for source in sources)) as advance:
            report = evaluate_distribution(samples, reference, features, self.resamples, self.seed, advance)
        if self.statistics is not None:
            save_statistics(self.statistics, report.reference)
            log(f"wrote {self.statistics}")
        for source in sources:
            if source.report.counts:
                log(f"pictures: {source.report}")
        for warning in report.comparison.warnings():
            log(f"warning: {warning}")
        return facts, report

    def _reference(self, judged: "Pipeline | Dataset") -> tuple[str, str, "Dataset | Statistics"]:
        """What the pictures are compared with: its name, which part of it, and itself."""
        from varkit.data.registry import open_dataset
        from varkit.evaluate.frechet import has_statistics, load_statistics
        from varkit.hub.pipeline import Pipeline

        if self.data is not None:
            known = has_statistics(self.data)
            return self.data, "all", load_statistics(self.data) if known else open_dataset(self.data)
        if not isinstance(judged, Pipeline):
            raise UserError(f"add --data: the real pictures that those of {self.model!r} are compared with")
        own = _own_data(judged)
        held_out, part = _held_out(open_dataset(own))
        return own, part, held_out

    def _settings(self, judged: "Pipeline | Dataset") -> "Settings | None":
        """How a model draws; nothing where pictures are given."""
        from varkit.hub.pipeline import Pipeline

        if isinstance(judged, Pipeline):
            return judged.chosen(self.chosen())
        if self.chosen():
            raise UserError(f"--{next(iter(self.chosen()))} is for drawing, and {self.model!r} is no model")
        return None

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
    from varkit.train.recipes import RECIPES

    about = pipeline.about
    spec = about.get("request", {}).get("recipe") or about.get("recipe")
    if not spec:
        raise UserError(
            "this model does not say what it was trained on; add --data, e.g. --data scenes or a folder"
        )
    return RECIPES[spec]().dataset if spec in RECIPES else str(spec)


def _held_out(dataset: "Dataset") -> tuple["Dataset", str]:
    """The held-out part of a data set, or the rest of one too small to have any, and its name."""
    held_out = dataset.split("validation")
    if held_out.size != 0:
        return held_out, "validation"
    log("the data set is too small to hold pictures out; those of the training are taken")
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
    spectrum = summary["spectrum"]
    rows.append(("PSD distance", f"{spectrum['psd_distance']:.3f}"))
    for third in ("low", "mid", "high"):
        found = spectrum[third]
        text = f"{found['kept']:.1%} of the amplitude kept, error {found['error']:.3f}"
        rows.append((f"{third} frequencies", text))
    if summary["rfid"] is not None:
        rfid = summary["rfid"]
        rows.append(
            ("rFID", f"{_number(rfid['rfid']['value'])}{_between(rfid['rfid'])} ({rfid['features']})")
        )
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
        *(
            (
                f"  {m['table']}: {m['asked']} read as {m['read']}",
                f"{m['count'] / m['total']:.3f}",
                m["total"],
            )
            for m in summary["mistakes"][:MISTAKES]
        ),
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


TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "inception score",
}


def _fid_table(summary: dict[str, Any]) -> Table:
    floor = summary["floor"] or {}
    resamples = f"{summary['resamples']} resamples" if summary["resamples"] else ""
    rows: list[tuple[object, ...]] = [("features", summary["features"], resamples, "")]
    sizes = [f"{s['pictures']} : {s['reference_pictures'] or '?'}" if s else "" for s in (summary, floor)]
    part = {"all": "", "validation": "held-out part"}.get(summary["part"], "part trained on")
    rows.append(("compared with", summary["data"], part, ""))
    rows.append(("pictures : reference", sizes[0], "", sizes[1]))
    for name, title in TITLES.items():
        if name in summary:
            real = _number(floor[name]) if name in floor else ""
            rows.append((title, _number(summary[name]["value"]), _between(summary[name]).strip(), real))
    return ("figure", "value", "95 % interval", "real against real"), rows


def _number(value: float) -> str:
    return f"{value:.4g}"


def _between(figure: dict[str, Any]) -> str:
    return "" if figure["interval"] is None else " [{:.4g}, {:.4g}]".format(*figure["interval"])


TABLES = {
    "digits": _digits_table,
    "fid": _fid_table,
    "reconstruction": _reconstruction_table,
    "scenes": _scenes_table,
}

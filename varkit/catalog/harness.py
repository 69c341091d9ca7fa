"""Measures an experiment: every arm at every seed, arms in turn, and the rules' verdicts; interrupted, it goes on.

Each measured (part, arm, seed) is a small file until the experiment is done, so nothing is measured twice after an
interruption; a finished experiment is measured anew the next time, over the same cached models.
Legend: S seeds.
"""

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from varkit import __version__
from varkit.catalog.experiment import Arm, Experiment, Part, Subject, Values
from varkit.catalog.models import Say, Store
from varkit.catalog.places import experiments_folder
from varkit.errors import UserError, unknown_name
from varkit.files import atomic_write, write_json

if TYPE_CHECKING:
    from PIL import Image

PICTURES = "pictures"
"""The key under which a `Subject` keeps the pictures that were judged, (N, H, W, 3) uint8: some are shown."""

SHOWN = 8


def available() -> list[str]:
    """Names of the experiments there are."""
    return sorted(path.stem for path in experiments_folder().glob("*.py") if not path.stem.startswith("_"))


def find_experiment(name: str) -> Experiment:
    """The `EXPERIMENT` of a file in the folder of experiments. Raises `UserError` for an unknown name."""
    names = available()
    if not names:
        raise UserError(
            f"there are no experiments in {str(experiments_folder())!r}; run from a checkout of varkit"
        )
    if name not in names:
        raise unknown_name("experiment", name, names, "(see varkit systems)")
    spec = importlib.util.spec_from_file_location(
        f"varkit_experiment_{name.replace('-', '_')}", experiments_folder() / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXPERIMENT


def prepare(experiment: Experiment, store: Store, seeds: int | None, train: bool, say: Say) -> None:
    """Train what is missing, or say how long that takes. Raises `UserError` when models are missing without `train`."""
    missing = store.missing(experiment.models(seeds))
    minutes = sum(model.minutes for model in missing)
    if missing and not train:
        raise UserError(
            f"{len(missing)} models of the experiment {experiment.name!r} are not trained yet, which takes about "
            f"{minutes:.0f} minutes here; add --train"
        )
    for i, model in enumerate(missing):
        say(
            f"training {model.recipe.name} (seed {model.seed}), {i + 1} of {len(missing)}: {model.minutes:g} minutes"
        )
        store.train(model, say)


def reproduce(
    experiment: Experiment, store: Store, out: Path, seeds: int | None = None, say: Say = lambda text: None
) -> dict[str, Any]:
    """Measure over trained models; writes `NAME.json` and `NAME.png` in `out` and returns the former.

    `seeds` takes the first of each part's; the claim of a system is that of its first part.
    """
    started = time.monotonic()
    partial = store.folder / "measured" / experiment.name
    parts, pictures = [], []
    for part in experiment.parts:
        chosen = part.seeds[:seeds]
        values, samples = _measure(part, chosen, store, partial, say)
        parts.append(_summary(part, values, chosen))
        pictures.append(_rows(list(samples.values())))
    result = {
        "name": experiment.name,
        "measures": experiment.measures,
        "paper": parts[0]["paper"],
        "measured": parts[0]["measured"],
        "holds": parts[0]["holds"],
        "parts": parts,
        "minutes": round((time.monotonic() - started) / 60, 2),
        **_circumstances(),
    }
    write_json(out / f"{experiment.name}.json", result)
    with atomic_write(out / f"{experiment.name}.png") as temporary:
        _stacked(pictures).save(temporary, format="PNG", optimize=True)
    shutil.rmtree(partial, ignore_errors=True)
    return result


def _measure(
    part: Part, seeds: Sequence[int], store: Store, partial: Path, say: Say
) -> tuple[Values, dict[str, "Image.Image"]]:
    """Every arm at every seed, arms in turn; pictures of the first seed."""
    from PIL import Image

    values: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in part.arms}
    samples = {}
    for seed in seeds:
        for arm in part.arms:
            file = partial / f"{part.name}-{arm.name}-{seed}-{_fingerprint(part, arm, seed)}.json"
            if not file.is_file():
                say(f"{part.name}: {arm.name}, seed {seed}")
                _measure_cell(part, arm, seed, store, file)
            for name, value in json.loads(file.read_text(encoding="utf-8")).items():
                values[arm.name].setdefault(name, []).append(value)
            shown = file.with_suffix(".png")
            if seed == seeds[0] and shown.is_file():
                samples[arm.name] = Image.open(shown).copy()
    return values, samples


def _measure_cell(part: Part, arm: Arm, seed: int, store: Store, file: Path) -> None:
    from PIL import Image

    from varkit.pictures import grid

    subject = Subject(arm.apply(store.load(part.model(arm, seed))), seed, arm.options)
    found = {metric.name: float(metric.measure(subject)) for metric in part.metrics}
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures = subject.kept.get(PICTURES)
    if pictures is not None:
        row = grid([Image.fromarray(picture) for picture in pictures[:SHOWN]], min(SHOWN, len(pictures)))
        with atomic_write(file.with_suffix(".png")) as temporary:
            row.save(temporary, format="PNG")
    write_json(file, found)


def _fingerprint(part: Part, arm: Arm, seed: int) -> str:
    """What a measured file depends on: the model, the arm's options, and the metrics by name and key."""
    metrics = [(metric.name, metric.key) for metric in part.metrics]
    text = json.dumps([part.model(arm, seed).address, dict(arm.options), metrics, __version__], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _summary(part: Part, values: Values, seeds: Sequence[int]) -> dict[str, Any]:
    verdict = part.rule(values)
    return {
        "name": part.name,
        "paper": part.paper,
        "measured": verdict.measured,
        "holds": verdict.holds,
        "rule": str(part.rule),
        "details": verdict.details,
        "seeds": list(seeds),
        "kind": _kind(part, seeds),
        "minutes_of_training": {arm.name: part.model(arm, seeds[0]).minutes for arm in part.arms},
        "units": {metric.name: metric.unit for metric in part.metrics},
        "arms": {
            arm: {name: _statistics(found) for name, found in by_metric.items()}
            for arm, by_metric in values.items()
        },
    }


def _kind(part: Part, seeds: Sequence[int]) -> str:
    if not part.sampling:
        return "training seeds"
    return "one training an arm" if len(seeds) == 1 else "sampling seeds of one training an arm"


def _statistics(found: Sequence[float]) -> dict[str, Any]:
    return {"mean": fmean(found), "spread": stdev(found) if len(found) > 1 else None, "values": list(found)}


def _circumstances() -> dict[str, Any]:
    import torch

    from varkit.hardware import hardware

    return {"varkit": __version__, "torch": torch.__version__, "hardware": hardware()}


def _rows(rows: Sequence["Image.Image"]) -> "Image.Image | None":
    """Rows of samples under each other, one an arm."""
    from varkit.pictures import grid

    return grid(list(rows), columns=1) if rows else None


def _stacked(pictures: Sequence["Image.Image | None"]) -> "Image.Image":
    """Pictures of different sizes under each other, on white."""
    from PIL import Image

    shown = [picture for picture in pictures if picture is not None] or [Image.new("RGB", (64, 64), "white")]
    width, height = max(p.width for p in shown), sum(p.height for p in shown)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for picture in shown:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet

"""`varkit reproduce`: measure a paper's claim again, at small scale, against its base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from varkit.cli.console import log, print_json, print_table
from varkit.errors import UserError
from varkit.files import ensure_writable


@dataclass(frozen=True)
class Reproduce:
    """Measure a paper's claim against its base, at small scale."""

    name: Positional[str]
    """The system, as in `varkit systems`."""
    seeds: int | None = None
    """Use only this many of the experiment's seeds."""
    train: bool = False
    """Train the models that are missing; they are kept, and interrupted trainings go on."""
    out: Path = Path("reproduced")
    """Folder for NAME.json and NAME.png."""
    json: bool = False
    """Print the result as one JSON object."""

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise UserError(f"--seeds is {self.seeds}; it must be at least 1")

    def run(self) -> None:
        from varkit.catalog.harness import find_experiment, prepare, reproduce
        from varkit.catalog.models import Store

        experiment = find_experiment(self.name)
        ensure_writable(self.out / f"{self.name}.json")
        store = Store.default()
        prepare(experiment, store, self.seeds, self.train, log)
        result = reproduce(experiment, store, self.out, self.seeds, log)
        if self.json:
            print_json(result)
            return
        for part in result["parts"]:
            _print(part)
        print(self.out / f"{self.name}.json")


def _print(part: dict[str, Any]) -> None:
    metrics = list(part["units"])
    rows = [
        [arm, *(_cell(by_metric[metric]) for metric in metrics)] for arm, by_metric in part["arms"].items()
    ]
    print_table((part["name"], *(_named(metric, part["units"][metric]) for metric in metrics)), rows)
    print(f"paper: {part['paper']}\nhere: {part['measured']} ({part['kind']}: {len(part['seeds'])})")
    print(f"holds: {'yes' if part['holds'] else 'no'}, by the rule: {part['rule']}\n")


def _named(metric: str, unit: str) -> str:
    return f"{metric} ({unit})" if unit else metric


def _cell(statistics: dict[str, Any]) -> str:
    spread = statistics["spread"]
    return f"{statistics['mean']:.4g}" + ("" if spread is None else f" ± {spread:.2g}")

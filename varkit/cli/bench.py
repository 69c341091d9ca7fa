"""`varkit bench`: how fast one picture is made here, part by part, and how near that is to the machine's limit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from varkit.cli.console import log, print_json, print_table
from varkit.cli.models import DEFAULT_MODEL, check_no_recipe, is_repository, opened
from varkit.errors import UserError, unknown_name


@dataclass(frozen=True)
class Bench:
    """Time one picture at a time, and state what this machine could do at best."""

    what: Positional[str] = DEFAULT_MODEL
    """A model by name or folder, or a released size with random weights: var-d16, mar-base, infinity-125m, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""
    rounds: int = 5
    """Pictures timed, after one to warm up; medians are shown."""
    packed: bool = False
    """Lay the weights out for oneDNN first (`Pipeline.packed`)."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"--rounds is {self.rounds}; time at least 1 picture")

    def run(self) -> None:
        import torch

        from varkit.bench.measure import any_condition, measure
        from varkit.bench.sizes import SIZES, random_model
        from varkit.hardware import hardware
        from varkit.hub.pipeline import bundled

        known = self.what in (*SIZES, *bundled()) or Path(self.what).exists() or is_repository(self.what)
        if not known:
            check_no_recipe(self.what)
            hint = f"(models: {', '.join(bundled())}; released sizes: {', '.join(SIZES)}; or a folder)"
            raise unknown_name("model or size", self.what, [*bundled(), *SIZES], hint)
        pipeline = random_model(self.what) if self.what in SIZES else opened(self.what)
        pipeline = pipeline.to(getattr(torch, self.dtype))
        if self.packed:
            pipeline.packed()
        if not self.json:
            log(f"drawing {self.rounds + 1} pictures, one at a time")
        result = measure(pipeline, any_condition(pipeline), self.rounds)
        facts = {
            "what": self.what,
            "dtype": self.dtype,
            "packed": self.packed,
            "batch": 1,
            "size": list(pipeline.size),
            "guidance": pipeline.settings.guidance,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "hardware": hardware(),
        }
        if self.json:
            print_json(facts | result)
            return
        print_table(("part", "seconds", "limit", "of the limit", "GFLOP", "GB"), _rows(result))
        print(
            f"the machine: {result['flops_per_second'] / 1e9:.0f} GFLOP/s at the work's shapes, "
            f"{result['bytes_per_second'] / 1e9:.0f} GB/s read"
        )


def _rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    parts = sorted(result["parts"].items(), key=lambda item: -item[1]["seconds"])
    whole = {key: sum(part[key] for _, part in parts) for key in ("flops", "bytes")}
    every = [*parts, ("one picture", {**result, **whole})]
    return [
        (
            name,
            f"{part['seconds']:.3f}",
            f"{part['limit']:.3f}",
            f"{part['fraction_of_limit']:.0%}",
            f"{part['flops'] / 1e9:.1f}",
            f"{part['bytes'] / 1e9:.2f}",
        )
        for name, part in every
    ]

"""How long a person waits: loading a model, one picture from it, and the commands from the shell.

    python benchmarks/latency.py [--model NAME_OR_DIR] [--rounds N] [--json-only]

Medians over rounds, files in the system's cache. The commands are whole processes, interpreter and imports included.
The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import varkit
from varkit.cli.console import print_table
from varkit.generators.conditioning import ClassConfig
from varkit.hardware import hardware
from varkit.hub.pipeline import Pipeline

CAPTION = "a red circle"


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    options = _options()
    pipeline = varkit.load(options.model)
    prompt = 0 if isinstance(pipeline.condition, ClassConfig) else CAPTION
    seconds = measure(pipeline, options.model, prompt, options.rounds)
    if not options.json_only:
        print_table(("what", "seconds"), [(what, f"{value:.3f}") for what, value in seconds.items()])
    facts = {
        "model": options.model,
        "parameters": {name: _parameters(part) for name, part in pipeline.parts.items()},
        "evaluations": pipeline.model.plan.evaluations,  # type: ignore[attr-defined]
        "dtype": str(next(pipeline.generator.parameters()).dtype).removeprefix("torch."),
        "size": pipeline.size,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
    }
    print(json.dumps({"what": "latency", "seconds": seconds} | facts))


def measure(pipeline: Pipeline, model: str, prompt: str | int, rounds: int) -> dict[str, float]:
    """Median seconds of each wait, by name."""
    asked = ["--label", str(prompt)] if isinstance(prompt, int) else [prompt]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "picture.png")
        waits: dict[str, Callable[[], Any]] = {
            "load": lambda: varkit.load(model),
            "one picture": lambda: pipeline.generate(prompt, seed=0),
            "varkit --help": lambda: _shell("--help"),
            "varkit generate": lambda: _shell("generate", *asked, "--model", model, "--out", out),
        }
        return {what: _median(wait, rounds) for what, wait in waits.items()}


def _median(call: Callable[[], Any], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _shell(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "varkit", *words], check=True, stdout=subprocess.DEVNULL)


def _parameters(part: Any) -> int:
    return sum(p.numel() for p in part.parameters()) if isinstance(part, torch.nn.Module) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="scenes", help="a bundled model, or a folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json-only", action="store_true")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    return options


if __name__ == "__main__":
    main()

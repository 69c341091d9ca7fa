"""Seconds for one picture of a released size: ours, the published implementation's on the same weights, the limit.

    python benchmarks/generate.py WORK --published DIR [--dtype float32|bfloat16|both] [--rounds N]

WORK is var-d16, llamagen-b, mar-base or infinity-125m; DIR holds checkouts of the published code (published_models.py).
Batch 1, guidance on, pixels included. Each implementation runs in a process of its own, in turn; medians are shown. The
limit is `varkit bench`'s: the least time for the matrix work at the best rates found here. The last line is JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from published_models import WORKS
from rounds import Step, alternate

from varkit.bench.measure import any_condition, measure
from varkit.cli.console import log, print_table
from varkit.decode.loop import run
from varkit.hardware import hardware
from varkit.hub.pipeline import Pipeline
from varkit.hub.published import pipeline_from_published


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    options = _options()
    dtypes = ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]
    save, step = WORKS[options.work]
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch)
        writer = get_context("spawn").Process(target=save, args=(options.published, weights))
        writer.start()
        writer.join()
        results = {}
        for dtype in dtypes:
            log(f"{dtype}: {options.rounds} rounds")
            makers: dict[str, Callable[[], Step]] = {
                "ours": partial(ours, weights, dtype, False),
                "packed": partial(ours, weights, dtype, True),
                "published": partial(step, options.published, weights, dtype),
            }
            seconds = alternate(makers, options.rounds, warm=1)
            results[dtype] = {
                name: {"seconds": s, "ratio": seconds["published"] / s} for name, s in seconds.items()
            }
            pipeline = _pipeline(weights, dtype)
            told = measure(pipeline, any_condition(pipeline), rounds=1)
            results[dtype]["limit"] = {"seconds": told["limit"], "flops_per_second": told["flops_per_second"]}
    rows = [
        (
            dtype,
            name,
            f"{r['seconds']:.2f}",
            f"{r['ratio']:.2f}",
            f"{found['limit']['seconds'] / r['seconds']:.0%}",
        )
        for dtype, found in results.items()
        for name, r in found.items()
        if name != "limit"
    ]
    print_table(("dtype", "what", "seconds", "times published", "of the limit"), rows)
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "hardware": hardware()}
    print(json.dumps({"what": "generate", "work": options.work, "batch": 1, "results": results} | facts))


def ours(weights: Path, dtype: str, packed: bool) -> Step:
    """One picture by the converted pipeline."""
    pipeline = _pipeline(weights, dtype)
    if packed:
        pipeline.packed()
    condition = any_condition(pipeline)

    def step() -> None:
        state = pipeline.start_from(condition, 0, [0], pipeline.settings)
        pipeline.pictures(run(pipeline.model, state))

    return step


def _pipeline(weights: Path, dtype: str) -> Pipeline:
    return pipeline_from_published(sorted(weights.iterdir())).to(getattr(torch, dtype))


def _options() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=sorted(WORKS))
    parser.add_argument("--published", type=Path, required=True, help="folder of checkouts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What attention saves that skips what is not seen: runs of tokens apart, and windows, against their dense masks.

    python benchmarks/attention.py [--tokens 256 1024 4096] [--dtype float32|bfloat16] [--rounds N] [--tiles N ...]
        [--json-only]

Apart are four runs of a quarter of the tokens each; a window is 7 x 7 on a square grid (MVAR, arXiv 2505.12742), by
strips of rows up to 1024 tokens on a CPU, and by tiles beyond. Each is timed forward and in training (forward and
backward), in turn with its twin, which computes everything and hides what is not seen under a mask; each in a process
of its own. Medians are shown. `--tiles` compares sizes of a window's tiles too. The last line is JSON.
Legend: N rows, H heads, L tokens, E head width.
"""

import argparse
import json
import math
from functools import partial
from typing import Any

import torch
from rounds import Step, alternate

from varkit.cli.console import log, print_table
from varkit.hardware import hardware
from varkit.nn.attention import Packed, View, attend
from varkit.nn.neighbourhood import Tiles
from varkit.plans.visibility import Apart, Neighbourhood, pairs

ROWS, HEADS, HEAD_WIDTH = 2, 4, 64
RUNS, WINDOW = 4, 7


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    options = _options()
    rows = [
        row
        for tokens in options.tokens
        for kind in ("apart", "window")
        for row in measure(kind, tokens, options)
    ]
    if not options.json_only:
        print_table(tuple(rows[0]), [tuple(str(value) for value in row.values()) for row in rows])
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "hardware": hardware()}
    shape = {"rows": ROWS, "heads": HEADS, "head_width": HEAD_WIDTH, "dtype": options.dtype}
    print(json.dumps({"what": "attention", **shape, "runs": RUNS, "window": WINDOW, "results": rows} | facts))


def measure(kind: str, tokens: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way of computing it, forward and in training."""
    names = ["fast", "dense", *(f"tiles {n}" for n in options.tiles if kind == "window")]
    rows = []
    for training in (False, True):
        log(f"{kind}, {tokens} tokens, {'training' if training else 'forward'}: {', '.join(names)}")
        makers = {name: partial(step, kind, tokens, name, options.dtype, training) for name in names}
        seconds = alternate(makers, options.rounds, warm=1)
        for name in names:
            if name != "dense":
                rows.append(
                    {
                        "kind": kind if name == "fast" else f"{kind}, {name}",
                        "tokens": tokens,
                        "pass": "training" if training else "forward",
                        "seconds": float(f"{seconds[name]:.4g}"),
                        "dense": float(f"{seconds['dense']:.4g}"),
                        "times faster": float(f"{seconds['dense'] / seconds[name]:.3g}"),
                        "pairs seen": float(f"{pairs(visibility(kind, tokens), tokens) / tokens**2:.3g}"),
                    }
                )
    return rows


def visibility(kind: str, tokens: int) -> Apart | Neighbourhood:
    """Who sees whom."""
    if kind == "apart":
        return Apart(((tokens // RUNS, "all"),) * RUNS)
    side = math.isqrt(tokens)
    return Neighbourhood((side, side), WINDOW)


def step(kind: str, tokens: int, name: str, dtype: str, training: bool) -> Step:
    """One attention over random queries, keys and values."""
    own = visibility(kind, tokens)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(ROWS, tokens, HEADS, HEAD_WIDTH)
        .to(getattr(torch, dtype))
        .transpose(1, 2)
        .requires_grad_(training)
        for _ in range(3)
    )
    if name == "dense":
        views = [View(k, v, own.mask())]
    elif name == "fast":
        views = list(Packed(own if isinstance(own, Apart) else Apart(((tokens, own),))).views(0, q, k, v))
    else:
        assert isinstance(own, Neighbourhood)
        views = [View(k, v, Tiles.of(own, int(name.removeprefix("tiles "))))]

    def forward() -> None:
        attend(q, views, 1.0)

    def train() -> None:
        torch.autograd.grad(attend(q, views, 1.0).sum(), (q, k, v))

    return train if training else forward


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--tiles", type=int, nargs="*", default=[], help="sides of a window's tiles to compare"
    )
    parser.add_argument("--json-only", action="store_true")
    options = parser.parse_args()
    for tokens in options.tokens:
        if tokens % RUNS or math.isqrt(tokens) ** 2 != tokens:
            parser.error(f"--tokens {tokens} is no square that divides by {RUNS}; use one such as 1024")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    return options


if __name__ == "__main__":
    main()

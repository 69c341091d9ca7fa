"""Speed of a training step of VAR (arXiv 2404.02905): ours, the published one's, and the machine's limit.

    python benchmarks/train_step.py [--dtype float32|bfloat16|both] [--compile] [--returned] [--published DIR]
        [--rounds N]

One step is everything the trainer does with a batch of tokens but logging: inputs from tokens, forward, backward,
clipping, AdamW; ours also averages the weights and cares for non-finite steps. DIR is a checkout of
FoundationVision/VAR, which is not bundled; its step is that of its trainer without the accuracies it logs, under
autocast in bfloat16 as there. `--compile` adds our step with compiled blocks and losses. Each runs in a process of its
own, ours with the memory settings that our training makes. Rounds alternate between them, so that all meet the same
machine; medians are shown.
The limit is the time that the matrix products alone take by the fastest kernel for each. The last line is JSON.
Legend: N rows (pictures x tokens), I inputs, O outputs of a linear.
"""

import argparse
import contextlib
import io
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rounds import Step, alternate
from torch import nn

from varkit.bench.machine import convolution_linear
from varkit.cli.console import log, print_table
from varkit.generators.conditioning import ClassConfig
from varkit.generators.var import VARConfig
from varkit.hardware import hardware
from varkit.heads.categorical import CategoricalConfig
from varkit.nn.linear import ONEDNN_LINEAR, differentiable_linear
from varkit.plans.scales import ScalesConfig
from varkit.plans.schedule import Schedule
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.train.generator_task import Forced, NextStepTask
from varkit.train.memory import keep_freed_memory
from varkit.train.optim import decays
from varkit.train.task import TrainConfig
from varkit.train.tokens import Tokens
from varkit.train.trainer import Trainer

SCHEDULE = (1, 2, 3, 4, 6, 8)
TOKENS = Schedule.parse(SCHEDULE).total
DEPTH, WIDTH, HEADS, MLP_RATIO, DROP_PATH = 6, 256, 4, 4, 0.025
VOCABULARY, CODE_WIDTH, CLASSES = 4096, 32, 1000
BATCH, PICTURES = 32, 1024
CONFIG = {
    "depth": DEPTH, "width": WIDTH, "heads": HEADS, "mlp_ratio": MLP_RATIO, "schedule": SCHEDULE, "tokens": TOKENS,
    "vocabulary": VOCABULARY, "code_width": CODE_WIDTH, "classes": CLASSES, "batch": BATCH, "drop_path": DROP_PATH,
}  # fmt: skip
LINEARS = {
    "qkv": (WIDTH, 3 * WIDTH, DEPTH),
    "out": (WIDTH, WIDTH, DEPTH),
    "up": (WIDTH, MLP_RATIO * WIDTH, DEPTH),
    "down": (MLP_RATIO * WIDTH, WIDTH, DEPTH),
    "head": (WIDTH, VOCABULARY, 1),
}
"""Inputs, outputs and number of the linears over tokens; those over conditions are a thousandth of the work."""


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    options = _options()
    names = ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]
    results = {name: measure(name, options) for name in names}
    if not options.json_only:
        print(", ".join(f"{k} {v}" for k, v in CONFIG.items()))
        print_table(*_table(results))
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "hardware": hardware()}
    print(json.dumps({"what": "train_step", "config": CONFIG, "results": results} | facts))


def measure(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every step in one dtype, and the limit."""
    log(f"{dtype}: the machine's limit")
    keep_freed_memory()  # or the kernels' results would be timed with the system's clearing of their pages
    kernels = limit(getattr(torch, dtype))
    makers: dict[str, Callable[[], Step]] = {"ours": partial(ours, dtype)}
    if options.compile:
        makers["compiled"] = partial(ours, dtype, compiled=True)
    if options.returned:
        makers["returned"] = partial(ours, dtype, kept=False)
    if options.published is not None:
        makers["published"] = partial(published, options.published, dtype)
    log(f"{dtype}: {options.rounds} rounds of {', '.join(makers)}")
    seconds = alternate(makers, options.rounds)
    best = sum(kernel["seconds"] for kernel in kernels.values())
    work = BATCH * flops()
    linear_work = 3 * sum(2 * BATCH * TOKENS * i * o * count for i, o, count in LINEARS.values())
    result: dict[str, Any] = {
        name: {
            "seconds": s,
            "pictures_per_second": BATCH / s,
            "gflops_per_second": work / s / 1e9,
            "fraction_of_limit": work / s / (linear_work / best),
            "ratio": seconds["published"] / s if "published" in seconds else None,
        }
        for name, s in seconds.items()
    }
    return result | {
        "flops_per_picture": flops(),
        "limit": {"gflops_per_second": linear_work / best / 1e9, "kernels": kernels},
    }


def flops() -> int:
    """Floating-point operations of the products for one picture, forward and backward (twice the forward)."""
    linears = sum(2 * TOKENS * i * o * count for i, o, count in LINEARS.values())
    attention = DEPTH * 2 * 2 * TOKENS * TOKENS * WIDTH
    conditions = DEPTH * 2 * WIDTH * 6 * WIDTH
    return 3 * (linears + attention + conditions + 2 * TOKENS * CODE_WIDTH * WIDTH)


# --- the two implementations ---------------------------------------------------


def tokens() -> Tokens:
    """Random ids and labels: speed does not depend on them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (PICTURES, TOKENS)).astype(np.int32)
    return Tokens({"ids": ids}, rng.integers(0, CLASSES, PICTURES))


def ours(dtype: str, compiled: bool = False, kept: bool = True) -> Step:
    """The trainer's step on a generator over tokens; freed memory is kept as in our training, or returned."""
    if kept:
        keep_freed_memory()
    torch.manual_seed(0)
    conv = ConvConfig(
        channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=CODE_WIDTH, attention=False
    )
    tokenizer = MultiScaleVQConfig(conv, VOCABULARY, CODE_WIDTH, SCHEDULE)
    generator = VARConfig(
        DEPTH, WIDTH, HEADS, SCHEDULE, CODE_WIDTH, ClassConfig(CLASSES), float(MLP_RATIO), drop_path=DROP_PATH
    )
    head = CategoricalConfig(WIDTH, VOCABULARY)
    parts = Forced(tokenizer.build(), generator.build(), head.build(), ScalesConfig(SCHEDULE).build())
    data = tokens()
    config = TrainConfig(steps=10_000, dtype=dtype, compile=compiled)
    trainer = Trainer(NextStepTask(parts, data, data, BATCH, {}), config)
    return lambda: trainer.step(10_000)


def published(folder: Path, dtype: str) -> Step:
    """The step of the published trainer, over the same tokens."""
    vae, var = _published_models(folder)
    data = tokens()
    ids, labels = torch.from_numpy(data.latents["ids"]).long(), torch.from_numpy(data.labels)
    sizes = list(Schedule.parse(SCHEDULE).lengths)
    groups = [
        {"params": [p for n, p in var.named_parameters() if decays(n, p) is yes], "weight_decay": 0.05 * yes}
        for yes in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    criterion = nn.CrossEntropyLoss(reduction="none")
    weights = torch.ones(1, TOKENS) / TOKENS
    amp = dtype == "bfloat16"

    def step() -> None:
        rows = torch.randint(PICTURES, (BATCH,))
        inputs = vae.quantize.idxBl_to_var_input(list(ids[rows].split(sizes, dim=1)))
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = var(labels[rows], inputs)
            loss = criterion(logits.view(-1, VOCABULARY), ids[rows].view(-1)).view(BATCH, -1)
            loss = loss.mul(weights).sum(dim=-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(var.parameters(), 2.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step


def _published_models(folder: Path) -> tuple[Any, Any]:
    """The checkout's VAR, and a small VQVAE for it; only the quantizer of the latter is used."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of its cuda.amp calls
    warnings.filterwarnings("ignore", message=".*CUDA.*")
    sys.path.insert(0, str(folder))
    try:
        from models.var import VAR  # type: ignore[import-not-found]
        from models.vqvae import VQVAE  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        vae = VQVAE(VOCABULARY, CODE_WIDTH, ch=32, v_patch_nums=SCHEDULE)
        var = VAR(
            vae, CLASSES, DEPTH, WIDTH, HEADS, MLP_RATIO, drop_path_rate=DROP_PATH, attn_l2_norm=True,
            patch_nums=SCHEDULE,
        )  # fmt: skip
        var.init_weights(init_adaln_gamma=1e-3, init_std=-1)
    return vae, var.train()


# --- the machine's limit -------------------------------------------------------


def limit(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """For each linear: the fastest kernel forward and backward, and the seconds that all of its kind take in a step."""
    found = {}
    for name, (inputs, outputs, count) in LINEARS.items():
        times: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        for kernel, way, seconds in _kernel_times(inputs, outputs, dtype):
            times[way][kernel] = seconds
        best = {way: min(by, key=by.__getitem__) for way, by in times.items()}
        total = sum(times[way][kernel] for way, kernel in best.items())
        work = 3 * 2 * BATCH * TOKENS * inputs * outputs
        found[name] = best | {"seconds": count * total, "gflops_per_second": work / total / 1e9}
    return found


def _kernel_times(inputs: int, outputs: int, dtype: torch.dtype) -> Iterator[tuple[str, str, float]]:
    """Kernel, "forward" or "backward", seconds."""
    x = torch.randn(BATCH * TOKENS, inputs).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(outputs, inputs)).to(dtype).requires_grad_()
    bias = torch.zeros(outputs, dtype=dtype).requires_grad_()
    grad = torch.randn(BATCH * TOKENS, outputs).to(dtype)
    kernels = {"linear": F.linear, "convolution": convolution_linear}
    if ONEDNN_LINEAR:
        kernels["product"] = differentiable_linear
    for name, kernel in kernels.items():
        y = kernel(x, weight, bias)
        yield name, "forward", _fastest(lambda: kernel(x, weight, bias))  # noqa: B023
        backward = lambda: torch.autograd.grad(y, (x, weight, bias), grad, retain_graph=True)  # noqa: B023, E731
        yield name, "backward", _fastest(backward)


def _fastest(call: Callable[[], Any], tries: int = 5) -> float:
    call()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# --- what is shown ---------------------------------------------------------------


def _table(results: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = []
    for dtype, result in results.items():
        for name in ("ours", "compiled", "returned", "published"):
            if name in result:
                found = result[name]
                speed, rate = found["pictures_per_second"], found["gflops_per_second"]
                ratio = "" if found["ratio"] is None else f"{found['ratio']:.2f}"
                rows.append(
                    (dtype, name, f"{speed:.1f}", f"{rate:.0f}", f"{found['fraction_of_limit']:.0%}", ratio)
                )
        rows.append((dtype, "limit", "", f"{result['limit']['gflops_per_second']:.0f}", "", ""))
    return ("dtype", "step", "pictures/s", "GFLOP/s", "of the limit", "times published"), rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--compile", action="store_true", help="measure our compiled step too")
    parser.add_argument(
        "--returned",
        action="store_true",
        help="measure our step too where freed memory returns to the system",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--published", type=Path, help="a checkout of FoundationVision/VAR")
    parser.add_argument("--json-only", action="store_true")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    if options.published is not None and not (options.published / "models" / "var.py").is_file():
        parser.error(f"{options.published} has no models/var.py; give a checkout of FoundationVision/VAR")
    return options


if __name__ == "__main__":
    main()

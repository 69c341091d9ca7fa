"""The table of `varkit bench` on an accelerator: bfloat16, batches of 1 and 64, kernel by kernel and as CUDA graphs.

    python benchmarks/accelerator.py [--out FILE] [--works NAME ...] [--batches 1 64] [--budget SECONDS] [--smoke]

Models of released sizes with random weights, guidance on, pixels included. Two ceilings are measured first: a copy
within the device's memory (bytes read and written) and an 8192^3 product in bfloat16. The limit of a run is the least
time for its matrix work at these rates (`varkit.bench.work`), as on a CPU. Times are medians of whole runs after one to
warm up; those of parts come from a run in which the device is waited for at every border, and so add up to more. `same`
compares graphs with kernel by kernel: latents that are equal, and the largest difference.
Then masks: FlexAttention against a dense mask, forward and backward. FILE is written after every row, and the last line
is JSON. What fails says so in its row. --smoke takes tiny models, on a CPU too.
"""

import argparse
import datetime
import json
import math
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from device_clock import ENOUGH, seconds_of, wait, warm
from flex_attention import MASKS
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from varkit.bench.machine import Limits
from varkit.bench.measure import any_condition, charged
from varkit.bench.parts import Parts
from varkit.bench.sizes import SIZES
from varkit.bench.work import Product, Work
from varkit.decode.loop import run
from varkit.decode.state import State
from varkit.draws import Draws
from varkit.hardware import hardware
from varkit.hub.graphed import graphed
from varkit.hub.pipeline import Pipeline
from varkit.plans.masked import MaskedConfig
from varkit.tokenizers.conv import ConvConfig

WORKS = ("var-d16", "infinity-125m", "llamagen-b", "mar-base")
INITIALISERS = (
    "trunc_normal_", "normal_", "xavier_uniform_", "kaiming_uniform_", "kaiming_normal_", "uniform_",
)  # fmt: skip
"""Of `torch.nn.init`: what they draw on the CPU is drawn anew on the device."""


def main() -> None:
    """Measure, print a line a row, and one line of JSON."""
    options = _options()
    began, device = time.perf_counter(), torch.device(options.device)
    told: dict[str, Any] = {"what": "accelerator", "date": str(datetime.date.today()), "dtype": "bfloat16"}
    told |= {"device": facts(device), "hardware": hardware(), "torch": torch.__version__}
    told |= {"python": platform.python_version(), "rows": [], "attention": []}

    def left() -> float:
        return options.budget - (time.perf_counter() - began)

    def row(kind: str, name: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        try:
            found = measure() if left() > 0 else {"left_out": f"the {options.budget} s were over"}
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        told[kind].append(name | found)
        told["seconds"] = time.perf_counter() - began
        print(f"{told['seconds']:6.1f} s  {json.dumps(name | _short(found))}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(told, indent=1))

    found = ceilings(device, options.smoke)
    told["limits"] = {"flops_per_second": found.flops, "bytes_per_second": found.bytes}
    print(json.dumps(told["limits"]), flush=True)
    for work in options.works:
        makers: dict[str, Pipeline] = {}
        for batch in options.batches:
            name = {"work": work, "batch": batch}
            row("rows", name, partial(measured, makers, work, batch, device, found, options.smoke))
    for case in MASKS if options.masks else ():
        row("attention", {"case": case}, partial(MASKS[case], device, options.smoke))
    print(json.dumps(told))


def _short(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k not in ("parts", "graphed_parts")}


def facts(device: torch.device) -> dict[str, Any]:
    """What the device says of itself."""
    if device.type != "cuda":
        return {"name": device.type}
    of = torch.cuda.get_device_properties(device)
    return {
        "name": of.name,
        "memory_gib": round(of.total_memory / 2**30, 1),
        "multiprocessors": of.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


@torch.no_grad()
def ceilings(device: torch.device, smoke: bool) -> Limits:
    """Operations and bytes a second."""
    side, size = (512, 2**22) if smoke else (8192, 2**32)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = warm(lambda: a @ b, device)
    here = torch.randint(255, (size,), device=device, dtype=torch.uint8)
    there = torch.empty_like(here)
    copy = warm(lambda: there.copy_(here), device)
    return Limits(2 * side**3 / product, 2 * size / copy)


def measured(
    makers: dict[str, Pipeline], work: str, batch: int, device: torch.device, found: Limits, smoke: bool
) -> dict[str, Any]:
    """One row of the table: a work at a batch."""
    if not makers:
        makers["eager"] = model(work, device, smoke)
    pipeline = makers["eager"]
    condition = _condition(pipeline, batch, device)
    start = time.perf_counter()
    products = counted(pipeline, condition)
    told: dict[str, Any] = {"counting": time.perf_counter() - start}
    drawn: list[State] = []
    told["eager"] = seconds_of(partial(picture, pipeline, condition, drawn), device) / batch
    plain = drawn[-1]
    told["flops"] = sum(p.flops * n for of in products.values() for p, n in of.items()) / batch
    told["bytes"] = sum(p.bytes * n for of in products.values() for p, n in of.items()) / batch
    told["limit"] = sum(found.seconds(p) * n for of in products.values() for p, n in of.items()) / batch
    told["eager_fraction"] = told["limit"] / told["eager"]
    if told["eager"] * batch < 2 * ENOUGH:
        told["parts"] = by_part(pipeline, condition, device, products, found)
    told["decoders"] = decoders(pipeline, plain, device)
    if device.type == "cuda":
        told |= _graphs(pipeline, condition, device, products, found, plain, told["limit"])
        told["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        torch.cuda.reset_peak_memory_stats(device)
    return told


def _graphs(
    pipeline: Pipeline, condition: dict[str, Tensor], device: torch.device,
    products: dict[str, Counter[Product]], found: Limits, plain: State, limit: float,
) -> dict[str, Any]:  # fmt: skip
    batch = plain.batch
    other = graphed(pipeline)
    start = time.perf_counter()
    drawn = [run(other.model, _started(other, condition))]
    wait(device)
    told: dict[str, Any] = {"recording": time.perf_counter() - start}
    told["graphed"] = seconds_of(partial(picture, other, condition, drawn), device) / batch
    told["same"] = [compared(plain, state) for state in (drawn[0], drawn[-1])]
    told["graphed_fraction"] = limit / told["graphed"]
    told["graphed_parts"] = by_part(other, condition, device, products, found)
    return told


def model(work: str, device: torch.device, smoke: bool) -> Pipeline:
    """A work's model with weights drawn on the device, which takes a fraction of the time."""
    configs, settings = SIZES[work]()
    if smoke:
        configs = tiny(configs)
    with ExitStack() as stack:
        for name in INITIALISERS:
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        parts = {part: config.build() for part, config in configs.items()}
    pipeline = Pipeline(parts, configs, settings).to(device, torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for part in parts.values():
            for p in part.parameters() if isinstance(part, nn.Module) else ():
                if p.ndim > 1:
                    p.normal_(std=p[0].numel() ** -0.5)
                else:
                    p.copy_(torch.ones_like(p) if bool(p.float().mean() == 1) else torch.zeros_like(p))
    return pipeline


def tiny(configs: dict[str, Any]) -> dict[str, Any]:
    """The same kinds of parts, as small as they can be."""
    conv = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8, attention=False)
    tokenizer, generator = configs["tokenizer"], configs["generator"]
    grid = {"schedule": (1, 2, 4)} if hasattr(tokenizer, "schedule") else {"grid": 4}
    tokenizer = replace(tokenizer, conv=conv, **grid)
    generator = replace(generator, depth=2, width=32, heads=2)
    if hasattr(generator, "buffer"):
        generator = replace(generator, buffer=4)
    made = {"tokenizer": tokenizer, **generator.fitted(tokenizer)}
    if isinstance(made["plan"], MaskedConfig):
        made |= {"plan": replace(made["plan"], iterations=4)}
        made |= {"head": replace(made["head"], mlp_width=32, depth=2, sampling_steps=6)}
    return made


def _condition(pipeline: Pipeline, batch: int, device: torch.device) -> dict[str, Tensor]:
    return {
        k: v.expand(1, batch, *v.shape[2:]).contiguous().to(device)
        for k, v in any_condition(pipeline).items()
    }


def _started(pipeline: Pipeline, condition: dict[str, Tensor]) -> State:
    samples = range(next(iter(condition.values())).shape[1])
    return pipeline.start_from(condition, 0, samples, pipeline.settings)


def picture(pipeline: Pipeline, condition: dict[str, Tensor], drawn: list[State]) -> None:
    """A batch, from its condition to pictures in main memory; its state is added to those drawn."""
    drawn.append(run(pipeline.model, _started(pipeline, condition)))
    pipeline.pictures(drawn[-1])


def compared(one: State, other: State) -> dict[str, float]:
    """How far two runs' latents agree."""
    (a,), (b,) = one.canvas.latents().values(), other.canvas.latents().values()
    return {
        "equal": (a == b).float().mean().item(),
        "largest_difference": (a.double() - b.double()).abs().max().item(),
    }


class _Waiting(Parts):
    """Parts of a device's time: it is waited for wherever one ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        super().__init__()

    def settle(self) -> None:
        wait(self.device)
        super().settle()


@contextmanager
def with_draws(pipeline: Pipeline, parts: Parts) -> Iterator[Pipeline]:
    """The pipeline with its parts charged for their time, draws among them."""
    with charged(pipeline, parts) as own, ExitStack() as stack:
        for name in ("uniform", "normal", "gumbel"):
            stack.enter_context(mock.patch.object(Draws, name, parts.wrap("draws", getattr(Draws, name))))
        yield own


def counted(pipeline: Pipeline, condition: dict[str, Tensor]) -> dict[str, Counter[Product]]:
    """The matrix work of a run, by part. A head's is counted once for each shape: a diffusion's is long."""
    parts = Parts()
    work = Work(lambda: parts.current)
    with with_draws(pipeline, parts) as own, ExitStack() as stack:
        for head in own.model.heads.values():
            stack.enter_context(mock.patch.object(head, "sample", _once(head.sample, work)))
        with work:
            state = run(own.model, _started(own, condition))
            with parts.of("decoder"), torch.no_grad():
                state.canvas.preview()
    return work.products


def _once(sample: Callable[..., Any], work: Work) -> Callable[..., Any]:
    known: dict[torch.Size, dict[str, Counter[Product]]] = {}

    def counting(h: Tensor, ask: Any) -> Any:
        if h.shape in known:
            for part, products in known[h.shape].items():
                work.products.setdefault(part, Counter()).update(products)
            with _disable_current_modes():
                return sample(h, ask)
        before = {part: Counter(products) for part, products in work.products.items()}
        values = sample(h, ask)
        known[h.shape] = {part: now - before.get(part, Counter()) for part, now in work.products.items()}
        return values

    return counting


def by_part(
    pipeline: Pipeline, condition: dict[str, Tensor], device: torch.device,
    products: dict[str, Counter[Product]], found: Limits,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of each part for one picture, and the least time for its matrix work."""
    parts = _Waiting(device)
    with with_draws(pipeline, parts) as own:
        parts.reset()
        state = run(own.model, _started(own, condition))
        with parts.of("decoder"):
            own.pictures(state)
        parts.settle()
    told = {}
    for name, seconds in parts.seconds.items():
        least = sum(found.seconds(p) * n for p, n in products.get(name, Counter()).items())
        told[name] = {"seconds": seconds / state.batch, "limit": least / state.batch}
    return told


@torch.no_grad()
def decoders(pipeline: Pipeline, state: State, device: torch.device) -> dict[str, float]:
    """Seconds of a picture's decoder: as it is, with channels last, and with cuDNN trying its kernels."""
    show, batch = state.canvas.preview, state.batch
    told = {"as_it_is": warm(show, device, 5) / batch}
    if device.type != "cuda":
        return told
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        told["tried"] = warm(show, device, 5) / batch
        pipeline.tokenizer.to(memory_format=torch.channels_last)
        told["tried_channels_last"] = warm(show, device, 5) / batch
    told["channels_last"] = warm(show, device, 5) / batch
    pipeline.tokenizer.to(memory_format=torch.contiguous_format)
    return told


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a file for what has been measured so far")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--works", nargs="*", choices=WORKS, default=list(WORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no row begins")
    parser.add_argument("--no-masks", dest="masks", action="store_false")
    parser.add_argument("--smoke", action="store_true", help="tiny models, for the script's own sake")
    options = parser.parse_args()
    if options.device == "cpu" and not options.smoke:
        parser.error("there is no CUDA device; `varkit bench` measures a CPU, or add --smoke")
    return options


if __name__ == "__main__":
    main()

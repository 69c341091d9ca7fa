"""One picture at a time: seconds by part, the work each part does, and the time that the machine needs for it at least.

result = measure(pipeline, condition, rounds=5)
result["parts"]["generator"]["fraction_of_limit"]
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from varkit.bench.machine import Limits, limits
from varkit.bench.parts import Parts
from varkit.bench.work import Product, Work
from varkit.decode.loop import run
from varkit.generators.base import Condition
from varkit.generators.text import TextFeaturesConfig
from varkit.hub.pipeline import Pipeline
from varkit.hub.prompts import nothing, padded

SEED = 0
PROMPT = 16
"""Tokens of a prompt of features."""


def measure(pipeline: Pipeline, condition: Condition, rounds: int = 5) -> dict[str, Any]:
    """Time whole pictures with the pipeline's own settings, and state what limits them.

    condition: of one sample, each tensor (1, 1, ...). Medians over rounds, after one to warm up. `seconds` is the
    whole, `limit` the least time for its matrix work on this machine; `parts` says both of each part.
    """
    parts = Parts()
    with charged(pipeline, parts) as own:
        work = Work(lambda: parts.current)
        with work:
            _picture(own, condition, parts)
        seconds = [_timed(own, condition, parts) for _ in range(rounds)]
    dtype = next(pipeline.generator.parameters()).dtype
    found = limits((p for products in work.products.values() for p in products), dtype)
    told = {}
    for name in sorted({name for times in seconds for name in times}):
        spent = statistics.median(times.get(name, 0.0) for times in seconds)
        told[name] = _told(spent, work.products.get(name, Counter()), found)
    total = statistics.median(sum(times.values()) for times in seconds)
    least = sum(part["limit"] for part in told.values())
    return {
        "seconds": total,
        "limit": least,
        "fraction_of_limit": least / total,
        "parts": told,
        "flops_per_second": found.flops,
        "bytes_per_second": found.bytes,
        "rounds": rounds,
    }


@contextmanager
def charged(pipeline: Pipeline, parts: Parts) -> Iterator[Pipeline]:
    """A pipeline whose parts are charged for their time, until the context ends."""
    wrapped: list[tuple[Any, str, str]] = [
        (pipeline.model.generator, "forward", "generator"),
        (pipeline.generator, "prepare", "condition"),
    ]
    wrapped += [(head, "sample", "head") for head in pipeline.model.heads.values()]
    with ExitStack() as stack:
        for owner, name, part in wrapped:
            setattr(owner, name, parts.wrap(part, getattr(owner, name)))
            stack.callback(delattr, owner, name)  # the class's own shows again
        wrap = pipeline.how.wrap
        yield pipeline.using(wrap=lambda pick: parts.wrap("sampling", wrap(pick)))


def _picture(pipeline: Pipeline, condition: Condition, parts: Parts) -> None:
    state = run(pipeline.model, pipeline.start_from(condition, SEED, [0], pipeline.settings))
    with parts.of("decoder"):
        pipeline.pictures(state)


def _timed(pipeline: Pipeline, condition: Condition, parts: Parts) -> dict[str, float]:
    parts.reset()
    _picture(pipeline, condition, parts)
    parts.settle()
    return dict(parts.seconds)


def _told(seconds: float, products: Counter[Product], found: Limits) -> dict[str, float]:
    least = _total(found.seconds(p) * n for p, n in products.items())
    return {
        "seconds": seconds,
        "limit": least,
        "fraction_of_limit": least / seconds if seconds else 0.0,
        "flops": _total(p.flops * n for p, n in products.items()),
        "bytes": _total(p.bytes * n for p, n in products.items()),
    }


def _total(numbers: Iterable[float]) -> float:
    return float(sum(numbers))


def any_condition(pipeline: Pipeline) -> Condition:
    """A condition of one sample, whatever the model takes: label 0, an empty prompt, or random features."""
    wanted = pipeline.condition
    if isinstance(wanted, TextFeaturesConfig):
        return padded([torch.randn(PROMPT, wanted.width, generator=torch.Generator().manual_seed(SEED))])
    return nothing(wanted, 1)

"""Alternatives timed in turn, each in a process of its own, so that all meet the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

Step = Callable[[], Any]


def alternate(makers: Mapping[str, Callable[[], Step]], rounds: int, warm: int = 2) -> dict[str, float]:
    """Median seconds of a step of each, after `warm` rounds; the processes of the others wait meanwhile."""
    context = get_context("spawn")
    times: dict[str, list[float]] = {name: [] for name in makers}
    lines = {}
    for name, make in makers.items():
        lines[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make), daemon=True).start()
    for _ in range(warm + rounds):
        for name, line in lines.items():
            line.send(True)
            times[name].append(line.recv())
    for line in lines.values():
        line.send(False)
    return {name: statistics.median(values[warm:]) for name, values in times.items()}


def _serve(line: Connection, make: Callable[[], Step]) -> None:
    """Take a step, and tell its seconds, whenever asked, until told that it was the last."""
    step = make()
    while line.recv():
        start = time.perf_counter()
        step()
        line.send(time.perf_counter() - start)

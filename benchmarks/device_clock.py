"""Seconds of work on a device, which goes on after the call that asked for it: it is waited for."""

import statistics
import time
from collections.abc import Callable

import torch

ROUNDS = 5
ENOUGH = 2.0
"""Seconds of runs after which no further round is taken."""


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """The median over rounds, or over as many as `ENOUGH` allows. The caller has warmed up."""
    times: list[float] = []
    while len(times) < rounds and (not times or sum(times) < ENOUGH):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def warm(function: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Seconds, after some to warm up."""
    for _ in range(3):
        function()
    return seconds_of(function, device, rounds)

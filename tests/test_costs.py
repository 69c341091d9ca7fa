"""What models cost under their plans, as experiments measure it, at tiny sizes."""

from dataclasses import replace
from pathlib import Path

import pytest

from varkit.catalog.costs import Work, peak_memory, seconds
from varkit.plans.scales import ScalesConfig


def test_costs_of_a_small_model_are_measured():
    """What the experiment measures at published sizes, here at tiny ones."""
    schedule = (1, 2, 4)
    works = {
        history: Work(ScalesConfig(schedule, history=history), depth=2, width=32, batch=2)
        for history in (None, 0)
    }
    assert works[0].carried() == 0
    assert (
        works[None].carried() == 1e-6 * 2 * 2 * 2 * 2 * 21 * 32 * 4
    )  # k, v; layers; branches; pictures; bytes
    assert all(
        0 < s < 10 for s in seconds([*works.values(), replace(works[0], train=True, mixed=True)], rounds=1)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's memory"
)
def test_decoding_without_a_cache_takes_less_memory():
    schedule = (1, 2, 4, 8, 16)
    var, markov = (
        peak_memory(Work(ScalesConfig(schedule, history=history), depth=8, width=128, batch=8))
        for history in (None, 0)
    )
    cache = 1e-6 * 2 * 8 * 2 * 8 * 341 * 128 * 4
    assert var - markov > 0.7 * cache

"""What models cost under their plans, as experiments measure it, at tiny sizes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from varkit.catalog.costs import Work, peak_memory, seconds
from varkit.catalog.experiment import Subject
from varkit.catalog.harness import find_experiment
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


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process's memory"
)
def test_mvars_experiment_measures_its_costs(monkeypatch: pytest.MonkeyPatch):
    """Over a tiny schedule: every figure is there, the rule decides, and nothing is cached."""
    experiment = find_experiment("mvar-markov")
    part, values = experiment.parts[0], {}
    module = part.metrics[0].measure.func.__globals__
    monkeypatch.setitem(module, "PUBLISHED", (1, 2, 3))
    monkeypatch.setitem(module, "ROUNDS", 1)
    for arm in part.arms:
        subject = Subject(None, 0, arm.options)  # type: ignore[arg-type]
        values[arm.name] = {metric.name: [metric.measure(subject)] for metric in part.metrics}
    # sides 1, 2, 3, then twice as large
    assert values["var"]["pairs, x1"] == [1e-6 * (1 + 4 * 5 + 9 * 14)]
    assert values["markov"]["pairs, x2"] == [1e-6 * (4**2 + 16**2 + 36**2)]
    assert values["markov"]["keys and values"] == [0] and values["var"]["keys and values"][0] > 0
    assert all(math.isfinite(own["exponent of attention"][0]) for own in values.values())
    verdict = part.rule(values)
    assert len(verdict.details) == 6 and verdict.details["keys and values of markov at most 0 times var's"]
    whole = part.arms[1].model(0).recipe.generator.train.steps
    tuned = experiment.parts[2].arms[1].model(0)
    assert (
        tuned.needs == [experiment.parts[2].arms[0].model(0)]
        and tuned.recipe.generator.train.steps < 0.2 * whole
    )

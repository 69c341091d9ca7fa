"""The experiment of M-VAR can be built, and what it measures of growing pictures is what it says, on toys."""

import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import tiny_pipeline
from tests.test_m_var_checkpoints import tiny
from varkit.catalog.experiment import Subject
from varkit.catalog.harness import find_experiment
from varkit.catalog.measures import parameters
from varkit.catalog.places import experiments_folder
from varkit.generators.conditioning import ClassConfig
from varkit.train.recipes import digit_scales, m_var_digits


@pytest.fixture
def experiment() -> ModuleType:
    """The file, with small pictures."""
    spec = importlib.util.spec_from_file_location("m_var", experiments_folder() / "m-var.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PUBLISHED, module.ROUNDS = (1, 2, 3, 5), 1
    return module


def subjects() -> dict[str, Subject]:
    return {"VAR": Subject(tiny_pipeline(ClassConfig(3)), 0), "M-VAR": Subject(tiny(), 0)}


def test_both_arms_have_equal_parameters_tokens_and_steps() -> None:
    counts = []
    for recipe in (digit_scales(), m_var_digits()):
        configs = recipe.generator.config.fitted(recipe.tokenizer.config)
        parts = {name: configs[name].build() for name in ("generator", "head")}
        counts.append(sum(p.numel() for part in parts.values() for p in part.parameters()))
    assert abs(counts[1] / counts[0] - 1) < 0.01
    base, variant = digit_scales(), m_var_digits()
    assert base.tokenizer == variant.tokenizer and base.generator.train == variant.generator.train
    assert len(find_experiment("m-var").models()) == 6


def products(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Multiplications and additions in the place of seconds, which would say little of toys."""
    counted = []
    for work in works:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        counted.append(float(counter.get_total_flops()))
    return counted


def test_a_layer_is_measured_over_growing_pictures(
    experiment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "seconds", products)
    found = {name: experiment.growth_across_scales(s, factors=(2, 4, 8)) for name, s in subjects().items()}
    assert found["VAR"] == pytest.approx(2, abs=1e-6) and found["M-VAR"] == pytest.approx(1, abs=0.15)
    assert experiment.exponent([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2)


def test_only_keys_and_values_grow(experiment: ModuleType) -> None:
    sizes = {name: [experiment.megabytes(s, factor) for factor in (1, 2)] for name, s in subjects().items()}
    assert sizes["M-VAR"][0] == sizes["M-VAR"][1] and sizes["VAR"][1] == pytest.approx(4 * sizes["VAR"][0])
    assert all(experiment.picture_seconds(subject, 1) > 0 for subject in subjects().values())


def test_pairs_of_the_published_schedule() -> None:
    measures = {m.name: m.measure for part in find_experiment("m-var").parts for m in part.metrics}
    found = {name: measures["attention pairs"](subject) for name, subject in subjects().items()}
    assert found == {"VAR": 286.434, "M-VAR": 110.468}
    assert all(parameters(subject) > 0 for subject in subjects().values())


def test_a_rule_on_one_arm(experiment: ModuleType) -> None:
    rule = experiment.Below("p", "a", 1.2)
    assert rule({"a": {"p": [1.0, 1.3]}}).holds and not rule({"a": {"p": [1.0, 1.5]}}).holds

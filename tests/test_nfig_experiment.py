"""The experiment of NFIG over toy models: arms are trained alike, every figure of its own is there, rules decide."""

from dataclasses import replace

import pytest
import torch

from varkit.catalog import harness
from varkit.catalog.experiment import Experiment, Part, Subject
from varkit.catalog.harness import PICTURES
from varkit.catalog.models import Trained
from varkit.hub.pipeline import Pipeline
from varkit.tokenizers.frequency import FrequencyVQConfig

LONG = ("FID", "digits read", "seconds")
"""Not measured here: figures that every experiment shares, and large networks."""


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return harness.find_experiment("nfig")


def named(experiment: Experiment, name: str) -> Part:
    (part,) = [part for part in experiment.parts if part.name == name]
    return part


def untrained(model: Trained) -> Pipeline:
    """The model with random weights and narrow convolutions."""
    torch.manual_seed(model.seed)
    recipe = model.recipe if not isinstance(model.tokenizer, Trained) else model.tokenizer.recipe
    own = recipe.tokenizer.config
    tokenizer = replace(own, conv=replace(own.conv, channels=8, groups=4))  # type: ignore[type-var, attr-defined]
    configs = {"tokenizer": tokenizer, **model.recipe.generator.config.fitted(tokenizer)}
    built = {name: config.build() for name, config in configs.items()}
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    built["tokenizer"].initialize_codebook(images, torch.Generator().manual_seed(1))
    return Pipeline(built, configs, model.recipe.generator.settings)


def measured(part: Part, *names: str) -> dict[str, dict[str, float]]:
    """Every short figure of some arms at seed 0."""
    found = {}
    for arm in (arm for arm in part.arms if arm.name in names):
        subject = Subject(arm.apply(untrained(part.model(arm, 0))), 0, arm.options)
        found[arm.name] = {m.name: m.measure(subject) for m in part.metrics if not m.name.startswith(LONG)}
        if part.name == "tokenizers":
            assert subject.kept[PICTURES].shape == (6, 64, 64, 3)
    return found


def test_arms_are_trained_alike(experiment: Experiment) -> None:
    for part in experiment.parts:
        base, *others = [part.model(arm, 0).recipe for arm in part.arms]
        for other in others:
            assert other.dataset == base.dataset and other.tokenizer.loss == base.tokenizer.loss
            assert other.generator.settings == base.generator.settings
            assert other.generator.pictures == base.generator.pictures
            for mine, theirs in ((other.tokenizer, base.tokenizer), (other.generator, base.generator)):
                assert (mine.train, mine.batch_size) == (theirs.train, theirs.batch_size)
            a, b = other.tokenizer.config, base.tokenizer.config
            for name in ("conv", "vocab_size", "code_channels", "schedule", "beta", "rate", "encoder"):
                assert getattr(a, name) == getattr(b, name), name
    rules = [part.model(arm, 0).recipe.tokenizer.config for arm in named(experiment, "tokenizers").arms]
    assert [(r.bands, r.phi) if isinstance(r, FrequencyVQConfig) else "VAR" for r in rules] == [
        "VAR", ("whole", False), ("nested_square", False), ("radial", False),
    ]  # fmt: skip


def test_models_are_shared_and_few(experiment: Experiment) -> None:
    names = [model.recipe.name for model in experiment.models(1)]
    assert sorted(names) == [
        "digit-scales", "digit-scales-larger", "nfig-digits", "photographs-nested_square", "photographs-radial",
        "photographs-var", "photographs-whole",
    ]  # fmt: skip


def test_a_larger_model_is_larger_and_takes_as_many_steps(experiment: Experiment) -> None:
    found = measured(named(experiment, "against a larger VAR"), "larger VAR", "NFIG")
    larger, nfig = found["larger VAR"], found["NFIG"]
    assert larger["evaluations"] == nfig["evaluations"] == 6
    assert 1.7 < larger["parameters"] / nfig["parameters"] < 2.1  # 600M : 310M is 1.94


@pytest.mark.slow
def test_times_are_measured_in_turns(experiment: Experiment) -> None:
    part = named(experiment, "against a larger VAR")
    (metric,) = [metric for metric in part.metrics if metric.name == "seconds at depth 4"]
    larger, nfig = (metric.measure(Subject(None, 0, arm.options)) for arm in part.arms)  # type: ignore[arg-type]
    assert larger > nfig > 0


def test_equal_sizes_are_equal(experiment: Experiment) -> None:
    part = named(experiment, "at equal sizes")
    var, nfig = (untrained(part.model(arm, 0)) for arm in part.arms)
    assert var.configs["generator"] == nfig.configs["generator"]


def test_tokenizers_are_measured(experiment: Experiment) -> None:
    part = named(experiment, "tokenizers")
    (figures,) = measured(part, "NFIG").values()
    assert figures["rFID"] > 0 and -1 <= figures["order of frequencies"] <= 1
    for third in ("low", "mid", "high"):
        assert 0 <= figures[f"kept, {third}"] <= 1 and figures[f"error, {third}"] > 0
    equal = {name: [value] for name, value in figures.items()}
    assert part.rule({"VAR": equal, "NFIG": equal}).holds
    for name, worse in (("rFID", 1.1), ("error, high", 1.1), ("kept, all", 0.9)):
        other = equal | {name: [worse * figures[name]]}
        assert not part.rule({"VAR": equal, "NFIG": other}).holds


def test_the_rule_asks_for_quality_and_speed(experiment: Experiment) -> None:
    rule = experiment.parts[0].rule

    def holds(fid: float, seconds: float) -> bool:
        arms = {"larger VAR": (10.0, 1.0), "NFIG": (fid, seconds)}
        return rule({arm: {"FID": [f], "seconds at depth 12": [s]} for arm, (f, s) in arms.items()}).holds

    assert holds(10.0, 0.79) and not holds(10.1, 0.79) and not holds(9.0, 0.81)

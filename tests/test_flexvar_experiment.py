"""FlexVAR's experiment on models without training: schedules, sizes, what is measured, and that rules name its arms."""

from dataclasses import replace

import pytest
import torch

from experiments import flexvar as experiment
from varkit.catalog.experiment import Subject
from varkit.catalog.measures import EVALUATIONS
from varkit.hub.pipeline import Pipeline
from varkit.train.recipes import Recipe, digit_scales, flexvar_digits


def untrained(recipe: Recipe) -> Pipeline:
    """The recipe's model, smaller, as it is before training but for a head that prefers some codes."""
    own = recipe.tokenizer.config
    tokenizer = replace(own, conv=replace(own.conv, channels=16, groups=4))
    generator = replace(recipe.generator.config, depth=1, width=32, heads=2)
    configs = {"tokenizer": tokenizer} | generator.fitted(tokenizer)
    torch.manual_seed(0)
    parts = {name: config.build() for name, config in configs.items()}
    torch.nn.init.normal_(parts["head"].out.weight)
    torch.nn.init.normal_(parts["tokenizer"].quantizer.embedding.weight)
    return Pipeline(parts, configs, recipe.generator.settings)


@pytest.fixture(scope="module")
def var() -> Pipeline:
    return untrained(digit_scales())


@pytest.fixture(scope="module")
def flexvar() -> Pipeline:
    return untrained(flexvar_digits())


def test_both_sides_are_trained_alike() -> None:
    base, own = digit_scales(), flexvar_digits()
    assert own.generator.train == base.generator.train and own.tokenizer.train == base.tokenizer.train
    assert (own.dataset, own.generator.pictures) == (base.dataset, base.generator.pictures)
    assert abs(parameters(own) / parameters(base) - 1) < 0.05


def parameters(recipe: Recipe) -> int:
    """Of generator and head, as published sizes are told."""
    fitted = recipe.generator.config.fitted(recipe.tokenizer.config)
    built = (fitted[name].build() for name in ("generator", "head"))
    return sum(p.numel() for part in built for p in part.parameters())


def test_var_in_its_own_schedule_is_itself(var: Pipeline) -> None:
    same = experiment.out_of_schedule(var, var.schedule.sides)
    assert same.generate(3, seed=1)[0].tobytes() == var.generate(3, seed=1)[0].tobytes()


def test_var_out_of_its_schedule_takes_the_positions_of_each_size(var: Pipeline) -> None:
    few = experiment.out_of_schedule(var)
    assert [side[0] for side in few.schedule.sides] == [1, 2, 4, 8]
    trained, moved = var.generator, few.generator
    assert torch.equal(moved.position[-64:], trained.position[-64:])
    assert torch.equal(moved.position[5:21], trained.position[14:30])
    assert torch.equal(moved.level.weight, trained.level.weight[[0, 1, 3, 5]])
    few.generate(3)


@pytest.mark.parametrize(("size", "steps"), [("48x48", 8), ("32x24", 6)])
def test_var_is_drawn_at_the_sizes_too(var: Pipeline, size: str, steps: int) -> None:
    """What VAR is given ends at the grid of FlexVAR's size, in as many steps."""
    parts = {part.name: part for part in experiment.EXPERIMENT.parts}
    arms = {arm.name: arm for arm in parts["sizes never trained on"].arms}
    height, width = map(int, size.split("x"))
    (picture,) = arms[f"VAR, {size}"].apply(var).generate(3)
    assert (picture.height, picture.width) == (height, width)
    assert EVALUATIONS.measure(Subject(arms[f"VAR, {size}"].apply(var), 0)) == steps


def test_the_last_scale_is_measured_in_any_schedule(var: Pipeline, flexvar: Pipeline) -> None:
    def measured(pipeline: Pipeline) -> list[float]:
        subject = Subject(pipeline, 0)
        return [metric.measure(subject) for metric in experiment.last_scale(4)]

    assert all(value > 0 for value in measured(experiment.out_of_schedule(var)))
    six, four, eight = (measured(experiment.in_steps(steps)(flexvar)) for steps in (6, 4, 8))
    assert six[1] == four[1] == eight[1]  # the last map alone is the picture
    assert six[0] != four[0]


def test_sizes_are_read(flexvar: Pipeline) -> None:
    for apply in (experiment.in_size(48, 48), experiment.in_size(32, 24)):
        subject = Subject(apply(flexvar), 0)
        assert 0 <= experiment.whole_digits_read(1).measure(subject) <= 1


def test_no_rule_compares_what_cannot_differ() -> None:
    """FlexVAR's reconstruction is the same in every schedule."""
    (part,) = [part for part in experiment.EXPERIMENT.parts if part.name == "schedules never trained in"]
    assert {rule.metric for rule in part.rule.rules} == {"last scale's loss", "FID"}


def test_rules_name_arms_and_metrics_that_there_are() -> None:
    for part in experiment.EXPERIMENT.parts:
        values = {arm.name: {metric.name: [1.0] for metric in part.metrics} for arm in part.arms}
        assert part.rule(values).measured

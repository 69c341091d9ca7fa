"""The experiment for SAR, built and measured with toy models: its arms, its metrics, its charts."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.contracts import CASES
from tests.models import tiny_pipeline, tiny_recipe
from varkit.adapt.finetune import Finetune
from varkit.adapt.sar import SAR
from varkit.catalog import exposure, harness
from varkit.catalog.experiment import Subject
from varkit.catalog.exposure import HEIGHT, WIDTH, chart, exposure_bias, gaps_by_scale, share_of_training
from varkit.generators.conditioning import ClassConfig
from varkit.hub.pipeline import Pipeline, Settings
from varkit.plans.flexible import FlexibleScalesConfig
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.map_vq import MapVQConfig
from varkit.train.lessons import WholePlan
from varkit.train.schedule_lessons import ScheduleLessons


def flexible() -> Pipeline:
    """A random FlexVAR of small digits."""
    case = CASES["flexvar-class"]
    schedule = (1, 2, 3, 4)
    conv = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8, groups=4)
    tokenizer = MapVQConfig(conv, 24, 6, schedule)
    generator = replace(case.generator, condition=ClassConfig(10))
    parts = generator.fitted(tokenizer)
    torch.manual_seed(0)
    configs = {"tokenizer": tokenizer, **parts, "plan": FlexibleScalesConfig(schedule)}
    built = {name: config.build() for name, config in configs.items()}
    return Pipeline(built, configs, Settings(), {"steps": 5, "start": {"steps": 50}})


def subject(kind: str, **options) -> Subject:
    if kind == "flexvar":
        return Subject(flexible(), 0, {"teach": ScheduleLessons, **options})
    pipeline = tiny_pipeline(ClassConfig(10))
    pipeline.about = {"steps": 5, "start": {"steps": 50}}
    return Subject(pipeline, 0, {"teach": WholePlan, **options})


@pytest.mark.parametrize("kind", ["var", "flexvar"])
def test_metrics_of_exposure_agree_and_draw_a_chart(kind: str):
    judged = subject(kind)
    scales = len(judged.pipeline.model.plan.steps)
    gap, teacher = (metric.measure(judged) for metric in exposure_bias("digits", 12))
    each = [metric.measure(judged) for metric in gaps_by_scale("digits", 12, scales)]
    assert len(each) == scales - 1 and min(each) <= gap <= max(each)
    assert teacher == pytest.approx(sum(
        loss * size for loss, size in zip(judged.kept["exposure"].teacher, judged.kept["exposure"].sizes, strict=True)
    ) / sum(judged.kept["exposure"].sizes))  # fmt: skip
    assert judged.kept[harness.PICTURES].shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("kind", ["var", "flexvar"])
def test_the_share_of_training_counts_steps_and_their_time(kind: str):
    cost = share_of_training(SAR(), "digits", 8)
    assert cost.measure(subject(kind, teacher_forced=True)) == pytest.approx(0.1)
    assert 0 < cost.measure(subject(kind)) < 10
    before = subject(kind)
    before.pipeline.about = {"steps": 50}
    assert cost.measure(before) == 1.0


def test_the_time_of_steps_counts_as_often_as_there_are_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exposure, "_ratio_of_steps", lambda subject, method, dataset, n: 2.5)
    assert share_of_training(SAR(), "digits", 8).measure(subject("var")) == pytest.approx(0.25)


def test_charts_share_an_axis():
    low, high = chart((0.0, 0.5, 0.1)), chart((0.0, 1.9, 9.0))
    bars = [(np.abs(c.astype(int) - [70, 110, 180]).sum(axis=2) == 0).sum(axis=0) for c in (low, high)]
    assert bars[1].max() > bars[0].max() and bars[1].max() <= HEIGHT


def test_arms_begin_with_the_same_model_and_differ_in_the_method(monkeypatch: pytest.MonkeyPatch):
    experiment = harness.find_experiment("sar")
    for part in experiment.parts:
        models = {arm.name: arm.model(1) for arm in part.arms}
        starts = {m.start.address if m.start else m.address for m in models.values()}
        assert len(starts) == 1 and len({m.address for m in models.values()}) == len(models)
        trains = {m.recipe.generator.train for m in models.values() if m.start}
        assert len(trains) == 1 and next(iter(trains)).steps == round(1200 / 18)
        assert {m.method for m in models.values() if m.start} >= ({SAR()} if "refined" in models else set())


def test_the_whole_experiment_is_measured_over_toy_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    experiment = harness.find_experiment("sar")
    part = experiment.parts[4]
    toys = {arm.name: partial(subject, "var") for arm in part.arms}
    metrics = (*gaps_by_scale("digits", 8, 3), *exposure_bias("digits", 8))
    arms = tuple(replace(arm, options={"teach": WholePlan}) for arm in part.arms)
    toy = replace(experiment, parts=(replace(part, arms=arms, metrics=metrics, seeds=(0,)),))
    monkeypatch.setattr(harness.Store, "load", lambda self, model: toys["refined"]().pipeline)
    result = harness.reproduce(toy, harness.Store(tmp_path / "store"), tmp_path / "out")
    assert set(result["parts"][0]["arms"]) == {"before", "trained on", "refined", "weight 1"}
    assert (tmp_path / "out" / "sar.png").is_file() and result["holds"] is False  # equal models do not differ


def test_a_recipe_with_minutes_has_no_equal_budget():
    module = harness.find_experiment("sar").parts[0].arms[1].model.func.__globals__  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="counted in steps"):
        module["after"](tiny_recipe(), Finetune(), 0)

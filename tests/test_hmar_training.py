"""Training HMAR (arXiv 2506.04421): weights of scales, masks, both stages of a recipe, and the experiment."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contracts import true_latents
from tests.models import tiny_recipe
from tests.test_contracts import filled
from tests.test_hmar import BATCH, PUBLISHED, REFINED
from varkit.catalog.experiment import Subject
from varkit.catalog.harness import find_experiment
from varkit.catalog.measures import EVALUATIONS
from varkit.catalog.models import Trained
from varkit.data.registry import open_dataset
from varkit.errors import UserError
from varkit.generators.hmar import HMARConfig
from varkit.generators.var import VARConfig
from varkit.hub.pipeline import Settings, load
from varkit.plans.refined import MASK
from varkit.plans.scale_weights import scale_weights, token_weights
from varkit.train.loop import load_run
from varkit.train.masked_scales import FirstGuesses, MaskedScales
from varkit.train.objective import NextStepLoss
from varkit.train.recipes import digit_scales, hmar_digits
from varkit.train.run import Request, train_recipe
from varkit.train.task import TrainConfig


def test_loss_weights_are_the_published_ones():
    published = [0.0247, 0.0642, 0.1150, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709]
    found = scale_weights("lognorm", PUBLISHED)
    assert torch.allclose(found, torch.tensor(published, dtype=torch.float64), atol=5e-5)
    for kind in ("lognorm", "equal", "none"):
        each = token_weights(kind, PUBLISHED)
        assert each.sum().item() == pytest.approx(1, abs=1e-12) and len(each) == 680
        assert torch.allclose(
            torch.stack([p.sum() for p in each.split(PUBLISHED.lengths)]), scale_weights(kind, PUBLISHED)
        )
    assert torch.allclose(token_weights("none", PUBLISHED), torch.full((680,), 1 / 680, dtype=torch.float64))
    with pytest.raises(UserError, match="lognormal"):
        scale_weights("lognormal", PUBLISHED)


def test_the_training_loss_is_the_weighed_sum():
    tokenizer, model = REFINED.build()
    latents, condition = true_latents(tokenizer, model, BATCH), {"label": torch.arange(BATCH)}
    objective = NextStepLoss(model.generator, model.heads["main"], condition_drop=0.0)
    lesson = FirstGuesses(tokenizer, model.plan).lesson(latents, 0)
    with torch.no_grad():
        losses = objective.losses(lesson, condition)
        expected = (losses * token_weights("lognorm", model.plan.schedule)).sum(dim=1).mean()
        assert objective(lesson, condition).item() == pytest.approx(expected.item(), rel=1e-5)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.floats(0, 1), st.integers(0, 9))
def test_masks_cover_each_scale_but_the_first_alike(share, seed):
    tokenizer, model = REFINED.build()
    schedule = model.plan.schedule
    masked = MaskedScales(tokenizer, model.plan).masked(4, share, torch.Generator().manual_seed(seed))
    for row in masked:
        counted = torch.bincount(schedule.level_of[row], minlength=len(schedule)).tolist()
        assert counted == [0, *(max(1, -int(-share * n // 1)) for n in schedule.lengths[1:])]
        assert len(row.unique()) == len(row)


def test_masks_differ_between_samples_and_held_out_ones_never():
    tokenizer, model = REFINED.build()
    lessons = MaskedScales(tokenizer, model.plan)
    latents = true_latents(tokenizer, model, 4)
    half = lessons.masked(4, 0.5, torch.Generator().manual_seed(0))
    assert not torch.equal(half[0].sort().values, half[1].sort().values)
    assert torch.equal(lessons.lesson(latents).step.target, lessons.lesson(latents).step.target)


def test_masked_tokens_are_hidden_from_their_own_place_alone():
    """A masked code reaches its neighbours through bicubic and phi, as published, and its own row not at all."""
    tokenizer, model = REFINED.build()
    masked = torch.tensor([[5 + 2]])
    latents = true_latents(tokenizer, model, 1)
    changed = {"ids": latents["ids"].clone()}
    changed["ids"][0, 7] = (changed["ids"][0, 7] + 1) % 24
    step = model.plan.masked(masked)
    with torch.no_grad():
        rows = [
            model.generator.shown(filled(tokenizer, x).feed(step.feed), step)[0, 5:11]
            for x in (latents, changed)
        ]
    differs = (rows[0] != rows[1]).any(dim=-1)
    assert not bool(differs[2]) and bool(differs.any())


def test_the_refining_branch_starts_as_the_other():
    tokenizer, model = REFINED.build()
    generator = model.generator
    trained = generator.branch_off()
    names = {id(p) for p in trained}
    assert {n.partition(".")[0] for n, p in generator.named_parameters() if id(p) in names} == {
        "mask_blocks", "mask_modulation", "mask_embed",
    }  # fmt: skip
    for mine, other in zip(
        generator.mask_blocks.parameters(), generator.main_blocks.parameters(), strict=True
    ):
        assert torch.equal(mine, other) and mine is not other


def tiny_recipe_of_two_stages():
    """The digits of tests/models.py, for as few steps as can be."""
    base, recipe = tiny_recipe(), hmar_digits()
    train, tokens = (
        TrainConfig(steps=2, validate_every=2),
        replace(base.tokenizer, train=TrainConfig(steps=1)),
    )
    told = vars(base.generator.config)
    assert recipe.generator.further is not None
    further = replace(recipe.generator.further, train=train, batch_size=4)
    config = HMARConfig(**(told | {"depth": 3}), mask_depth=1)
    generator = replace(
        base.generator,
        config=config,
        train=train,
        teach=recipe.generator.teach,
        further=further,
        condition_drop=0.0,
    )
    return replace(base, name="tiny-hmar", tokenizer=tokens, generator=generator)


def test_both_stages_train_and_the_second_leaves_the_first_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("varkit.train.run.HELD_OUT", 8)
    recipe = tiny_recipe_of_two_stages()
    request = Request("tiny-hmar", seed=1)
    train_recipe(request, recipe, open_dataset("digits"), tmp_path / "run", say=lambda text: None)
    first, model = load_run(tmp_path / "run" / "generator"), load(tmp_path / "run")
    own, moved = model.generator.state_dict(), ("mask_blocks", "mask_modulation", "mask_embed")
    for name, tensor in first["generator"].items():
        assert torch.equal(own[name], tensor) is not name.startswith(moved), name
    assert all(torch.equal(model.model.heads["main"].state_dict()[n], t) for n, t in first["head"].items())
    assert not torch.equal(model.model.heads[MASK].out.weight, first["head"]["out.weight"])
    assert {"loss", "refinement_loss"} <= model.about["metrics"].keys()
    (tmp_path / "run" / "refinement" / "DONE").unlink()
    train_recipe(
        request, recipe, open_dataset("digits"), tmp_path / "run", resume=True, say=lambda text: None
    )
    again = load(tmp_path / "run").generator.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in own.items())


def test_the_recipe_shares_the_bases_steps_between_its_stages():
    base, recipe = digit_scales().generator, hmar_digits().generator
    assert recipe.further is not None
    assert recipe.train.steps + recipe.further.train.steps == base.train.steps
    assert all(getattr(recipe.config, f.name) == getattr(base.config, f.name) for f in fields(VARConfig))
    assert Trained(hmar_digits()).address != Trained(digit_scales()).address


def test_the_experiment_is_measured_with_toys(monkeypatch):
    experiment = find_experiment("hmar")
    quality, refinement, cost = experiment.parts
    pipeline = REFINED.pipeline(Settings(guidance=2.0))
    counted = [EVALUATIONS.measure(Subject(arm.apply(pipeline), 0)) for arm in refinement.arms]
    assert counted == [4.0, 5.0, 5.0]  # of this pyramid only the 2 x 2 scale is refined
    base, whole, one_shot = quality.arms
    used = [
        quality.metrics[1].measure(Subject(arm.apply(REFINED.pipeline(Settings())), 0))
        for arm in (whole, one_shot)
    ]
    branch = list(pipeline.generator.branch_off()) + list(pipeline.model.heads[MASK].parameters())
    assert used[0] - used[1] == pytest.approx(sum(p.numel() for p in branch) / 1e6)
    functions = cost.metrics[0].measure.__globals__
    monkeypatch.setitem(functions["SIDES"], 256, (1, 2, 3))
    monkeypatch.setitem(functions, "WIDTH", 32)
    values = {
        arm.name: {m.name: [m.measure(Subject(pipeline, 0, arm.options))] for m in cost.metrics}
        for arm in cost.arms[:2]
    }
    assert set(values) == {"VAR 256", "HMAR 256"} and all(
        v > 0 for own in values.values() for (v,) in own.values()
    )
    work = functions["work"]
    kept = {name: work(name, (1, 2, 3), train=False).carried() for name in ("VAR", "HMAR")}
    assert kept == {
        "VAR": 1e-6 * 2 * 8 * 2 * 14 * 32 * 4,
        "HMAR": 0,
    }  # k, v; layers; branches; slots; width; bytes
    timed = work("HMAR", (1, 2, 3), train=True)
    assert (timed.generator.depth, timed.generator.mask_depth) == (8, 4)
    assert timed.plan.counts[1] == (1, 3)
    assert "FID" in str(quality.rule)

"""Training scales apart (MVAR): which come when, what their losses add up to, and going on from VAR's weights."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contracts import CASES, true_latents
from tests.models import SCHEDULE, tiny_recipe, train_tiny
from varkit.catalog.models import Trained
from varkit.data.registry import open_dataset
from varkit.errors import UserError
from varkit.hub.pipeline import load
from varkit.plans.scales import ScalesConfig, Windows
from varkit.train.mixed_scales import MixedScales
from varkit.train.objective import NextStepLoss
from varkit.train.recipes import Recipe, digit_scales, markov_digits, markov_digits_mixed
from varkit.train.run import Request, train_recipe

CASE = CASES["var-markov"]


def lessons(**settings):
    tokenizer, model = CASE.build(torch.float64)
    return model, MixedScales(tokenizer, model.plan, **settings), true_latents(tokenizer, model, 3)


def test_a_round_is_the_coarse_scales_k_times_and_each_fine_one_once():
    _, mixed, latents = lessons(coarse=8, alone=2)
    sizes = [len(mixed.lesson(latents, step).step.target) for step in range(20)]
    assert sizes == 2 * ([1 + 4] * 8 + [6, 24])
    targets = torch.cat([mixed.lesson(latents, step).step.target for step in (0, 8, 9)])
    assert torch.equal(targets, torch.arange(35))
    assert Counter(len(mixed.lesson(latents).step.target) for _ in range(2)) == {35: 2}


@pytest.mark.parametrize("settings", [{}, {"coarse": 1, "alone": 3}, {"coarse": 5, "alone": 1}])
def test_a_rounds_mean_loss_is_that_of_all_tokens_alike(settings: dict):
    """The gradient too: mixed training has the expected objective of packed training (losses are float32)."""
    model, mixed, latents = lessons(**settings)
    objective = NextStepLoss(model.generator, model.heads["main"], condition_drop=0.0)
    condition = {k: v[0] for k, v in CASE.conditions(3).items()}
    parameter = model.generator.blocks[0].ffn.up.weight
    found = []
    for steps in (range(len(mixed.round)), [None]):
        losses = torch.stack([objective(mixed.lesson(latents, step), condition) for step in steps])
        found.append((losses.mean(), *torch.autograd.grad(losses.mean(), parameter)))
    for one, twin in zip(*found, strict=True):
        assert torch.allclose(one, twin, rtol=1e-5, atol=1e-7)


def test_the_papers_alternation_has_the_mean_of_each_steps_own_targets():
    model, mixed, latents = lessons(match_paper=True)
    objective = NextStepLoss(model.generator, model.heads["main"], condition_drop=0.0)
    condition = {k: v[0] for k, v in CASE.conditions(3).items()}
    each = objective.losses(mixed.lesson(latents), condition)
    for step, part in ((0, each[:, :5]), (8, each[:, 5:11]), (9, each[:, 11:])):
        assert torch.allclose(
            objective(mixed.lesson(latents, step), condition).double(), part.mean().double(), rtol=1e-5
        )


def test_what_cannot_be_trained_apart_is_refused():
    tokenizer, model = CASES["var-class"].build()
    with pytest.raises(UserError, match="set its history to 0"):
        MixedScales(tokenizer, model.plan)
    with pytest.raises(UserError, match="1 to 3 fine scales"):
        lessons(alone=4)


def test_the_recipes_differ_from_their_base_in_the_plan_alone():
    base, packed, mixed = digit_scales(), markov_digits(), markov_digits_mixed()
    for recipe in (packed, mixed):
        assert recipe.tokenizer == base.tokenizer
        assert replace(recipe.generator, parts={}, teach=base.generator.teach) == base.generator
    plan = packed.generator.parts["plan"].build()
    assert [isinstance(step.sees.own, str) for step in plan.steps] == [True] * 4 + [False] * 2


def markov(**changes) -> Recipe:
    base = tiny_recipe()
    plan = ScalesConfig(SCHEDULE, history=0, windows=Windows(1, least=3))
    return replace(
        base, name="tiny-markov", generator=replace(base.generator, parts={"plan": plan}, **changes)
    )


@pytest.fixture(scope="module")
def var(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained VAR."""
    return train_tiny(tmp_path_factory.mktemp("trained") / "var")


def test_mvar_goes_on_from_vars_weights(var: Path, tmp_path: Path):
    """The same parameters: after no step worth the name, the weights are those it began with; and it draws."""
    slow = markov(train=replace(tiny_recipe().generator.train, lr=1e-12), teach=MixedScalesOfTwo)
    request = Request("tiny-markov", steps=2, start=str(var))
    train_recipe(request, slow, open_dataset("digits"), tmp_path / "markov", say=lambda text: None)
    base, mvar = load(var), load(tmp_path / "markov")
    for part in ("tokenizer", "generator", "head"):
        theirs = base.parts[part].state_dict()
        assert all(torch.allclose(v, theirs[k], atol=1e-9) for k, v in mvar.parts[part].state_dict().items())
    assert mvar.configs["plan"] == slow.generator.parts["plan"]
    assert len(mvar.generate([1, 2], seed=0)) == 2
    told = json.loads((tmp_path / "markov" / "generator" / "config.json").read_text())
    assert "MixedScales" in json.dumps(told)


class MixedScalesOfTwo(MixedScales):
    """A short round."""

    def __init__(self, tokenizer, plan) -> None:
        super().__init__(tokenizer, plan, coarse=1, alone=1)


def test_from_brings_its_own_tokenizer_and_must_fit(var: Path, tmp_path: Path):
    with pytest.raises(UserError, match="both --from a and --tokenizer b"):
        Request("digits", tokenizer="b", start="a")
    deeper = markov(config=replace(tiny_recipe().generator.config, depth=3))
    with pytest.raises(UserError, match="the generator of .* does not fit"):
        train_recipe(
            Request("tiny-markov", start=str(var)), deeper, open_dataset("digits"), tmp_path / "out",
            say=lambda text: None,
        )  # fmt: skip


def test_models_that_go_on_need_those_they_begin_with():
    base = Trained(tiny_recipe())
    tuned = Trained(markov(), start=Trained(tiny_recipe(), 1, tokenizer=base))
    assert tuned.needs == [base, tuned.start]
    assert tuned.address != Trained(markov()).address

"""LlamaGen: sizes, positions, prompts as prefixes, guidance: the sheet's checks 1 to 5."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.contracts import CASES, start, true_latents
from tests.test_contracts import filled, force, forced
from varkit.decode.guidance import Guidance, until
from varkit.decode.loop import Model, run
from varkit.decode.state import Options, State
from varkit.errors import UserError
from varkit.generators.base import Condition
from varkit.generators.conditioning import ClassConfig, drop_condition
from varkit.generators.llamagen import SIZES, LlamaGenConfig
from varkit.generators.text import TextFeaturesConfig
from varkit.heads.base import Ask
from varkit.hub.pipeline import Pipeline, Settings
from varkit.hub.states import build_empty
from varkit.nn.attention import Packed, View, narrowed
from varkit.nn.rope import Rotary, rotary_angles
from varkit.plans.raster import RasterConfig
from varkit.tokenizers.vq import VQConfig
from varkit.train.lessons import WholePlan
from varkit.train.objective import NextStepLoss

BASE = CASES["llamagen-zero-prefix"]
TEXT = TextFeaturesConfig(width=6, length=5)
FEATURES = replace(
    BASE, generator=replace(BASE.generator, condition=TEXT), plan=RasterConfig((3, 4), prefix=TEXT.length)
)
"""A tiny model of the released kind for prompts: zero prefix, features from outside."""


def prompts(*lengths: int, tokens: int = TEXT.length, seed: int = 0) -> Condition:
    """Features of prompts, (1, B, T, D), padded on the right with noise; a prompt's own are the same for any T."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(1, len(lengths), TEXT.length, TEXT.width, generator=generator)
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return {"features": whole[:, :, :tokens], "mask": mask[None]}


# Check 1: sizes


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("B", 110_888_448),
        ("L", 342_910_976),
        ("XL", 774_699_520),
        ("XXL", 1_410_972_672),
        ("XXXL", 3_893_027_840),
        ("1B", 1_199_616_000),
        ("3B", 3_096_659_200),
        ("7B", 6_614_589_440),
    ],
)
def test_released_sizes_have_the_published_parameters(size: str, parameters: int):
    parts = LlamaGenConfig.published(size).fitted(VQConfig())
    built = [build_empty(parts[name].build) for name in ("generator", "head")]
    assert sum(p.numel() for part in built for p in part.parameters()) == parameters
    assert parts["plan"] == RasterConfig((16, 16), prefix=1)


def test_a_prompt_takes_the_place_of_the_class_table():
    config = LlamaGenConfig.published("B", condition=TextFeaturesConfig(length=120))
    generator = build_empty(config.build)
    count = sum(p.numel() for p in generator.conditioner.parameters())
    assert count == 2048 * 768 + 768 * 768, "what asks for nothing is fixed, so it is no parameter"
    assert generator.state_dict()["conditioner.null_features"].shape == (120, 2048)
    assert config.fitted(VQConfig(grid=(24, 24)))["plan"] == RasterConfig((24, 24), prefix=120)


def test_all_sizes_are_in_the_table():
    assert len(SIZES) == 8 and {w // h for _, w, h in SIZES.values()} == {64, 100, 128}


# Check 2: cached decoding of masked prompts


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_cached_steps_equal_one_pass_over_all_for_masked_prompts(dtype: torch.dtype, bound: float):
    tokenizer, model = FEATURES.build(dtype)
    latents = true_latents(tokenizer, model, 3)
    state = start(tokenizer, model, prompts(5, 2, 0))
    cached = torch.cat(force(model, state, latents), dim=1)
    whole = model.plan.training_step()
    with torch.no_grad():
        window = Packed(whole.sees.own, branches=2)
        h = model.generator(filled(tokenizer, latents).feed(whole.feed), whole, state.prepared, window)
    assert (h - cached)[:, TEXT.length - 1 :].abs().max() <= bound * cached.std()


def test_the_mask_is_the_published_one():
    """Causal and valid columns, with the diagonal forced to 1; all slots of the picture are valid."""
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    causal = torch.ones(8, 8).tril()
    columns = torch.cat([valid, torch.ones(2, 3, dtype=torch.bool)], dim=1)
    expected = (causal * columns[:, None]) * (1 - torch.eye(8)) + torch.eye(8)
    slots = torch.arange(8)
    assert torch.equal(narrowed(causal.bool(), ~valid, slots, slots)[:, 0], expected.bool())
    later = narrowed(None, ~valid, slots, torch.tensor([7]))
    assert torch.equal(later[:, 0], expected[:, 7:].bool())


@pytest.mark.parametrize("name", ["llamagen-text", "features"])
def test_samples_at_different_steps_keep_their_own_masks(name: str):
    """The cache's general path, where keys stand at slots of their own for each sample."""
    case = FEATURES if name == "features" else CASES[name]
    condition = prompts(1, 4) if name == "features" else case.conditions(2)
    tokenizer, model = case.build()
    latents = true_latents(tokenizer, model, 2)
    straight = force(model, start(tokenizer, model, condition), latents)
    ahead, behind = (start(tokenizer, model, condition).select([i]) for i in (0, 1))
    next(forced(model, ahead, {k: v[:1] for k, v in latents.items()}))
    merged = State.concat([ahead, behind])
    mixed = model.plan.next_step(merged)
    assert mixed is not None and mixed.feed.ids.ndim == 2, "one feeds a token, the other its prompt"
    with torch.no_grad():
        window = merged.cache.open(mixed, merged.cursor)
        h = model.generator(merged.canvas.feed(mixed.feed), mixed, merged.prepared, window)
    assert torch.allclose(h[[0, 2], 0], straight[1][[0, 2], 0], atol=1e-5)
    assert torch.allclose(h[[1, 3]], straight[0][[1, 3]], atol=1e-5)


# Prompts


def test_a_prompt_alone_equals_the_prompt_in_a_batch_however_it_is_padded():
    tokenizer, model = FEATURES.build(torch.float64)
    latents = {k: v[:1].repeat(3, 1) for k, v in true_latents(tokenizer, model, 1).items()}
    condition = {k: v.double() if v.is_floating_point() else v for k, v in prompts(5, 2, 3).items()}
    together = force(model, start(tokenizer, model, condition), latents)
    for b, length in ((1, 2), (2, 3)):
        own = {k: v[:, b : b + 1, :length] for k, v in condition.items()}
        left = {
            k: torch.cat([torch.ones_like(v[:, :, :1]) * (k != "mask"), v], dim=2) for k, v in own.items()
        }
        left["mask"] = left["mask"].bool()
        one = {k: v[b : b + 1] for k, v in latents.items()}
        for given_as in (own, left):
            alone = force(model, start(tokenizer, model, given_as), one)
            for whole, part in zip(together, alone, strict=True):
                assert (whole[[b, 3 + b], -1] - part[:, -1]).abs().max() <= 1e-9 * whole.std()


def test_padding_has_no_say_and_every_word_has():
    tokenizer, model = FEATURES.build()
    latents = true_latents(tokenizer, model, 1)

    def last(features: Tensor) -> Tensor:
        condition = prompts(3) | {"features": features}
        return force(model, start(tokenizer, model, condition, guidance=1.0), latents)[-1]

    features = prompts(3)["features"]
    before = last(features)
    for token in range(TEXT.length):
        changed = features.clone()
        changed[:, :, token] += 1
        assert torch.equal(last(changed), before) == (token >= 3), token


def test_asking_for_nothing_keeps_the_mask_and_takes_the_slots_of_the_prompt():
    conditioner = FEATURES.generator.build().conditioner
    condition = {k: v[0] for k, v in prompts(2, 5, tokens=5).items()}
    null = conditioner.null(condition)
    assert torch.equal(null["mask"], condition["mask"])
    _, prefix, valid = conditioner(null)
    assert valid.tolist() == [[False] * 3 + [True] * 2, [True] * 5]
    published = conditioner.project(conditioner.null_features)
    assert torch.allclose(prefix[0, 3:], published[3:]) and torch.allclose(prefix[1], published)
    tight = {k: v[:1, :2] for k, v in condition.items()}
    assert torch.equal(conditioner.null(tight)["features"][0], conditioner.null_features[3:])


def test_prompts_are_dropped_in_training_sample_by_sample():
    conditioner = FEATURES.generator.build().conditioner
    condition = {k: v[0] for k, v in prompts(*[3] * 64).items()}
    torch.manual_seed(0)
    dropped = drop_condition(conditioner, condition, 0.5)
    null = conditioner.null(condition)["features"]
    is_null = (dropped["features"] == null).all(-1).all(-1)
    is_own = (dropped["features"] == condition["features"]).all(-1).all(-1)
    assert bool((is_null ^ is_own).all()) and 10 < int(is_null.sum()) < 54


def test_features_that_do_not_fit_and_words_are_one_line_each():
    pipeline = FEATURES.pipeline(Settings(guidance=2.0))
    wide = {"features": torch.zeros(1, 1, 3, 7), "mask": torch.ones(1, 1, 3, dtype=torch.bool)}
    long = {"features": torch.zeros(1, 1, 9, 6), "mask": torch.ones(1, 1, 9, dtype=torch.bool)}
    for settings in (Settings(guidance=2.0), Settings()):
        with pytest.raises(UserError, match="features of 7 channels do not fit this model, which takes 6"):
            pipeline.start_from(wide, 0, [0], settings)
        with pytest.raises(UserError, match="a prompt of 9 tokens is too long; this model reads up to 5"):
            pipeline.start_from(long, 0, [0], settings)
    with pytest.raises(
        UserError, match="'a red ring' cannot be read: this model takes features of 6 channels"
    ):
        pipeline.start(["a red ring"])


def test_features_draw_pictures_and_survive_a_folder(tmp_path):
    pipeline = FEATURES.pipeline(Settings(guidance=2.0))
    pipeline.save(tmp_path / "model")
    loaded = Pipeline.from_folder(tmp_path / "model")
    assert loaded.configs == pipeline.configs
    drawn = [
        run(p.model, p.start_from(prompts(4, 1), 0, [0, 1], p.settings)).canvas.latents()["ids"]
        for p in (pipeline, loaded)
    ]
    assert torch.equal(drawn[0], drawn[1])


# Check 3: guidance


@dataclass
class Recorder:
    """A picker that notes the guided logits and goes on with given ids (B, L)."""

    ids: Tensor
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, logits: Tensor, ask: Ask) -> dict[str, Tensor]:
        self.seen.append(logits.clone())
        return {"ids": self.ids[:, ask.step.target]}


def guided_logits(guidance: Guidance, equal: bool = False) -> Tensor:
    """The guided logits of each step on the same ids, (steps, B, V); with `equal`, the null condition is the own."""
    tokenizer, model = FEATURES.build()
    recorder = Recorder(true_latents(tokenizer, model, 2)["ids"])
    state = start(tokenizer, model, prompts(5, 3), guidance=1.0 if guidance.off else 2.0)
    if equal:
        state.prepared = {k: v[:1].expand(2, *v.shape[1:]).clone() for k, v in state.prepared.items()}
    state.options = Options(guidance, recorder)
    run(model, state)
    return torch.stack(recorder.seen).squeeze(2)


def test_guidance_of_1_and_an_equal_null_change_nothing():
    off = guided_logits(Guidance(1.0))
    assert torch.allclose(guided_logits(Guidance(3.0), equal=True), off, atol=1e-6)
    assert not torch.allclose(guided_logits(Guidance(3.0)), off, atol=1e-2)


def test_guidance_may_end_early():
    """cfg_interval 0: the prompt's step and the one behind it are guided, all others exactly conditional."""
    scales = until(3.0, last=1, steps=12)
    assert scales == (3.0, 3.0) + (1.0,) * 10
    early, always = guided_logits(Guidance(scales)), guided_logits(Guidance(3.0))
    conditional = guided_logits(Guidance((1.0,) * 11 + (2.0,)))
    assert torch.allclose(early[:2], always[:2], atol=1e-6)
    assert not torch.allclose(early[:2], conditional[:2], atol=1e-2)
    assert torch.equal(early[2:-1], conditional[2:-1])
    assert not torch.allclose(early[2:], always[2:], atol=1e-2)
    with pytest.raises(UserError, match="guidance cannot end at step 12; a run of 12 steps has 0 to 11"):
        until(3.0, last=12, steps=12)


# Check 4: positions


class Seeing:
    """A window that notes queries and keys."""

    def __init__(self, window: Packed) -> None:
        self.window, self.q, self.k = window, torch.empty(0), torch.empty(0)

    def views(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[View]:
        self.q, self.k = q, k
        return list(self.window.views(layer, q, k, v))

    def narrow(self, hidden: Tensor, ids: Tensor) -> "Seeing":
        self.window = self.window.narrow(hidden, ids)
        return self


@pytest.mark.parametrize("zero", [True, False])
def test_queries_and_keys_of_the_prefix_vanish_in_released_models(zero: bool):
    case = replace(FEATURES, generator=replace(FEATURES.generator, zero_prefix=zero))
    tokenizer, model = case.build()
    whole = model.plan.training_step()
    window = Seeing(Packed(whole.sees.own))
    fed = filled(tokenizer, true_latents(tokenizer, model, 2)).feed(whole.feed)
    model.generator(fed, whole, model.generator.prepare(prompts(5, 2)), window)
    prefix = [x[:, :, : TEXT.length] for x in (window.q, window.k)]
    assert all(bool((x == 0).all()) == zero for x in prefix)
    assert all(bool((x[:, :, TEXT.length :] != 0).any()) for x in (window.q, window.k))


offsets = st.tuples(st.integers(-20, 20), st.integers(-20, 20))
places = st.tuples(st.integers(0, 40), st.integers(0, 40))


@given(places, places, offsets, st.integers(0, 99))
def test_scores_depend_on_the_offset_alone(a, b, move, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)

    def score(at, to):
        turned = [
            Rotary(rotary_angles(torch.tensor([place]), 16).double())(x) for place, x in ((at, q), (to, k))
        ]
        return (turned[0] * turned[1]).sum()

    moved = tuple(tuple(p + m for p, m in zip(place, move, strict=True)) for place in (a, b))
    assert torch.allclose(score(a, b), score(*moved), atol=1e-3)


def test_rows_turn_the_first_half_of_the_pairs_and_columns_the_second():
    angles = rotary_angles(torch.tensor([[3, 0], [0, 3]]), 16)
    frequencies = 10000 ** (-torch.arange(0, 8, 2) / 8)
    assert torch.allclose(angles[0], torch.cat([3 * frequencies, torch.zeros(4)]))
    assert torch.allclose(angles[1], torch.cat([torch.zeros(4), 3 * frequencies]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_by_complex_numbers_is_rotating(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    coords, blank = torch.rand(2, 5, 2), torch.rand(2, 5) < 0.3
    rotary = Rotary(rotary_angles(coords, 16), blank)
    q = torch.randn(2, 5, 3, 16).to(dtype).transpose(1, 2).requires_grad_()
    ours, plain = rotary(q), rotary.plainly(q)
    torch.testing.assert_close(ours, plain)
    assert not ours[blank[:, None].expand(2, 3, 5)].any()
    outer = torch.randn_like(ours)
    pair = [torch.autograd.grad(out, q, outer)[0] for out in (ours, plain)]
    torch.testing.assert_close(*pair)


# Check 5: the start


@pytest.mark.parametrize("condition", [ClassConfig(5), TEXT])
def test_the_loss_begins_at_the_logarithm_of_the_vocabulary(condition):
    config = replace(BASE.generator, condition=condition)
    tokenizer = BASE.tokenizer.build()
    parts = config.fitted(BASE.tokenizer)
    model = Model(parts["plan"].build(), parts["generator"].build(), {"main": parts["head"].build()})
    lesson = WholePlan(tokenizer, model.plan).lesson(true_latents(tokenizer, model, 3))
    told = {"label": torch.arange(3)[None]} if condition == ClassConfig(5) else prompts(5, 3, 1)
    given_as = {k: v[0] for k, v in told.items()}
    loss = NextStepLoss(model.generator, model.heads["main"], condition_drop=0.0)(lesson, given_as)
    assert abs(loss.item() - math.log(24)) < 1e-5


def test_weights_begin_as_published():
    torch.manual_seed(0)
    generator = replace(BASE.generator, width=256, heads=4, condition=TextFeaturesConfig(64, 40)).build()
    for name, p in generator.named_parameters():
        if p.ndim == 2 and p.numel() > 4000:
            assert abs(p.std().item() / 0.02 - 1) < 0.1, name
    null = generator.conditioner.null_features
    assert abs(null.std().item() * 8 - 1) < 0.1, "fixed noise of std 1 / sqrt(D)"

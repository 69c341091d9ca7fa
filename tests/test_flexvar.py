"""FlexVAR (arXiv 2502.20313): maps by themselves, positions on any grid, a schedule for each training step."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.contracts import CASES, labels, start
from tests.test_contracts import force
from varkit.data.registry import open_dataset
from varkit.decode.loop import Model, decode, run
from varkit.decode.state import State
from varkit.errors import UserError
from varkit.generators.conditioning import ClassConfig
from varkit.generators.flexvar import FlexVARConfig, waves
from varkit.nn.attention import Packed
from varkit.plans.flexible import (
    PUBLISHED,
    PUBLISHED_512,
    FlexibleScalesConfig,
    ramp,
    sides_of,
    spread,
)
from varkit.plans.schedule import Schedule
from varkit.tokenizers.conv import ConvConfig
from varkit.tokenizers.map_vq import MapVQ, MapVQConfig
from varkit.train.map_task import MapTask
from varkit.train.objective import NextStepLoss
from varkit.train.schedule_lessons import ScheduleLessons, ScheduleSampler
from varkit.train.tokenizer_loss import TokenizerLossConfig

REFERENCE = Path(__file__).parent / "reference"
CASE = CASES["flexvar-class"]
CONV = ConvConfig(channels=8, multipliers=(1, 2), res_blocks=1, latent_channels=8, attention=False, groups=4)

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def growing(sides: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Each side at least as large as those before it."""
    return tuple(
        (max(h for h, _ in sides[:k]), max(w for _, w in sides[:k])) for k in range(1, len(sides) + 1)
    )


schedules = st.lists(grids, min_size=1, max_size=5).map(growing)


def tokenizer(schedule=(1, 2, 3, 4), **changes) -> MapVQ:
    torch.manual_seed(0)
    built = MapVQConfig(CONV, vocab_size=24, code_channels=6, schedule=schedule, **changes).build().eval()
    torch.nn.init.normal_(built.quantizer.embedding.weight)
    return built


def over(schedule) -> tuple[MapVQ, Model]:
    """The case's weights over another schedule."""
    tokenizer, model = CASE.build(torch.float64)
    tokenizer.schedule = Schedule.parse(schedule)
    return tokenizer, Model(FlexibleScalesConfig(schedule).build(), model.generator, model.heads)


# The tokenizer


def test_each_map_is_quantised_by_itself():
    made = tokenizer((1, 2, (3, 4)))
    images = torch.rand(2, 3, 6, 8) * 2 - 1
    ids = made.encode(images)["ids"]
    f = made.encode_features(images)
    for level, side in enumerate(made.schedule.sides):
        pooled = F.adaptive_avg_pool2d(f, side)
        codes = F.normalize(made.quantizer.embedding.weight, dim=-1)
        similar = torch.einsum("bdhw,vd->bhwv", F.normalize(pooled, dim=1), codes)
        assert torch.equal(ids[:, made.schedule.positions(level)], similar.argmax(-1).flatten(1))


def test_every_map_decodes_at_its_own_size_and_previews_at_the_whole():
    made = tokenizer((1, 2, (3, 4)))
    latents = {"ids": torch.randint(0, 24, (2, 17))}
    for level, (h, w) in enumerate(made.schedule.sides):
        own = made.decode_map(latents["ids"][:, made.schedule.positions(level)], (h, w))
        assert own.shape == (2, 3, 2 * h, 2 * w)
        shown = made.decode(latents, levels=level + 1)
        assert shown.shape == (2, 3, 6, 8)
        assert torch.equal(shown, F.interpolate(own, (6, 8), mode="bicubic").clamp(-1, 1)) or (h, w) == (3, 4)
    assert torch.equal(shown, own)


def test_the_picture_depends_on_the_last_map_alone():
    tokenizer, model = over((1, 2, (3, 4), (4, 6)))
    state = run(model, start(tokenizer, model, labels(2)))
    picture = state.canvas.preview()
    ids, last = state.canvas.latents()["ids"].clone(), tokenizer.schedule.offsets[-2]
    changed = tokenizer.canvas(2)
    changed.fill({"ids": torch.cat([(ids[:, :last] + 1) % 24, ids[:, last:]], dim=1)})
    assert torch.equal(changed.preview(), picture)
    assert torch.equal(tokenizer.decode({"ids": ids}), picture)
    changed.fill({"ids": torch.cat([ids[:, :last], (ids[:, last:] + 1) % 24], dim=1)})
    assert not torch.equal(changed.preview(), picture)


def test_the_canvas_feeds_the_map_before_enlarged():
    made = tokenizer((1, 2, (3, 4)))
    ids = torch.randint(0, 24, (2, 17))
    canvas = made.canvas(2)
    canvas.fill({"ids": ids})
    step = FlexibleScalesConfig(made.schedule.sides).build().steps[2]
    before = made.quantizer.lookup(ids[:, 1:5]).mT.reshape(2, 6, 2, 2)
    wanted = F.interpolate(before, (3, 4), mode="bicubic").flatten(2).mT
    assert torch.equal(canvas.feed(step.feed)["vectors"], wanted)


def test_previews_of_samples_at_different_maps():
    tokenizer, model = over((1, 2, (3, 4), (4, 6)))
    state = start(tokenizer, model, labels(1))
    states = [state.select([0])]
    for _ in decode(model, state):
        states.append(state.select([0]))
    mixed = State.concat([states[3], states[1], states[0]]).canvas.preview()
    alone = torch.cat([states[k].canvas.preview() for k in (3, 1, 0)])
    assert torch.allclose(mixed, alone, atol=1e-9)


def test_gradients_of_training_maps_reach_encoder_codes_and_decoder():
    made = tokenizer().train()
    outputs = made.training_maps(torch.rand(2, 3, 8, 8), Schedule.of(1, 3, 4))
    assert [tuple(o["reconstruction"].shape[2:]) for o in outputs] == [(2, 2), (6, 6), (8, 8)]
    sum(o["reconstruction"].square().mean() + o["vq_loss"] for o in outputs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


# Positions


@given(schedules)
def test_positions_of_any_schedule_are_the_resized_table(sides):
    generator = FlexVARConfig(1, 8, 2, 4, ClassConfig(2), table=6).build()
    plan = FlexibleScalesConfig(sides).build()
    schedule = plan.schedule
    whole = generator.stands(plan.training_step(), 1, torch.device("cpu"))
    assert whole.shape == (schedule.total, 8) and schedule.total == sum(h * w for h, w in sides)
    for level, side in enumerate(sides):
        table = F.interpolate(generator.position[None], side, mode="area")[0].flatten(1).mT
        assert torch.equal(whole[schedule.positions(level)], table)
        assert torch.equal(generator.stands(plan.steps[level], 1, torch.device("cpu")), table)


def test_the_table_at_its_own_side_is_the_parameter():
    generator = FlexVARConfig(1, 8, 2, 4, ClassConfig(2), table=32).build()
    assert torch.equal(generator.positions([(32, 32)]).mT.reshape(8, 32, 32), generator.position)
    assert torch.equal(generator.position, waves(8, 32))


def test_the_table_starts_as_published():
    table = waves(4, 3)
    assert torch.allclose(table[0, :, 0], torch.arange(3.0).sin())
    assert torch.allclose(table[3, 0, :], (torch.arange(3.0) / 100).cos())


# Decoding in any schedule


@pytest.mark.parametrize("sides", [(1, 2, (3, 4), (4, 6)), (1, (2, 2), (3, 3), (5, 4), (5, 6), (9, 7))])
def test_cached_decoding_equals_the_masked_pass_in_any_schedule(sides):
    tokenizer, model = over(sides)
    latents = {"ids": torch.randint(0, 24, (2, tokenizer.schedule.total))}
    state = start(tokenizer, model, labels(2))
    cached = torch.cat(force(model, state, latents), dim=1)
    canvas, whole = tokenizer.canvas(2), model.plan.training_step()
    canvas.fill(latents)
    with torch.no_grad():
        h = model.generator(
            canvas.feed(whole.feed), whole, state.prepared, Packed(whole.sees.own, branches=2)
        )
    assert torch.allclose(h, cached, rtol=1e-9, atol=1e-9)


# Schedules


@given(st.integers(2, 40).flatmap(lambda last: st.tuples(st.just(last), st.integers(2, last))))
def test_spread_schedules_grow_from_one_to_the_last(case):
    last, steps = case
    sides = spread(steps, last)
    assert len(sides) == steps and sides[0] == 1 and sides[-1] == last
    assert all(a < b for a, b in pairwise(sides))


def test_published_schedules_are_found_by_their_steps():
    assert spread(13, 16) == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16)
    twice = FlexibleScalesConfig(PUBLISHED[10], seen=PUBLISHED[10]).to_grid((32, 32))
    assert [h for h, _ in twice.schedule] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 23, 32]
    assert spread(15, 32) == PUBLISHED_512 and twice.stepped(15).schedule == twice.schedule
    assert [h for (h, _), new in zip(twice.schedule, twice.unseen(), strict=True) if new] == [
        7,
        9,
        12,
        14,
        23,
        32,
    ]
    wide = Schedule.parse(FlexibleScalesConfig(PUBLISHED[10]).to_grid((24, 32)).schedule)
    assert len(wide) == 15 and wide.last == (24, 32)
    assert len(FlexibleScalesConfig((1, 2, 3, 4, 6, 8)).to_grid((32, 32)).schedule) < 15
    for bad in (1, 17):
        with pytest.raises(UserError, match=f"{bad} steps cannot reach a grid of 16"):
            spread(bad, 16)


@given(grids.map(lambda g: (2 * g[0], 3 * g[1])))
def test_a_schedule_ends_at_any_grid_asked_for(last):
    config = FlexibleScalesConfig((1, 2, 3, 4, 6, 8)).to_grid(last)
    schedule = Schedule.parse(config.schedule)  # grows, or this raises
    assert schedule.last == last
    assert config.trained == 8
    assert [max(side) for side in schedule.sides] == sorted({max(side) for side in schedule.sides})
    assert (
        max(b / a for a, b in pairwise(max(s) for s in schedule.sides) if a >= 8) <= 1.6
        if max(last) > 9
        else True
    )


def test_unseen_scales_are_those_that_training_never_drew():
    config = FlexibleScalesConfig(PUBLISHED[10], seen=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert not any(config.unseen())
    assert config.stepped(6).unseen() == (False,) * 6
    assert config.over((1, 2, 7, 16, 23)).unseen() == (False, False, True, False, True)
    assert config.over((1, (2, 3), (6, 7), (9, 10))).unseen() == (False, False, True, True)  # height or width
    small = FlexibleScalesConfig((1, 2, 4, 8))
    assert small.over((1, 3, 8, 12)).unseen() == (False, False, False, True)


def test_guidance_rises_over_nine_steps_at_most_and_stays_beyond_the_trained_side():
    assert ramp(Schedule.of(*PUBLISHED[10]), 16) == tuple(k / 9 for k in range(10))
    long = ramp(Schedule.of(*PUBLISHED[13]), 16)
    assert long[-1] == pytest.approx(12 / 9)
    assert ramp(Schedule.of(*PUBLISHED[13]), 16, clamp=True)[-3:] == (1.0, 1.0, 1.0)
    assert ramp(Schedule.of(1, 2, 8, 16, 23), 16) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert ramp(Schedule.of(1, 2, 8, 16, 23), 8) == (0.0, 0.25, 0.5, 1.0, 1.0)


def test_schedules_are_read_as_written():
    assert sides_of("1, 2,4x6") == (1, 2, (4, 6))
    for bad in ("", "1,,2", "1x2x3", "a", "-1"):
        with pytest.raises(UserError, match="is not a list of sides"):
            sides_of(bad)


# Training schedules


def drawn(sampler: ScheduleSampler, count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [sampler.draw(generator) for _ in range(count)]


@pytest.mark.parametrize("compat", [False, True])
def test_published_schedules_keep_their_rules_over_ten_thousand_draws(compat):
    draws = drawn(ScheduleSampler.published(compat), 10_000)
    assert all(a < b for sides in draws for a, b in pairwise(sides))
    assert {sides[0] for sides in draws} == {1}
    assert sum(sides[1] != 2 for sides in draws) <= 5
    assert max(sum(s * s for s in sides) for sides in draws) <= 680
    if not compat:
        assert {sides[-1] for sides in draws} == {16}


def test_compat_draws_have_the_published_statistics():
    """Rates of the released sampler over 20,000 draws; four standard deviations of the difference are allowed."""
    told = json.loads((REFERENCE / "flexvar_tiny.json").read_text())["schedule_sampler_statistics"]
    draws = drawn(ScheduleSampler.published(compat=True), 10_000)

    def close(found: float, wanted: float) -> bool:
        deviation = (max(wanted, 1e-4) * (1 - min(wanted, 0.9999)) * (1 / 10_000 + 1 / told["draws"])) ** 0.5
        return abs(found - wanted) <= 4 * deviation

    def rate(hit) -> float:
        return sum(map(hit, draws)) / len(draws)

    assert close(rate(lambda s: s == PUBLISHED[10]), told["default_schedule_rate"])
    for side, wanted in told["side_rate"].items():
        assert close(rate(lambda s, side=int(side): side in s), wanted), side
    for length, wanted in told["length_rate"].items():
        assert close(rate(lambda s, length=int(length): len(s) == length), wanted), length
    for last, wanted in told["last_side_rate"].items():
        assert close(rate(lambda s, last=int(last): s[-1] == last), wanted), last


def test_small_schedules_vary_and_end_at_the_last_side():
    draws = drawn(ScheduleSampler.small((1, 2, 3, 4, 6, 8)), 500)
    assert all(sides[:2] == (1, 2) and sides[-1] == 8 for sides in draws)
    assert {len(sides) for sides in draws} >= {4, 5, 6} and len(set(draws)) >= 15
    with pytest.raises(UserError, match="begin with 1, 2"):
        ScheduleSampler.small((1, 3, 8))
    with pytest.raises(UserError, match="cannot be drawn"):
        replace(ScheduleSampler.published(), early=9)


@pytest.mark.parametrize("sides", PUBLISHED.values(), ids=len)
def test_a_model_of_published_sides_is_taught_by_the_published_sampler(sides):
    made, plan = tokenizer(sides), FlexibleScalesConfig(sides).build()
    assert ScheduleLessons(made, plan).sampler == ScheduleSampler.published()
    released = ScheduleLessons(made, plan, compat=True)
    assert released.sampler == ScheduleSampler.published(compat=True) and released.settings["compat"]
    torch.manual_seed(0)
    latents = {"ids": torch.randint(0, 24, (1, made.every.total))}
    totals = [released.lesson(latents, step).total for step in range(20)]
    assert len(set(totals)) > 5 and max(totals) <= 680


def test_a_model_of_other_sides_is_taught_by_its_own():
    made, plan = tokenizer((1, 2, 3, 5)), FlexibleScalesConfig((1, 2, 3, 5)).build()
    lessons = ScheduleLessons(made, plan, others=((1, 2, 4, 8), (1, 4, 5)))
    assert lessons.sampler == ScheduleSampler.small((1, 2, 3, 5))
    assert lessons.others == ((1, 4, 5),)  # what ends at another grid is not this model's
    with pytest.raises(UserError, match="the grid 6x6 cannot be taught by a tokenizer of maps up to 5x5"):
        ScheduleLessons(made, FlexibleScalesConfig((1, 2, 3, 6)).build())


def test_the_largest_released_size_starts_with_smaller_gates():
    assert [FlexVARConfig.published(depth).adaln_init for depth in (16, 20, 24)] == [1e-3, 1e-3, 1e-4]
    assert FlexVARConfig.published(24, adaln_init=0.5).adaln_init == 0.5


def test_a_lesson_is_the_drawn_schedule_with_its_own_maps():
    made = tokenizer((1, 2, 3, 5))
    images = torch.rand(2, 3, 10, 10) * 2 - 1
    plan = FlexibleScalesConfig(made.config.schedule).build()
    lessons = ScheduleLessons(made, plan, others=((1, 4, 5),))
    latents = made.training_latents(images)
    torch.manual_seed(3)
    lengths = set()
    for step in range(8):
        lesson = lessons.lesson(latents, step)
        schedule = lesson.canvas.schedule
        lengths.add(schedule.sides)
        assert torch.equal(lesson.targets["ids"], made.encode(images, schedule)["ids"])
        assert lesson.total == schedule.total == len(lesson.step.target)
    assert len(lengths) > 1
    assert lessons.lesson(latents).canvas.schedule == made.schedule
    assert lessons.held_out(latents)["1_4_5"].total == 1 + 16 + 25


def test_the_loss_is_the_mean_over_the_schedules_tokens():
    made, model = CASE.build()
    made.schedule = Schedule.of(1, 2, 3, 4)
    plan = FlexibleScalesConfig((1, 2, 3, 4)).build()
    objective = NextStepLoss(model.generator, model.heads["main"], condition_drop=0.0).eval()
    lesson = ScheduleLessons(made, plan).lesson({"ids": torch.randint(0, 24, (2, 30))})
    label = {"label": torch.tensor([0, 1])}
    each = objective.losses(lesson, label)
    assert each.shape == (2, 30)
    assert torch.allclose(objective(lesson, label), each.mean())


def test_a_tokenizers_step_takes_the_finest_map_and_random_others():
    made = tokenizer((1, 2, 3, 5))
    recipe = TokenizerLossConfig(l1=0.0, l2=1.0, vq=0.0)
    task = MapTask(made, open_dataset("digits"), recipe, batch_size=2, recipe={}, scales=3)
    drawn = {task.drawn(step).sides for step in range(20)}
    assert all(len(sides) == 3 and sides[-1] == (5, 5) for sides in drawn) and len(drawn) > 3
    assert task.drawn(4) == task.drawn(4)
    batch = task.batch(0, 0)
    loss, _ = task.loss("tokenizer", batch, 4)
    terms = []
    for (h, w), out in zip(task.drawn(4).sides, made.training_maps(batch, task.drawn(4)), strict=True):
        terms.append(F.mse_loss(out["reconstruction"], F.adaptive_avg_pool2d(batch, (2 * h, 2 * w))))
    assert torch.allclose(loss, torch.stack(terms).mean())
    assert task.after_step(4)["revived"] == 0.0
    with pytest.raises(UserError, match="6 scales a step"):
        MapTask(made, open_dataset("digits"), recipe, batch_size=2, recipe={}, scales=6)
